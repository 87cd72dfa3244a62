"""The time of each line that a rank writes, so that the logs of all ranks can be merged.

`2026-11-23T20:15:04.123Z text`: the hosts' clocks, in UTC. What libraries in C write has no stamp and belongs to the
line before; submitit's own lines bear the local time.
"""

import datetime
import re
import sys
import threading
from typing import TextIO

_OURS = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z ")
_SUBMITITS = re.compile(r"submitit \w+ \((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})\)")


class Stamped:
    """A text stream that puts the time before each line."""

    def __init__(self, out: TextIO) -> None:
        # of this thread too: a signal's handler or a destructor may write in the midst of a line
        self._out, self._at_start, self._lock = out, True, threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            for line in text.splitlines(keepends=True):
                self._out.write(f"{_now()} {line}" if self._at_start else line)
                self._at_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._out.flush()

    def fileno(self) -> int:
        return self._out.fileno()

    def isatty(self) -> bool:
        return False


def stamp_output() -> None:
    """From now on all that Python writes in this process has the time before it."""
    sys.stdout, sys.stderr = Stamped(sys.stdout), Stamped(sys.stderr)


def parse(line: str) -> tuple[float | None, str]:
    """The time of a line (seconds since 1970) and the line without our stamp; no time for a line without one."""
    if found := _OURS.match(line):
        time = datetime.datetime.fromisoformat(f"{found[1]}+00:00").timestamp()
        return time, line[found.end() :]
    if found := _SUBMITITS.match(line):
        return datetime.datetime.fromisoformat(f"{found[1]}.{found[2]}").timestamp(), line
    return None, line


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
