"""Background processes of this machine: free ports, starting, looking whether they run, stopping.

A process is known by its id and the time at which it started, so that an id that the kernel gave to another process
since is never taken for ours. A zombie does not count as running.
"""

import contextlib
import fcntl
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PORTS = range(20000, 32000)  # below the range from which Linux takes the ports of outgoing connections


@dataclass(frozen=True)
class Process:
    """A process by its id and its start, in clock ticks since boot (field 22 of /proc/PID/stat)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process that has this id now; None when there is none or only a zombie."""
        try:
            fields = _stat(pid)
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def running(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it is still there."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):  # gone since
                os.kill(self.pid, number)

    def name(self) -> str:
        """The name of its program; empty when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text().strip()
        except OSError:
            return ""

    def parent(self) -> "Process | None":
        """The process that started it, or took it over; None when one of them is gone."""
        try:
            return Process.of(int(_stat(self.pid)[1]))
        except OSError:
            return None

    def environment(self) -> dict[str, str]:
        """The environment that it was started with; empty when it is gone or another user's."""
        try:
            pairs = Path(f"/proc/{self.pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return {}
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def processes() -> Iterator[Process]:
    """All of this machine that run."""
    for entry in Path("/proc").iterdir():
        process = Process.of(int(entry.name)) if entry.name.isdigit() else None
        if process is not None:
            yield process


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on, the state. Raises OSError when there is no such process."""
    # The name, in brackets, may hold spaces and brackets itself: what counts comes after the last one.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start `command` in a session of its own, out of reach of our terminal's Ctrl-C; its output goes to `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    streams = [
        (os.POSIX_SPAWN_DUP2, source, target) for source, target in ((null, 0), (descriptor, 1), (descriptor, 2))
    ]
    try:
        pid = os.posix_spawn(command[0], list(command), environment, file_actions=streams, setsid=True)
    finally:
        os.close(descriptor)
        os.close(null)
    return Process.of(pid) or Process(pid, -1)


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.05) -> bool:
    """Ask until it is so or the time is up; returns whether it is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def gone(process: Process) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)  # our own child would stay as a zombie
    return not process.running()


def stop(process: Process, timeout_s: float = 15.0) -> None:
    """Ask it to end (SIGTERM), end it when it does not in time (SIGKILL), and return when it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if gone(process):
            return
        process.send(number)
        wait_until(lambda: gone(process), timeout_s)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """`count` neighbouring free ports; the place is drawn, so that two that look at once seldom meet."""
    for first in random.sample(PORTS[:-count], k=200):
        if all(is_free(port) for port in range(first, first + count)):
            return list(range(first, first + count))
    raise OSError(f"no {count} neighbouring free ports between {PORTS[0]} and {PORTS[-1]}")


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold the lock of this file: two `make` at once start one server, not two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
