"""A TCP proxy between a client and the real S3 server, on which things go wrong."""

import contextlib
import re
import socket
import threading
import time

_REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"\r\nRange: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)
_AFTER = {"cut": 50_000, "torn": 50_000, "wrong": 30_000, "slow": 20_000}  # bytes of an answer, its head with them


def _answer(status: str, body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def _cause(code: str) -> str:
    return f"<Error><Key>x</Key><Code>{code}</Code><Message>so says the proxy</Message></Error>"


def _error(status: str, code: str) -> bytes:
    return _answer(status, _cause(code))


_ANSWERS = {
    "unwell": _answer("503 Slow Down"),
    "a page": _answer("502 Bad Gateway", "<html>"),
    "expired": _error("403 Forbidden", "ExpiredToken"),
    "expired, as of AWS": _error("400 Bad Request", "ExpiredToken"),
    "bare 400": _answer("400 Bad Request"),
    "throttled": _error("400 Bad Request", "ThrottlingException"),
    "no upload": _error("404 Not Found", "NoSuchUpload"),
    "no condition": _error("501 Not Implemented", "NotImplemented"),
    "not deleted": _answer("200 OK", f"<DeleteResult>{_cause('InternalError')}</DeleteResult>"),
}


class Wire:
    """Passes requests on. `faults`: what happens to the next of them, one each, "" for nothing; then to no more.

    Requests count when the pattern `struck` is found in them, as `requests` has them.

    reset      the connection is closed before an answer
    unwell     503;  a page: a proxy's 502 with HTML;  expired: 403 ExpiredToken;  others: see _ANSWERS
    cut        the answer ends after 50 kB, and with it the connection;  torn: the same, by a reset
    wrong      a byte of the answer's body is another one
    late       the answer begins `delay_s` later
    slow       the answer stalls for `delay_s` after 20 kB
    silence    there is no answer at all
    half       a put's body does not arrive;  lost: what was put is stored, its answer does not arrive
    """

    def __init__(self, server_url: str, delay_s: float = 0.0) -> None:
        host, _, port = server_url.removeprefix("http://").partition(":")
        self.server = (host, int(port))
        self.delay_s = delay_s
        self.faults: list[str] = []
        self.struck = ""
        self.requests: list[str] = []  # "GET /bucket/key?..."
        self.gone = False
        self._sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """The server is gone for good, also for those who are connected."""
        self.gone = True
        self.listener.close()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                if self.gone:  # a close does not end an accept that waits
                    client.close()
                    return
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self.server) as server:
            self._sockets.append(server)
            _Connection(self, client, server).requests()


class _Connection:
    """One connection of a client, and the fault of the request that is on it."""

    def __init__(self, wire: Wire, client: socket.socket, server: socket.socket) -> None:
        self.wire, self.client, self.server = wire, client, server
        self.fault = ""
        self.answered = 0  # bytes of the present answer
        threading.Thread(target=self.answers, daemon=True).start()

    def requests(self) -> None:
        """Pass on what the client says, until it or a fault ends it."""
        while data := self.client.recv(65536):
            if found := _REQUEST.match(data):
                self.wire.requests.append(b" ".join(found.groups()).decode())
                self.fault = self.next_fault(data) if re.search(self.wire.struck, self.wire.requests[-1]) else ""
                self.answered = 0
            if self.fault in _ANSWERS:
                self.client.sendall(_ANSWERS[self.fault])
                break
            if self.fault == "reset":
                break
            if self.fault == "half" and not found:
                break
            if self.fault != "silence":
                self.server.sendall(data)
        self.end()

    def next_fault(self, head: bytes) -> str:
        """One that strikes in the middle of an answer waits for a request whose answer is long enough."""
        faults = self.wire.faults
        asked = _RANGE.search(head) if faults else None
        if asked and int(asked[2]) - int(asked[1]) < _AFTER.get(faults[0], 0):
            return ""
        return faults.pop(0) if faults else ""

    def answers(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.server.recv(65536):
                if not self.pass_on(data):
                    break
        self.end()

    def pass_on(self, data: bytes) -> bool:
        """Some bytes of an answer; whether the connection goes on."""
        before, self.answered = self.answered, self.answered + len(data)
        at = _AFTER.get(self.fault, 0) - before
        if self.fault == "lost" and not data.startswith(b"HTTP/1.1 100"):
            return False
        if self.fault in ("cut", "torn") and len(data) >= at:
            self.client.sendall(data[: max(at, 0)])
            if self.fault == "torn":
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return False
        if self.fault == "wrong" and 0 <= at < len(data):
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if (self.fault == "late" and not before) or (self.fault == "slow" and 0 <= at < len(data)):
            self.client.sendall(data[:at])
            data = data[at:]
            time.sleep(self.wire.delay_s)
        self.client.sendall(data)
        return True

    def end(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
