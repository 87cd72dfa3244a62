"""Bytes of shards on this node's disk, so that its ranks ask the store once for what they read several times.

An entry is a byte range of a shard, in a file named by a hash of the shard's identity and by its ends; a range that is
asked for is pieced together from all entries that overlap it, since an epoch cuts its chunks elsewhere than the last.
Files are written aside and renamed, and never proven here: who reads checks the samples, and drops what is wrong. So
there is no lock, no list and nothing in shared memory that a crash could leave behind; what it leaves of a file goes by
its age. Other files in the folder are not touched. On a disk that is full or cannot be written to, what is there is
still read.

Each process counts what it writes and looks at the disk again after a 64th of the limit: W of them together keep below
15/16 + W/64 of it, and the range that each is writing.
"""

import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from data_shards.whole import HIDDEN, write_whole

FOLDER = "farseer-cache"
LEFTOVER_S = 3600.0  # a file that was not finished by then never will be
_ENTRY = re.compile(r"([0-9a-f]{32})-(\d+)-(\d+)\.bytes")


class Part(NamedTuple):
    """Bytes `start` to `end` of a shard; None where the cache does not have them."""

    start: int
    end: int
    data: bytes | None


def cache_name(*identity: str | int) -> str:
    """The name of a shard here: of another set, or of other contents, nothing is ever found."""
    return blake2b(repr(identity).encode(), digest_size=16).hexdigest()


class Cache:
    """Entries below `folder`, about `limit_bytes` of them. May be used by threads and by several processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder / FOLDER
        self._limit = limit_bytes
        self._since_trim: int | None = None  # bytes written; None: the disk was not looked at yet
        self._writes = True

    def parts(self, name: str, start: int, end: int) -> list[Part]:
        """A range in parts that follow each other, each of them here or missing."""
        found: list[Part] = []
        at = start
        for path, first, last in sorted(self._entries(name), key=lambda entry: entry[1]):
            if at < last and first < end and at < end:
                low, high = max(at, first), min(last, end)
                data = _read(path, low - first, high - low)
                if data is not None:
                    found += [Part(at, low, None)] if at < low else []
                    found.append(Part(low, high, data))
                    at = high
        return found + ([Part(at, end, None)] if at < end else [])

    def put(self, name: str, start: int, data: bytes) -> None:
        """Keep the bytes of a shard from `start` on, if the disk takes them; says once when it does not."""
        if not self._writes or len(data) > self._limit:
            return
        try:
            if self._since_trim is None or self._since_trim + len(data) > self._limit // 64:
                self._trim()
            write_whole(self._folder / name[:2] / f"{name}-{start}-{start + len(data)}.bytes", data)
        except OSError as error:
            self._writes = False
            warnings.warn(f"{self._folder}: {error.strerror}; going on without new entries", stacklevel=2)
        else:
            self._since_trim = (self._since_trim or 0) + len(data)

    def drop(self, name: str, start: int, end: int) -> None:
        """Delete the entries that overlap a range whose bytes were wrong."""
        for path, first, last in self._entries(name):
            if first < end and start < last:
                with suppress(OSError):
                    path.unlink()

    def _entries(self, name: str) -> Iterator[tuple[Path, int, int]]:
        with suppress(OSError), os.scandir(self._folder / name[:2]) as files:
            for file in files:
                match = _ENTRY.fullmatch(file.name) if file.name.startswith(name) else None
                if match is not None:
                    yield Path(file.path), int(match[2]), int(match[3])

    def _trim(self) -> None:
        """Delete the oldest entries beyond 15/16 of the limit, and what crashed writers left."""
        entries: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("??/*"):
            with suppress(OSError):  # another process may have deleted it
                found = path.stat()
                if _ENTRY.fullmatch(path.name):
                    entries.append((found.st_mtime, found.st_size, path))
                elif path.name.startswith(HIDDEN) and time.time() - found.st_mtime > LEFTOVER_S:
                    path.unlink()
        held = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if held <= self._limit * 15 // 16:
                break
            path.unlink(missing_ok=True)
            held -= size
        self._since_trim = 0


def _read(path: Path, offset: int, size: int) -> bytes | None:
    """Bytes of an entry; None when it is gone or short, which a full disk or a power cut can make of it."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) == size:
            return data
        path.unlink(missing_ok=True)
    except OSError:
        pass
    return None
