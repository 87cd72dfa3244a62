"""Samples out of the bytes of a shard, as these come: each is proven by the length and CRC32C of its index record."""

from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c


class Payload(NamedTuple):
    """A sample's bytes, proven, and its size in pixels as it is to be seen (after EXIF orientation)."""

    data: bytes
    width: int
    height: int


class Damage(NamedTuple):
    """Why a sample cannot be had."""

    reason: str


Fetched = Payload | Damage
Record = tuple[int, int, int, int, int]  # an index RECORD's offset, size, crc32c, width, height
EMPTY = Damage("its place is empty")  # the sample was removed and its bytes are gone: nothing to try again
CUT_SHORT = Damage("its shard is cut short")


class Cutter:
    """Takes bytes `start` to `end` of a shard in pieces, in their order; what has come of the samples is in `samples`.

    A sample is copied out while its piece is in the processor's cache, and nothing else is kept.
    """

    def __init__(self, start: int, end: int, records: Sequence[Record]) -> None:
        self.samples: list[Fetched] = [CUT_SHORT] * len(records)
        self._records = records
        self._coming: list[int] = []  # places whose bytes are still to come, the next one last
        self._parts: list[bytes] = []  # of the next one
        self._at = last = start
        for place, record in enumerate(records):
            offset, size = record[:2]
            if size == 0:
                emptied = offset > 0 and not any(record[2:])  # by compaction, which leaves the offset and nothing else
                self.samples[place] = EMPTY if emptied else Damage("its index record is damaged")
            elif not last <= offset <= end - size:
                self.samples[place] = Damage("its index record points outside its shard")
            else:
                self._coming.append(place)
                last = offset + size
        self._coming.reverse()

    def __call__(self, piece: memoryview) -> None:
        begin, self._at = self._at, self._at + len(piece)
        while self._coming:
            offset, size, right, width, height = self._records[self._coming[-1]]
            first = max(offset - begin, 0)
            if self._at < offset + size:
                if first < len(piece):
                    self._parts.append(bytes(piece[first:]))
                return
            data = bytes(piece[first : offset + size - begin])
            if self._parts:
                data = b"".join((*self._parts, data))
                self._parts.clear()
            self.samples[self._coming.pop()] = _proven(data, right, width, height)


def _proven(data: bytes, right: int, width: int, height: int) -> Fetched:
    found = google_crc32c.value(data)
    if found != right:
        return Damage(f"its bytes have CRC32C {found:08x}, the index says {right:08x}")
    return Payload(data, width, height)
