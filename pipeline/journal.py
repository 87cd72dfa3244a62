"""Lines of a run: rows of metrics and events, in a local file at once, in the store by and by.

Object stores cannot append, so lines go up in numbered segments; readers join them. Needs no torch: what looks at runs
is there at once.
"""

import bisect
import itertools
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_shards.store import Store

TAIL_BYTES = 64 * 1024  # many rows
TAIL_SEGMENTS = 10  # of events: some hours of a long run
_SEGMENT = re.compile(r"\w+/a(\d+)-(\d+)\.jsonl")


class Journal:
    """JSON lines: to a local file at once, to the store in numbered segments.

    A segment that the store did not confirm is put again as it was, under its number, so that an answer that was lost
    doubles nothing. How many bytes of the local file the store has stands beside it, in `.sent`; when that is older
    than the truth, lines go up a second time, and readers drop the copies. Never waits for the store but in `upload`.
    """

    def __init__(self, local: Path, store: Store, prefix: str) -> None:
        self.local, self.store, self.prefix = local, store, prefix
        self._segment = 1
        self._unconfirmed = b""  # the segment of that number
        self._unconfirmed_end = 0  # in the local file, bytes
        self._pending: list[bytes] = []
        self._end = 0
        self._lines, self._uploads = threading.Lock(), threading.Lock()

    def append(self, line: dict[str, Any]) -> dict[str, Any]:
        """Take one object; returns it as it was written, with None for numbers that JSON does not have.

        The file is closed each time, which shows the line to other machines of a shared disk. A disk that refuses does
        not stop anything: the line goes to the store alone.
        """
        kept: dict[str, Any] = json.loads(json.dumps(line), parse_constant=lambda name: None)
        text = json.dumps(kept).encode() + b"\n"
        with self._lines:
            self._pending.append(text)
            try:
                append_whole(self.local, text)
                self._end = self.local.stat().st_size
            except OSError as error:
                warnings.warn(f"{error}; lines go to the store only", stacklevel=2)
        return kept

    def take_up(self) -> None:
        """Hold as pending the lines of the local file, of another process, that the store does not have."""
        sent = self._sent_path()
        start = int(text) if sent.exists() and (text := sent.read_text()) else 0
        with self._lines:
            self._pending = [line + b"\n" for line, _ in _lines(self.local, start)]
            self._end = self.local.stat().st_size if self._pending else 0

    def upload(self) -> None:
        """Put the pending lines as the next segment; kept for the next call when the store refuses them."""
        with self._uploads:
            while self._freeze():
                self.store.put(f"{self.prefix}-{self._segment:06d}.jsonl", self._unconfirmed)
                self._segment += 1
                self._unconfirmed = b""
                with suppress(OSError):
                    self._sent_path().write_text(str(self._unconfirmed_end))

    def _freeze(self) -> bool:
        """Whether there is a segment to put; what is pending becomes one when there was none."""
        with self._lines:
            if not self._unconfirmed:
                self._unconfirmed, self._unconfirmed_end = b"".join(self._pending), self._end
                self._pending.clear()
        return bool(self._unconfirmed)

    def _sent_path(self) -> Path:
        return self.local.with_suffix(".sent")


def append_whole(path: Path, lines: bytes) -> None:
    """Append whole lines to a file whose last one a full disk may have cut. Raises OSError."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut + lines)


def read_lines(path: Path, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, or of its end; a line that was cut is left out, a missing file has none."""
    return [value for _, value in _lines(path, -tail_bytes if tail_bytes is not None else 0)]


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file; None when it has none, or there is no file."""
    return next(reversed(read_lines(path, TAIL_BYTES)), None)


def attempt_folders(folder: Path) -> dict[int, Path]:
    """By their numbers, the lowest first, what a run's attempts have in its folder on the shared disk."""
    return dict(sorted((int(path.name[1:]), path) for path in folder.glob("a[0-9]*") if path.name[1:].isdigit()))


