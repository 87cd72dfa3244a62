"""The store against a real S3 server: what it answers, and what a user is told when it does not."""

import asyncio
import contextlib
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from data_shards import s3 as s3_store
from data_shards.store import AlreadyExists, Denied, NotFound, Store, StoreError, Truncated, Unavailable
from jobs.daemons import wait_until
from tests.proxy import Wire

TWO_FAULTS_S = 16.0  # time for two attempts that each wait for their deadline, a quarter of it and a second


@pytest.fixture
def store(s3: Any) -> Store:
    return Store(s3.bucket("shards"))


def one_line(error: pytest.ExceptionInfo[StoreError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("s3://")
    return text


def test_what_was_put_is_what_is_read_whole_and_in_ranges(store: Store) -> None:
    store.put("x/y.bin", bytes(range(256)))
    assert store.get("x/y.bin") == bytes(range(256))
    assert store.get("x/y.bin", 10, 20) == bytes(range(10, 20))
    assert store.get("x/y.bin", 250) == bytes(range(250, 256))
    assert store.get("x/y.bin", None, 3) == b"\x00\x01\x02"
    assert store.size("x/y.bin") == 256
    assert store.exists("x/y.bin")


def test_opening_an_object_costs_one_request(store: Store) -> None:
    store.put("x", b"1")
    before = store.counters.requests
    store.get("x")
    assert store.counters.requests == before + 1


def test_ranges_past_the_end_are_errors_and_never_short_answers(store: Store) -> None:
    store.put("x", b"12345")
    for start, end in ((3, 9), (5, 6), (7, None)):
        with pytest.raises(Truncated, match="ends "):
            store.get("x", start, end)


def test_an_empty_object_is_read_as_empty(store: Store) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""


def test_a_missing_object_is_not_found_at_once(store: Store) -> None:
    for call in (store.get, store.size):
        with pytest.raises(NotFound, match="none: no such object"):
            call("none")
    assert not store.exists("none")
    assert store.counters.retries == 0


def test_the_second_writer_of_a_create_only_put_loses(store: Store) -> None:
    store.put("claim", b"first", create_only=True)
    with pytest.raises(AlreadyExists, match="claim: is there already"):
        store.put("claim", b"second", create_only=True)
    assert store.get("claim") == b"first"


def test_a_listing_is_complete_sorted_and_never_old(store: Store) -> None:
    paths = sorted(f"deep/{number % 3}/{number}" for number in range(30))
    for path in paths:
        store.put(path, b"12")
    store.put("deeper/x", b"")
    assert [entry.path for entry in store.list("deep")] == paths
    Store(store.url).put("deep/9/new", b"")
    assert [entry.path for entry in store.at("deep").list()][-1] == "9/new"
    store.delete([*paths, "was never there"])
    assert [entry.path for entry in store.list()] == ["deep/9/new", "deeper/x"]


@pytest.mark.slow
def test_the_folders_right_below_are_named_also_when_they_take_several_pages(store: Store) -> None:
    puts = [store.submit(store._backend.put(store._key(f"run-{n:04d}/attempts/1"), b"x", False)) for n in range(1005)]
    for put in puts:
        put.result()
    store.put("beside", b"x")
    assert store.folders() == tuple(f"run-{n:04d}" for n in range(1005))


@pytest.mark.slow
def test_forty_megabytes_go_up_in_parts_and_come_down_unchanged(store: Store, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(40 * 2**20 + 7))
    store.upload(local, "large")
    assert store.size("large") == 40 * 2**20 + 7
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    assert store.counters.bytes_written == 40 * 2**20 + 7


@pytest.mark.slow
def test_an_upload_in_parts_whose_process_was_killed_is_given_up(store: Store, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(40 * 2**20))
    killed = f"""
import os, pathlib
from data_shards.s3 import S3
from data_shards.store import Store
async def kill(*_): os._exit(9)
S3._part = kill  # begun, and not a part of it has arrived
Store({store.url!r}).at("dead").upload(pathlib.Path({str(local)!r}), "x")
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == 9
    store.put("dead/whole", b"1")
    assert store.abandon("deadly") == 0
    assert store.abandon("dead") == 2
    assert store.abandon("dead") == 0
    assert [entry.path for entry in store.list()] == ["dead/whole"]


def test_threads_and_coroutines_share_a_store(store: Store) -> None:
    for number in range(8):
        store.put(f"{number}", b"%d" % number)
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda n=n: got.append(store.get(f"{n}"))) for n in range(8)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def all_at_once() -> list[bytes]:
        return list(await asyncio.gather(*(store.read(f"{n}") for n in range(8))))

    assert sorted(got) == store.submit(all_at_once()).result() == [b"%d" % n for n in range(8)]


def read_in_child(store: Store) -> None:
    os._exit(0 if store.get("x") == b"1" else 1)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_child_reads_with_its_parents_store_and_the_parent_goes_on(store: Store, method: str) -> None:
    store.put("x", b"1")
    child = multiprocessing.get_context(method).Process(target=read_in_child, args=(store,))  # type: ignore[attr-defined]
    child.start()
    assert store.get("x") == b"1"
    child.join(60)
    assert child.exitcode == 0
    assert store.get("x") == b"1"


def test_check_accepts_what_works(store: Store) -> None:
    store.check()


def test_a_missing_bucket_is_named_with_those_that_there_are(s3: Any) -> None:
    photos = Store("s3://photos/mine")
    for call in (photos.check, lambda: photos.get("x"), lambda: photos.put("x", b""), photos.list):
        with pytest.raises(StoreError) as error:
            call()
        assert one_line(error).startswith(f"s3://photos: no such bucket at {s3.server.url}; it has: ")
        assert "runs" in str(error.value)
        assert "shards" in str(error.value)


@pytest.fixture
def keys(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    def use(key_id: str, secret: str) -> None:
        path = tmp_path / "credentials"
        path.write_text(f"[{os.environ['AWS_PROFILE']}]\naws_access_key_id={key_id}\naws_secret_access_key={secret}\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))

    return use


def own_key() -> tuple[str, str]:
    """Key id and secret."""
    lines = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).read_text().splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    return values["aws_access_key_id"], values["aws_secret_access_key"]


@pytest.mark.parametrize("right_id", [True, False])
def test_a_wrong_key_is_refused_at_once_without_showing_it(
    s3: Any, keys: Callable[[str, str], None], right_id: bool
) -> None:
    key_id = own_key()[0] if right_id else "AKIAWRONGWRONGWRONG"
    keys(key_id, "not-the-secret-of-this-key")
    store = Store("s3://shards/x")
    for call in (store.check, lambda: store.get("x"), lambda: store.put("x", b""), store.list, lambda: store.size("x")):
        with pytest.raises(Denied) as error:
            call()
        text = one_line(error)
        assert f"access denied at {s3.server.url} for key id {key_id[:4]}.. from profile" in text
        assert key_id not in text
        assert "not-the-secret" not in text
    assert store.counters.retries == 0


def test_without_any_key_the_user_is_told_where_it_is_looked_for(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(f"[{os.environ['AWS_PROFILE']}]\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Denied, match="AWS_PROFILE") as error:
        Store("s3://shards/x").check()
    one_line(error)


def test_an_unknown_profile_is_named(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(Denied, match=r"nobody.*AWS_PROFILE") as error:
        Store("s3://shards/x").get("x")
    one_line(error)


@pytest.mark.slow
def test_where_nothing_listens_is_asked_until_the_time_is_over(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = Store("s3://shards/x", retry_seconds=1.5)
        with pytest.raises(Unavailable):
            store.check()  # makes the client, which takes a second on a busy machine
        before, start = store.counters.retries, time.monotonic()
        with pytest.raises(Unavailable) as error:
            store.get("x")
        took = time.monotonic() - start
        assert took < 60
        said = re.search(rf"{url} has not answered for (\d+) s", str(error.value))
        assert said
        assert 1 <= int(said[1]) <= took + 0.5  # rounded
        assert store.counters.retries > before + 1
        assert "endpoint_url" in one_line(error)


@pytest.fixture
def wire(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire(s3.server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
    yield wire
    wire.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "unwell", "a page", "cut", "torn", "silence"])
def test_a_read_survives_faults_on_the_wire(store: Store, wire: Wire, fault: str) -> None:
    data = os.urandom(200_000)
    store.put("x", data)
    faulty = Store(store.url, retry_seconds=TWO_FAULTS_S)
    wire.faults = [fault, fault]
    assert faulty.get("x", 100, 190_000) == data[100:190_000]
    assert faulty.counters.retries >= 1
    with pytest.raises(NotFound):
        faulty.get("none")


class Kept:
    """A consumer that keeps what it gets."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def __call__(self, piece: memoryview) -> None:
        self.pieces.append(bytes(piece))


def fed(store: Store, path: str, start: int, end: int) -> bytes:
    return b"".join(store.submit(store.feed(path, start, end, Kept)).result(60).pieces)


def test_a_consumer_is_fed_what_a_read_gives_and_told_the_same_errors(store: Store, s3: Any) -> None:
    data = os.urandom(3_000_000)
    store.put("a b/ä+x.bin", data)
    for start, end in ((0, 1), (17, 2_900_001), (0, len(data))):
        assert fed(store, "a b/ä+x.bin", start, end) == data[start:end]
    with pytest.raises(Truncated):
        fed(store, "a b/ä+x.bin", 10, len(data) + 1)
    with pytest.raises(NotFound):
        fed(store, "none", 0, 10)
    with pytest.raises(StoreError, match="no such bucket"):
        fed(Store("s3://nowhere/x"), "x", 0, 10)


def test_where_a_proxy_stands_between_all_requests_go_through_it(
    store: Store, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("x", b"12345")
    port = s3.server.url.rpartition(":")[2]
    wire = Wire(s3.server.url)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://store.invalid:{port}")  # a proxy alone finds it
        monkeypatch.setenv("HTTP_PROXY", wire.url)
        assert fed(Store(store.url, retry_seconds=20), "x", 1, 4) == b"234"
        assert any(request.startswith(f"GET http://store.invalid:{port}/") for request in wire.requests)
    finally:
        wire.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "unwell", "a page", "cut", "torn", "silence"])
def test_a_consumer_is_fed_through_faults_on_the_wire(store: Store, wire: Wire, fault: str) -> None:
    data = os.urandom(600_000)
    store.put("x", data)
    faulty = Store(store.url, retry_seconds=TWO_FAULTS_S)
    wire.faults = [fault, "", fault, fault]
    for start in (100, 5):
        assert fed(faulty, "x", start, 500_000) == data[start:500_000]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "unwell", "lost", "half"])
