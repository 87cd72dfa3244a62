"""Ranged GETs by a client of our own, against a server that answers as it is told to."""

import asyncio
import datetime
import random
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from data_shards import direct
from data_shards.direct import Direct

DATA = random.Random(0).randbytes(3 * direct.PIECE_BYTES + 17)
DEADLINE_S = 20.0
Answer = Callable[["Server", asyncio.StreamWriter, int, int], Awaitable[None]]


class Server:
    """Answers the n-th request by `answers[n]`, then rightly; counts connections and keeps the questions."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.connections = 0
        self.questions: list[str] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                question = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.questions.append(question)
                start, end = question.partition("bytes=")[2].partition("\r\n")[0].split("-")
                answer = self.answers.pop(0) if self.answers else right
                await answer(self, writer, int(start), int(end) + 1)
                await writer.drain()
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://localhost:{port}/bucket/a%20b?X-Sign=1"
    try:
        yield server
    finally:
        listener.close()


def head(start: int, end: int, status: str = "206 Partial Content", **more: str) -> bytes:
    fields = {"Content-Range": f"bytes {start}-{end - 1}/{len(DATA)}", "content-length": str(end - start), **more}
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def right(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    writer.write(head(start, end) + DATA[start:end])


async def by_and_by(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    whole = head(start, end) + DATA[start:end]
    for at in range(0, len(whole), 9001):
        writer.write(whole[at : at + 9001])
        await writer.drain()
        await asyncio.sleep(0)


async def letter_by_letter(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    for byte in head(start, end):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(DATA[start:end])


async def cut(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    writer.write(head(start, end) + DATA[start : (start + end) // 2])
    await writer.drain()
    writer.close()


async def closed(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    writer.close()


async def last(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    writer.write(head(start, end, Connection="close") + DATA[start:end])


async def too_much(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    writer.write(head(start, end) + DATA[start:end] + b"and more")


async def never(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
    await asyncio.sleep(3600)


def other(answer: Callable[[int, int], bytes]) -> Answer:
    async def give(server: Server, writer: asyncio.StreamWriter, start: int, end: int) -> None:
        writer.write(answer(start, end))

    return give


OTHERS = {
    "an error": lambda a, b: b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n",
    "a redirect": lambda a, b: b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
    "the whole object": lambda a, b: head(a, b, "200 OK") + DATA[a:b],
    "other bytes": lambda a, b: head(a + 1, b + 1) + DATA[a + 1 : b + 1],
    "fewer bytes": lambda a, b: head(a, b - 1) + DATA[a : b - 1],
    "a chunked body": lambda a, b: head(a, b, Transfer_Encoding="chunked") + b"0\r\n\r\n",
    "no length": lambda a, b: head(a, b, content_length="") + DATA[a:b],
    "a head without an end": lambda a, b: b"HTTP/1.1 206 Partial Content\r\nX: " + b"x" * direct.PIECE_BYTES,
    "no HTTP": lambda a, b: b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}


def asked(test: Callable[[Server, Direct], Awaitable[None]]) -> None:
    """Run a test with a server and a client of its own."""

    async def run() -> None:
        async with serving() as server:
            client = Direct(None)
            async with asyncio.timeout(DEADLINE_S):
                await test(server, client)
            client.close()

    asyncio.run(run())


async def read(client: Direct, url: str, start: int, end: int) -> bytes | None:
    """What it gives, each piece copied before the next; None when the answer is another."""
    pieces: list[bytes] = []
    found = await client.get(url, start, end, lambda piece: pieces.append(bytes(piece)))
    return b"".join(pieces) if found else None


@pytest.mark.parametrize("answer", [right, by_and_by, letter_by_letter])
def test_the_bytes_come_whole_and_in_order_on_one_connection(answer: Answer) -> None:
    async def test(server: Server, client: Direct) -> None:
        for start, end in ((0, 1), (5, 1000), (100, len(DATA)), (0, direct.PIECE_BYTES)):
            server.answers = [answer]
            assert await read(client, server.url, start, end) == DATA[start:end]
        assert server.connections == 1
        first = server.questions[0].split("\r\n")
        assert first[0] == "GET /bucket/a%20b?X-Sign=1 HTTP/1.1"
        assert first[1].startswith("Host: localhost:")
        assert "Range: bytes=0-0" in first

    asked(test)


def test_requests_at_the_same_time_have_a_connection_each() -> None:
    async def test(server: Server, client: Direct) -> None:
        ranges = [(n * 1000, n * 1000 + 500) for n in range(20)]
        found = await asyncio.gather(*(read(client, server.url, a, b) for a, b in ranges))
        assert found == [DATA[a:b] for a, b in ranges]
        assert server.connections == 20
        assert await read(client, server.url, 0, 9) == DATA[:9]
        assert server.connections == 20

    asked(test)


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_not_the_plain_answer_is_told_and_its_connection_is_not_used_again(name: str) -> None:
    async def test(server: Server, client: Direct) -> None:
        server.answers = [other(OTHERS[name])]
        assert await read(client, server.url, 10, 5000) is None
        assert await read(client, server.url, 10, 5000) == DATA[10:5000]
        assert server.connections == 2

    asked(test)


def test_an_answer_that_breaks_off_is_an_error_of_the_connection() -> None:
    async def test(server: Server, client: Direct) -> None:
        server.answers = [cut]
        with pytest.raises(ConnectionError, match="closed before the end of the answer"):
            await read(client, server.url, 0, 100_000)
        assert await read(client, server.url, 0, 100_000) == DATA[:100_000]

    asked(test)


def test_a_connection_that_the_server_closed_while_it_was_idle_is_made_again_at_once() -> None:
    async def test(server: Server, client: Direct) -> None:
        server.answers = [last, right, closed]
        for _ in range(3):
            assert await read(client, server.url, 0, 100) == DATA[:100]
        assert server.connections == 3

    asked(test)


def test_a_new_connection_that_is_closed_without_an_answer_is_an_error() -> None:
    async def test(server: Server, client: Direct) -> None:
        server.answers = [closed]
        with pytest.raises(ConnectionError):
            await read(client, server.url, 0, 100)

    asked(test)


def test_bytes_that_nobody_asked_for_are_not_taken_for_the_next_answer() -> None:
    async def test(server: Server, client: Direct) -> None:
        server.answers = [too_much]
        for start in (0, 50, 90):
            assert await read(client, server.url, start, start + 2000) in (DATA[start : start + 2000], None)
        assert await read(client, server.url, 7, 70) == DATA[7:70]

    asked(test)


def test_a_cancelled_read_leaves_no_half_answer_for_the_next_one() -> None:
    async def test(server: Server, client: Direct) -> None:
        server.answers = [never]
        reading = asyncio.create_task(read(client, server.url, 0, 100))
        while not server.questions:
            await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await read(client, server.url, 200, 300) == DATA[200:300]

    asked(test)


def test_an_error_of_who_takes_the_bytes_is_not_taken_for_one_of_the_connection() -> None:
    def refuse(piece: memoryview) -> None:
        raise ZeroDivisionError

    async def test(server: Server, client: Direct) -> None:
        with pytest.raises(ZeroDivisionError):
            await client.get(server.url, 0, 100, refuse)
        assert await read(client, server.url, 0, 100) == DATA[:100]

    asked(test)


def test_an_idle_connection_that_is_too_old_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "IDLE_S", -1.0)

    async def test(server: Server, client: Direct) -> None:
        for _ in range(2):
            assert await read(client, server.url, 0, 100) == DATA[:100]
        assert server.connections == 2

    asked(test)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of localhost, signed by itself; key and certificate in one file."""
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    days = str((datetime.date(2100, 1, 1) - datetime.datetime.now(datetime.UTC).date()).days)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", days]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(path), "-out", f"{path}.crt"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_an_encrypted_answer_is_read_from_a_server_that_is_trusted_and_from_no_other(certificate: Path) -> None:
    async def run() -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
        async with serving(tls) as server, asyncio.timeout(DEADLINE_S):
            for client in (Direct(f"{certificate}.crt"), Direct(None)):
                server.answers = [by_and_by]
                assert await read(client, server.url, 3, len(DATA)) == DATA[3:]
                assert await read(client, server.url, 0, 9) == DATA[:9]
                client.close()
            stranger = Direct(ssl.get_default_verify_paths().cafile or ssl.get_default_verify_paths().openssl_cafile)
            with pytest.raises(ssl.SSLCertVerificationError):
                await read(stranger, server.url, 0, 9)

    asyncio.run(run())
