"""Samples that must not be shown any more: lists in the set's own folder that are only ever added to.

    DST/removed/000001.txt    keys of samples, one a line, sorted

A run reads them at each start and replaces what they name. They name shards and places, so they hold for every version
of a set and take away no id.
"""

import shlex
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.index import ShardSet, sample_key
from data_shards.progress import Progress, quiet
from data_shards.store import AlreadyExists

FOLDER = "removed"
MOST = 0.05  # of a set; a removed image has eight stand-ins

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Removed:
    """The samples that the lists name. Four bytes each, below 2^32 of them.

    lists: how many lists there are, of each set. hash: of the ids; empty when there are none.
    """

    ids: NDArray[Any] = field(default_factory=lambda: np.empty(0, np.uint32), compare=False)
    lists: tuple[int, ...] = ()
    hash: str = ""

    @classmethod
    def of(cls, ids: Ids, lists: Sequence[int] = ()) -> "Removed":
        ids = np.unique(ids).astype(np.int64)
        digest = blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest() if ids.size else ""
        small = ids.astype(np.uint32 if not ids.size or ids[-1] < 2**32 else np.uint64)
        return cls(small, tuple(lists), digest)

    def __contains__(self, sample: object) -> bool:
        ids, wanted = self._plain, cast(int, sample)
        place = bisect_left(ids, wanted)
        return place < len(ids) and ids[place] == wanted

    @cached_property
    def _plain(self) -> "memoryview[int]":
        """The same memory, which gives plain numbers: numpy would copy all of them to a type that fits both."""
        return self.ids.data

    def __len__(self) -> int:
        return len(self.ids)


def read_removed(shards: ShardSet, lists: Sequence[int] | None = None) -> Removed:
    """What the lists of all its sets name now, or named when there were so many `lists` of each. Raises UserError."""
    ids, read, first = [np.empty(0, np.int64)], [], 0
    for which, one in enumerate(shards.sets):
        paths = [entry.path for entry in one.store.list(FOLDER) if entry.path.endswith(".txt")]
        paths = paths if lists is None else paths[: lists[which]]
        ids += [first + _ids(one, path) for path in paths]
        read.append(len(paths))
        first += one.manifest.samples
    return Removed.of(np.concatenate(ids), read)


@dataclass(frozen=True)
class RemoveReport:
    """added: images that no list named before; removed: named by any list now; unknown: lines that name no image."""

    url: str
    added: int
    removed: int
    samples: int
    unknown: int
    path: str | None

    def summary(self) -> str:
        """One line for a terminal."""
        into = f" ({self.path})" if self.path else ""
        lost = f"; {self.unknown:,} lines name no image here" if self.unknown else ""
        return (
            f"{self.url}: {self.added:,} more images removed{into}, {self.removed:,} of {self.samples:,} in all{lost}; "
            f"runs leave them out from their next start on; make compact DST={shlex.quote(self.url)} erases their bytes"
        )


def removal(url: str, path: Path | str) -> str:
    """The command that removes from a set what a list names."""
    return f"make remove DST={shlex.quote(url)} LIST={shlex.quote(str(path))}"


def remove(
    shards: ShardSet,
    lines: Iterable[str],
    *,
    ignore_unknown: bool = False,
    force: bool = False,
    progress: Progress = quiet,
) -> RemoveReport:
    """Add to the lists what the lines name: keys, sources or sha256, mixed as they come.

    Raises UserError, with nothing written, when some name no image (unless ignored), or so many would be removed that
    a removed image's stand-ins are removed too now and then (unless forced).
    """
    from data_shards.lookup import find  # not for those who only read the lists, which every rank does

    url, found = shards.store.url, find(shards, lines, progress)
    if found.unknown and not ignore_unknown:
        shown = ", ".join(map(repr, found.examples[:3])) + (", ..." if found.unknown > 3 else "")
        raise UserError(
            f"{url}: {found.unknown:,} of {found.lines:,} lines name no image of this set ({shown}), so nothing was "
            f"removed; mend the list, or IGNORE_UNKNOWN=1"
        )
    before = read_removed(shards).ids
    added = np.setdiff1d(found.ids, before)
    total, samples = len(before) + len(added), shards.manifest.samples
    if total > MOST * samples and added.size and not force:
        raise UserError(
            f"{url}: {total:,} of {samples:,} images would be removed, {total / samples:.1%}; above {MOST:.0%} runs "
            f"read much for nothing and may find no stand-in: pack the set again without them, or FORCE=1"
        )
    path = _write(shards, added) if added.size else None
    return RemoveReport(url, len(added), total, samples, found.unknown, path)


def by_shard(shards: ShardSet, ids: Ids) -> Iterator[tuple[int, Ids]]:
    """The shards that have some of these samples, which are sorted, with their places there."""
    shard, place = shards.places(ids)
    numbers, firsts = np.unique(shard, return_index=True)
    yield from zip(numbers.tolist(), np.split(place, firsts[1:]), strict=False)  # nothing is split into one part


def _write(shards: ShardSet, ids: Ids) -> str:
    """Add a list with these samples; returns its path."""
    pairs = zip(*(numbers.tolist() for numbers in shards.places(ids)), strict=True)
    data = "".join(f"{sample_key(*pair)}\n" for pair in pairs).encode()
    for number in count(len(shards.store.list(FOLDER)) + 1):
        try:
            shards.store.put(path := f"{FOLDER}/{number:06d}.txt", data, create_only=True)
        except AlreadyExists:
            continue  # somebody else's, this moment
        return path
    raise AssertionError


def _ids(shards: ShardSet, path: str) -> Ids:
    """The ids that a list names; not those in shards that this version of the set does not have."""
    import pyarrow as pa
    from pyarrow import csv

    data = shards.store.get(path)
    columns = {"shard": pa.int64(), "place": pa.int64()}
    try:
        rows = csv.read_csv(
            pa.BufferReader(data),
            csv.ReadOptions(column_names=list(columns)),
            csv.ParseOptions(delimiter="-"),
            csv.ConvertOptions(column_types=columns),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{shards.store.url}/{path}: is no list of keys ({error}); put the right one there") from None
    shard, place = rows["shard"].to_numpy(), rows["place"].to_numpy()
    known = shard < len(shards.manifest.shard_samples)
    ids = shards.starts[shard[known]] + place[known]
    if (ids >= shards.starts[shard[known] + 1]).any():
        raise UserError(f"{shards.store.url}/{path}: names places that no shard has; put the right list there")
    return np.asarray(ids)