def test_a_create_only_put_survives_faults_on_the_wire_and_knows_its_own(store: Store, wire: Wire, fault: str) -> None:
    faulty = Store(store.url, retry_seconds=TWO_FAULTS_S)
    wire.faults = [fault, fault]
    faulty.put("y", b"mine", create_only=True)
    assert Store(store.url).get("y") == b"mine"
    with pytest.raises(AlreadyExists):
        faulty.put("y", b"mine", create_only=True)


@pytest.mark.slow
def test_a_store_that_stays_unwell_is_given_up_with_its_reason(store: Store, wire: Wire) -> None:
    wire.faults = ["unwell"] * 100
    with pytest.raises(Unavailable, match="503") as error:
        Store(store.url, retry_seconds=4).list()
    assert wire.url in one_line(error)


@pytest.mark.slow
def test_a_key_that_is_replaced_in_its_file_is_taken_while_reading(
    store: Store, wire: Wire, keys: Callable[[str, str], None]
) -> None:
    key = own_key()
    store.put("x", b"1")
    keys(*key)
    reading = Store(store.url, retry_seconds=30)
    assert reading.get("x") == b"1"
    keys("AKIAWRONGWRONGWRONG", "no-secret")
    wire.faults = ["expired"]
    answer = reading.submit(reading.read("x"))
    asked, end = len(wire.requests), time.monotonic() + 20
    while len(wire.requests) < asked + 3 and time.monotonic() < end:
        time.sleep(0.02)  # by now the server itself refuses the wrong key
    assert not answer.done()
    keys(*key)
    assert answer.result(30) == b"1"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that goes up in three parts."""
    local = tmp_path / "large"
    local.write_bytes(os.urandom(40 * 2**20))
    return local


@pytest.mark.slow
def test_a_large_object_that_is_read_whole_may_take_as_long_as_its_bytes_do(
    store: Store, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(64 * 2**20)
    store.put("x", data)
    monkeypatch.setattr(s3_store, "SLOWEST_BYTES_S", 2**23)  # eight seconds for these bytes; four for what is short
    reading = Store(store.url, retry_seconds=TWO_FAULTS_S)
    reading.check()
    wire.delay_s, wire.faults = 5.0, ["slow"]
    assert reading.get("x") == data
    assert wire.faults == []
    assert reading.counters.retries == 0
    store.put("y", data[:100_000])
    wire.delay_s, wire.faults = 60.0, ["slow", "late"]
    assert Store(store.url, retry_seconds=TWO_FAULTS_S).get("y") == data[:100_000]
    assert wire.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("path", ["a//1.jpg", "/1.jpg", "a/./1.jpg", "http:/x/../1.jpg", "a/"])
def test_an_object_is_asked_for_by_its_own_name_though_another_would_be_the_same_path(
    store: Store, wire: Wire, path: str
) -> None:
    asking = Store(store.url, retry_seconds=4)
    asking.check()
    asked = f"/{store.url.removeprefix('s3://')}/{quote(path)}"
    calls: list[Callable[[], object]] = [
        lambda: asking.get(path),
        lambda: asking.put(path, b"12"),
        lambda: asking.size(path),
        lambda: fed(asking, path, 0, 2),
    ]
    for call in calls:
        wire.requests.clear()
        with contextlib.suppress(StoreError):  # this server takes names for paths
            call()
        assert {request.split()[1].partition("?")[0] for request in wire.requests} - {"/shards"} == {asked}


@pytest.mark.slow
def test_an_upload_in_parts_to_a_server_that_goes_away_ends_within_its_time_in_one_line(
    store: Store, wire: Wire, large: Path
) -> None:
    def close() -> None:
        wait_until(lambda: any("partNumber=" in request for request in wire.requests), 60)
        wire.close()

    closing = threading.Thread(target=close)
    closing.start()
    begun = time.monotonic()
    with pytest.raises(Unavailable, match=r"large: .* has not answered for") as error:
        Store(store.url, retry_seconds=4).upload(large, "large")
    assert time.monotonic() - begun < 120
    one_line(error)
    closing.join()


@pytest.mark.slow
def test_an_upload_in_parts_whose_last_answer_is_lost_knows_its_own_object(
    store: Store, wire: Wire, large: Path
) -> None:
    wire.struck, wire.faults = "POST .*uploadId=", ["lost", "no upload"]
    Store(store.url, retry_seconds=20).upload(large, "large")
    assert wire.faults == []
    assert store.size("large") == 40 * 2**20
    wire.faults = ["no upload"]  # given up by another, and what is there is older
    with pytest.raises(NotFound, match="large"):
        Store(store.url, retry_seconds=20).upload(large, "large")
    assert store.abandon("") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("struck", "faults"),
    [("(HEAD|GET).*/x", ["bare 400"]), ("PUT", []), ("partNumber=", [])],
    ids=["HEAD", "PUT", "part"],
)
def test_a_token_that_expires_between_two_requests_is_renewed(
    store: Store, wire: Wire, large: Path, struck: str, faults: list[str]
) -> None:
    lasting = Store(store.url, retry_seconds=20)
    lasting.put("x", b"1")
    wire.struck, wire.faults = struck, [*faults, "expired, as of AWS"]
    if struck == "partNumber=":
        lasting.upload(large, "large")
    else:
        lasting.put("x", b"12")
    assert lasting.size("x") >= 1
    assert wire.faults == []
    assert lasting.counters.retries == 1


@pytest.mark.slow
def test_a_token_that_was_never_good_is_refused_at_once_with_what_to_do(store: Store, wire: Wire) -> None:
    new = Store(store.url, retry_seconds=20)
    calls: list[Callable[[], object]] = [lambda: new.size("x"), lambda: new.put("x", b"")]
    wire.struck = "/x"
    for call, faults in zip(calls, (["bare 400"], []), strict=True):
        wire.faults = [*faults, "expired, as of AWS"]
        with pytest.raises(Denied, match=r"access denied at .*; renew it where it comes from and start again") as error:
            call()
        one_line(error)
    assert new.counters.retries == 0


@pytest.mark.slow
def test_throttling_is_waited_out_also_where_it_is_no_503(store: Store, wire: Wire) -> None:
    store.put("x", b"1")
    waiting = Store(store.url, retry_seconds=20)
    wire.faults = ["throttled"] * 2
    assert waiting.get("x") == b"1"
    assert waiting.counters.retries == 2


@pytest.mark.slow
def test_a_deletion_in_which_one_object_failed_is_asked_for_again(store: Store, wire: Wire) -> None:
    store.put("x", b"1")
    wire.faults = ["not deleted"]
    Store(store.url, retry_seconds=20).delete(["x"])
    assert wire.faults == []
    assert store.list() == []


@pytest.mark.slow
def test_a_server_without_conditional_puts_is_told_at_once(store: Store, wire: Wire) -> None:
    new = Store(store.url, retry_seconds=20)
    wire.faults = ["no condition"]
    with pytest.raises(StoreError, match=r"answers 501 NotImplemented: .*PutObject") as error:
        new.put("x", b"1", create_only=True)
    one_line(error)
    assert new.counters.retries == 0
