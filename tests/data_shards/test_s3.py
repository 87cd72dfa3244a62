"""What is asked of S3, by a server that answers as it is told to: what the real one of the tests does not insist on."""

import asyncio
import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiobotocore.awsrequest import AioAWSResponse
from aiobotocore.httpsession import AIOHTTPSession

from data_shards.pack import _check_writable
from data_shards.s3 import PART_BYTES
from data_shards.s3_bucket import Bucket
from data_shards.store import Denied, Store, StoreError


class Question(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]  # names in small letters
    body: bytes


class Answer(NamedTuple):
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    body: bytes = b""


class Server:
    """Keeps the questions, and answers each by `answer`."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.answer: Callable[[Question], Answer] = lambda _: Answer()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                question = Question(self.command, self.path, headers, body)
                server.questions.append(question)
                answer = server.answer(question)
                self.send_response(answer.status)
                for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a client that has no use for it any more
                    self.wfile.write(b"" if question.method == "HEAD" else answer.body)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


def test_a_deletion_carries_the_md5_that_older_servers_insist_on(server: Server) -> None:
    def insist(question: Question) -> Answer:
        md5 = base64.b64encode(hashlib.md5(question.body, usedforsecurity=False).digest()).decode()
        if question.headers.get("content-md5") != md5:
            return Answer(400, body=b"<Error><Code>MissingContentMD5</Code></Error>")
        return Answer(body=b"<DeleteResult/>")

    server.answer = insist
    Store("s3://bucket/set").delete(["a", "b"])
    assert [question.target for question in server.questions] == ["/bucket?delete"]


def test_a_key_that_may_put_and_not_delete_is_told_so_and_packs_all_the_same(server: Server) -> None:
    """S3 answers 200 to a deletion that it refuses, with a cause for each object."""
    cause = b"<Error><Key>set/plans/writable</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    server.answer = lambda _: Answer(body=b"<DeleteResult>" + cause + b"</DeleteResult>")
    store = Store("s3://bucket/set")
    with pytest.raises(Denied, match="s3://bucket/set/plans/writable: not deleted: Access Denied"):
        store.delete(["plans/writable"])
    _check_writable(store)


def test_a_role_that_is_refused_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = keys\n"
        "[profile keys]\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "role"}.items():
        monkeypatch.setenv(name, value)
    refused = b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>not you</Message></Error></ErrorResponse>"
    server.answer = lambda _: Answer(403, body=refused)
    with pytest.raises(Denied) as told:
        Store("s3://bucket/set", retry_seconds=1).check()
    assert "no key from profile role: " in str(told.value)
    assert "AssumeRole operation: not you" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_store_that_is_away_for_hours_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.s3.random.uniform", lambda *_: 0.0)  # pauses take no time
    away = 1100  # tries: three hours of them
    server.answer = lambda _: Answer(503) if len(server.questions) <= away else Answer(body=b"photograph")
    store = Store("s3://bucket/set", retry_seconds=1e5)
    assert store.get("x") == b"photograph"
    assert store.counters.retries == away


def signed(bucket: Bucket, keys: str) -> list[str]:
    async def sign() -> list[str]:
        urls = await asyncio.gather(*map(bucket.sign, keys))
        await bucket.close()
        return list(urls)

    return asyncio.run(sign())


@pytest.mark.parametrize("status", [200, 301, 400, 403])
def test_a_url_is_signed_for_the_region_of_the_bucket_where_the_profile_names_another(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    asked: list[str] = []

    class Nothing:
        raw_headers = ()

        async def read(self) -> bytes:
            return b""

    async def amazon(_: AIOHTTPSession, request: Any) -> AioAWSResponse:
        asked.append(f"{request.method} {request.url}")
        there = "eu-west-1" in request.url
        return AioAWSResponse(request.url, 200 if there else status, {"x-amz-bucket-region": "eu-west-1"}, Nothing())

    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(AIOHTTPSession, "send", amazon)
    for url in signed(Bucket("photos", 2), "abc"):
        assert url.startswith("https://photos.s3.")
        assert "%2Feu-west-1%2Fs3%2Faws4_request" in url
    assert {one.split()[0] for one in asked} == {"HEAD"}
    assert len(asked) <= 2  # for all keys together; the second is led there


def test_a_server_of_ones_own_is_not_asked_for_its_region(server: Server) -> None:
    (url,) = signed(Bucket("photos", 2), "a")
    assert url.startswith(f"{server.url}/photos/a?")
    assert server.questions == []


class Changing:
    """An object of three ranges, of which every version is of one letter: asked for a range, it may become the next."""

    def __init__(self, changes: int) -> None:
        self.changes, self.version, self.lock = changes, 0, threading.Lock()

    @property
    def data(self) -> bytes:
        return bytes([65 + self.version]) * (2 * PART_BYTES + 5 - self.version)

    def __call__(self, question: Question) -> Answer:
        with self.lock:
            return self.answer(question)

    def answer(self, question: Question) -> Answer:
        etag = {"ETag": f'"{self.version}"'}
        if question.method == "HEAD":
            return Answer(200, {**etag, "Content-Length": str(len(self.data))})
        if question.headers.get("if-match", etag["ETag"]) != etag["ETag"]:
            return Answer(412, body=b"<Error><Code>PreconditionFailed</Code></Error>")
        start, end = map(int, question.headers["range"].removeprefix("bytes=").split("-"))
        place = {"Content-Range": f"bytes {start}-{end}/{len(self.data)}"}
        answer = Answer(206, {**etag, **place}, self.data[start : end + 1])
        self.version += self.version < self.changes
        return answer


def test_an_object_that_is_written_over_while_it_comes_down_is_of_one_version(server: Server, tmp_path: Path) -> None:
    server.answer = changing = Changing(2)
    Store("s3://bucket/set").download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == changing.data


def test_an_object_that_is_always_written_over_is_given_up_in_one_line(server: Server, tmp_path: Path) -> None:
    server.answer = Changing(100)
    with pytest.raises(StoreError, match=r"s3://bucket/set/x: was written over \d+ times") as error:
        Store("s3://bucket/set").download("x", tmp_path / "x")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_upload_over_a_slow_line_is_given_the_time_that_its_parts_take_together(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(question: Question) -> Answer:
        if "partNumber=" in question.target:
            threading.Event().wait(2.6)  # the line: more than a part is given alone, or at first
        if question.method == "POST" and "uploads" in question.target:
            return Answer(body=b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        return Answer(headers={"ETag": '"1"'})

    server.answer = slowly
    monkeypatch.setattr("data_shards.s3.PART_BYTES", 2**16)
    monkeypatch.setattr("data_shards.s3.SLOWEST_BYTES_S", 2**18)  # a second for four parts
    (tmp_path / "x").write_bytes(bytes(3 * 2**16))
    store = Store("s3://bucket/set", retry_seconds=4)
    store.upload(tmp_path / "x", "x")
    assert store.counters.bytes_written == 3 * 2**16
