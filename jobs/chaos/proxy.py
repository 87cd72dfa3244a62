"""A TCP proxy before a store, which can be told to misbehave, for all connections at once."""

import contextlib
import socket
import struct
import threading
import time
from typing import Literal

Mode = Literal["pass", "refuse", "cut", "slow", "silent"]
CUT_BYTES = 20_000  # of an answer pass before its connection is reset
SLOW_S = 0.05  # for each piece of up to 64 KiB
PIECE = 65536


class Proxy:
    """Listens on loopback, at `url`. pass: as if it were not there; refuse: resets; cut: answers end early; slow;
    silent: takes requests and does not answer."""  # fmt: skip

    def __init__(self, server_url: str) -> None:
        host, _, port = server_url.removeprefix("http://").partition(":")
        self._server = (host, int(port))
        self._mode: Mode = "pass"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        for connection in list(self._open):  # those that idle in a pool too
            _reset(connection)

    def close(self) -> None:
        self._listener.close()
        self.mode = "refuse"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client, self._mode), daemon=True).start()

    def _serve(self, client: socket.socket, mode: Mode) -> None:
        if mode == "refuse":
            _reset(client)
            return
        self._open.add(client)
        with client, contextlib.suppress(OSError):
            if mode == "silent":
                while client.recv(PIECE):
                    pass
                return
            with socket.create_connection(self._server) as server:
                threading.Thread(target=_pump, args=(client, server, "pass"), daemon=True).start()
                _pump(server, client, mode)
        self._open.discard(client)


def _pump(source: socket.socket, target: socket.socket, mode: Mode) -> None:
    passed = 0
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE):
            if mode == "slow":
                time.sleep(SLOW_S)
            if mode == "cut" and passed + len(data) > CUT_BYTES:
                target.sendall(data[: CUT_BYTES - passed])
                _reset(target)
                return
            target.sendall(data)
            passed += len(data)
        target.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """End it with an RST, as a machine that vanishes does, instead of in good order."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