def read_events(store: Store) -> list[dict[str, Any]]:
    """All events of a run, oldest first."""
    return sorted(_stored_lines(store, "events"), key=lambda event: float(event["time"]))


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """The rows of a run, one a step."""
    rows = list(_stored_lines(store, "metrics"))
    return [rows[n] for n in standing((row["run"]["attempt"], row["result"]["step"]) for row in rows)]


def standing(rows: Iterable[tuple[int, int]]) -> list[int]:
    """Which of all rows count, one a step: where an attempt began again, the rows of those before it end.

    rows: attempt and step of each, in any order. Returns their places, in the order of the steps.
    """
    numbered = {place: n for n, place in enumerate(rows)}
    first, ends, end = dict[int, int](), dict[int, float](), math.inf
    for attempt, step in numbered:
        first[attempt] = min(step, first.get(attempt, step))
    for attempt in sorted(first, reverse=True):
        ends[attempt] = end
        end = min(end, first[attempt])
    stand = {step: n for (attempt, step), n in numbered.items() if step < ends[attempt]}
    return [n for _, n in sorted(stand.items())]


def newest_events(store: Store) -> tuple[list[dict[str, Any]], list[int]]:
    """What a run told of last, oldest first, and its attempts that told of anything: a long run told of much.

    These are its last segments, how its last two attempts began, and all that its jobs told of.
    """
    paths = [entry.path for entry in store.list("events")]
    segments = _numbered(paths)
    first = {attempt: path for path, (attempt, _) in reversed(segments.items())}
    chosen = {*list(first.values())[:2], *list(segments)[-TAIL_SEGMENTS:], *(set(paths) - set(segments))}
    return sorted(_lines_of(store, chosen), key=lambda event: float(event["time"])), sorted(first)


def newest_rows(store: Store, attempts: Sequence[int]) -> list[dict[str, Any]]:
    """The rows that the store got last, of these attempts: those of the newest segment."""
    numbers = ((attempt, _last_segment(store, attempt)) for attempt in reversed(attempts))
    newest = next((_segment(*one) for one in numbers if one[1]), None)
    return list(_lines_of(store, [newest])) if newest is not None else []


def _last_segment(store: Store, attempt: int) -> int:
    """Its number, 0 when there is none. Searched for by halves: a list has thousands after some days."""

    def missing(number: int) -> bool:
        return not store.exists(_segment(attempt, number))

    high = next(1 << n for n in itertools.count() if missing(1 << n))
    return bisect.bisect_left(range(high), True, lo=high // 2 + 1, key=missing) - 1


def _segment(attempt: int, number: int) -> str:
    return f"metrics/a{attempt:02d}-{number:06d}.jsonl"


def _numbered(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Attempt and number of the segments among them, the oldest first."""
    found = {path: _SEGMENT.fullmatch(path) for path in paths}
    numbers = {path: (int(match[1]), int(match[2])) for path, match in found.items() if match is not None}
    return dict(sorted(numbers.items(), key=lambda one: one[1]))


def _stored_lines(store: Store, folder: str) -> Iterator[dict[str, Any]]:
    """All that there are."""
    return _lines_of(store, [entry.path for entry in store.list(folder)])


def _lines_of(store: Store, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """All at once; a line that was sent twice comes once."""
    waiting = [store.submit(store.read(path)) for path in paths]
    lines = dict.fromkeys(line for segment in waiting for line in segment.result().splitlines())
    return map(json.loads, lines)


def _lines(path: Path, start: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file, and what each holds. start: a byte, from the end if it is negative."""
    try:
        with path.open("rb") as file:
            file.seek(start if start >= 0 else max(0, start + path.stat().st_size))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    yield from whole_lines(lines)


def whole_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Those that hold an object, and what it is: of a machine that lost its power a line may be cut."""
    for line in lines:
        with suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                yield line, value
