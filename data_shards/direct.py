"""Ranged GETs whose bytes are handed on as they come, on connections that are kept.

aiohttp copies a body three times into fresh memory, and s3fs and botocore take 2 ms for a request. Here a piece is used
while it is in the processor's cache, and then its memory is used again. What is asked for is a signed url. Only the
plain answer is understood, the right bytes with their length; for all others (errors, redirects, chunked bodies) there
is the ordinary client.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

PIECE_BYTES = 2**19  # handed on at once, at most; the head of an answer too
IDLE_S = 10.0  # S3 closes a connection that nobody uses for longer

Peer = tuple[str, int, bool]  # host, port, encrypted
Take = Callable[[memoryview], object]  # gets pieces in their order; each is good only until it returns


class Direct:
    """Connections of one event loop. ca_file: certificates to trust; None: the server's is not checked."""

    def __init__(self, ca_file: str | None) -> None:
        self._ca_file = ca_file
        self._tls: ssl.SSLContext | None = None
        self._idle: dict[Peer, list[_Connection]] = {}

    async def get(self, url: str, start: int, end: int, take: Take) -> bool:
        """Give the bytes `start` to `end` (exclusive) of what is at a url to `take`; False when the answer is another.

        Raises OSError when the answer is not whole; `take` has got a part of it then. May be cancelled.
        """
        parts = urlsplit(url)
        port = 443 if parts.scheme == "https" else 80
        peer = (parts.hostname or "", parts.port or port, parts.scheme == "https")
        host, target = parts.netloc.removesuffix(f":{port}"), f"{parts.path}?{parts.query}"
        fields = (
            f"Host: {host}\r\nUser-Agent: farseer\r\nRange: bytes={start}-{end - 1}\r\nAccept-Encoding: identity\r\n"
        )
        question = f"GET {target} HTTP/1.1\r\n{fields}\r\n".encode()
        while True:
            connection, used_before = await self._connection(peer)
            try:
                right = await connection.ask(question, start, end, take)
            except ConnectionError:
                if used_before and not connection.answered:
                    continue  # the server had closed it meanwhile
                raise
            finally:
                if not connection.reusable:
                    connection.abort()
            if connection.reusable:
                self._idle.setdefault(peer, []).append(connection)
            return right

    def close(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()

    async def _connection(self, peer: Peer) -> "tuple[_Connection, bool]":
        """One that is idle, the last one used first, or a new one; and whether it was used before."""
        idle = self._idle.get(peer, [])
        while idle:
            connection = idle.pop()
            if connection.open and time.monotonic() - connection.since < IDLE_S:
                return connection, True
            connection.abort()
        host, port, encrypted = peer
        if encrypted and self._tls is None:
            self._tls = await asyncio.to_thread(_context, self._ca_file)  # it reads files
        tls = self._tls if encrypted else None
        loop = asyncio.get_running_loop()
        _, fresh = await loop.create_connection(_Connection, host, port, ssl=tls, happy_eyeballs_delay=0.25)
        return fresh, False


def _context(ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    if ca_file is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class _Connection(asyncio.BufferedProtocol):
    """One connection: one question at a time."""

    def __init__(self) -> None:
        self.open = True
        self.answered = False  # something of the present answer has come
        self.reusable = False
        self.since = 0.0  # when it became idle, monotonic
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bool] | None = None
        self._take: Take = len
        self._start = self._end = 0  # of the bytes that are asked for
        self._piece = memoryview(bytearray(PIECE_BYTES))
        self._filled = 0  # of the piece, by the head
        self._left: int | None = None  # bytes of the body that are still to come; None before the head is complete
        self._closes = False  # the server closes the connection after this answer

    async def ask(self, question: bytes, start: int, end: int, take: Take) -> bool:
        """Whether the answer is the bytes `start` to `end`, which `take` has got. Raises ConnectionError."""
        self._start, self._end, self._take = start, end, take
        self.answered = self.reusable = False
        self._filled, self._left = 0, None
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None or not self.open:
            raise ConnectionResetError("the server has closed the connection")
        self._transport.write(question)
        return await self._answer

    def abort(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._piece[self._filled :] if self._left is None else self._piece[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        if self._answer is None or self._answer.done():
            self.abort()  # it speaks without being asked
            return
        self.answered = True
        try:
            if self._left is None:
                self._filled += nbytes
                self._read_head()
            else:
                self._hand_on(self._piece[:nbytes])
        except Exception as error:  # noqa: BLE001 - asyncio would take it for an error of the connection
            self._answer.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            reason = error or "closed before the end of the answer"
            self._answer.set_exception(ConnectionResetError(f"the connection was lost: {reason}"))

    def _hand_on(self, bytes_of_body: memoryview) -> None:
        assert self._left is not None
        self._take(bytes_of_body)
        self._left -= len(bytes_of_body)
        if not self._left:
            self._finish(True)

    def _read_head(self) -> None:
        """Once the head is complete, go on with the body; a head of another answer ends it here."""
        head, blank, _ = bytes(self._piece[: self._filled]).partition(b"\r\n\r\n")
        begun = self._piece[len(head) + len(blank) : self._filled]
        if not blank and self._filled < PIECE_BYTES:
            return
        if not blank or not self._is_right(head.decode("latin-1")) or len(begun) > self._end - self._start:
            self._finish(False)
            return
        self._left = self._end - self._start
        self._hand_on(begun)

    def _is_right(self, head: str) -> bool:
        status, *lines = head.split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._closes = fields.get("connection", "").lower() == "close"
        plain = status.split(" ")[1:2] == ["206"] and "transfer-encoding" not in fields
        place = fields.get("content-range", "").startswith(f"bytes {self._start}-{self._end - 1}/")
        return plain and place and fields.get("content-length") == str(self._end - self._start)

    def _finish(self, right: bool) -> None:
        self.reusable = right and not self._closes
        self.since = time.monotonic()
        self._filled, self._left = 0, None  # room for what should not come
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(right)
