"""Packing by a plan: each source is read once, checked, and written; a shard is done when its commit record is there.

Groups of shards are dealt to processes here and to machines elsewhere (jobs.pack_array); nobody needs to know of the
others. A shard that two write at the same time is written twice with the same bytes. Killed at any moment, what is
committed is not done again, and what is not is done anew.
"""

import json
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa

from data_shards.images import Photo, Refused, Rules, examine
from data_shards.merge import Commit, Refusal, save_group
from data_shards.plan import Asked, Plan
from data_shards.processes import unordered
from data_shards.progress import Progress, quiet
from data_shards.shard import Written, write_shard
from data_shards.sources import Source, read_source
from data_shards.store import NotFound, Store

READERS = 8  # threads of a process that read sources
READ_TOGETHER = 4  # sources that one of them reads before it hands them over
READ_AHEAD_BYTES = 256 * 2**20  # above that, and what is on its way, a source is read when its turn comes

Count = Callable[[int, bool], None]  # bytes of a source, and whether it was refused


class Stopped(Exception):
    """Another process failed, so this one leaves what it does."""


class Tally:
    """What was done since the start, counted over processes: images, bytes of sources, refused.

    Looking and stopping take no lock: a process that died while it counted would have it for ever.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._counts, self._lock = context.RawArray("q", 4), context.Lock()

    def add(self, size: int, refused: bool) -> None:
        """Raises Stopped when `stop` was called anywhere."""
        with self._lock:
            if self._counts[3]:
                raise Stopped
            for place, more in enumerate((1, size, int(refused))):
                self._counts[place] += more

    def stop(self) -> None:
        self._counts[3] = 1

    def read(self) -> tuple[int, int, int]:
        images, size, refused = self._counts[:3]
        return images, size, refused


def pack_groups(store: Store, plan: Plan, groups: Sequence[int], workers: int, progress: Progress = quiet) -> None:
    """Pack these groups of shards, over processes when there are several workers, and leave a summary of each.

    Raises UserError, the first that any of them met, after all have stopped.
    """
    tally = Tally()
    shards = [shard for group in groups for shard in plan.group_shards(group)]
    total, done = sum(map(plan.shard_sources, shards)), _committed(store, plan, set(shards))

    def tell() -> None:
        images, size, refused = tally.read()
        progress("images", done + images, total, bytes=size, refused=refused)

    def count_and_tell(size: int, refused: bool) -> None:
        tally.add(size, refused)
        tell()

    tell()
    pack = partial(pack_group, store, plan, tally.add if workers > 1 else count_and_tell)
    for _ in unordered(pack, groups, workers, tell, tally.stop):
        pass
    tell()


def pack_group(store: Store, plan: Plan, count: Count, group: int) -> None:
    """Pack what is left to do of a group of shards. Raises UserError when a store fails, and what `count` raises."""
    if store.exists(plan.summary_path(group)):
        return
    columns, parts = plan.load_sources(store, group)
    commits = (
        _find_commit(store, plan, shard) or _pack_shard(store, plan, count, shard, sources, columns)
        for shard, sources in zip(plan.group_shards(group), parts, strict=True)
    )
    save_group(store, plan, group, commits)


def _pack_shard(
    store: Store, plan: Plan, count: Count, shard: int, sources: Iterable[Source], columns: pa.Schema | None
) -> Commit:
    refused: list[Refusal] = []

    def accepted() -> Iterator[tuple[Source, Photo]]:
        for source, data in _read_ahead(sources, plan.asked):
            found = data if isinstance(data, Refusal) else _examine(source, data, plan.asked.settings)
            count(0 if isinstance(data, Refusal) else len(data), isinstance(found, Refusal))
            if isinstance(found, Refusal):
                refused.append(found)
            else:
                yield source, found

    written = write_shard(shard, accepted(), store, columns, plan.asked.settings.dali_index)
    store.put(plan.commit_path(shard), json.dumps((written, refused)).encode())
    return Commit(written, refused)


def _examine(source: Source, data: bytes, rules: Rules) -> Photo | Refusal:
    try:
        return examine(data, rules)
    except Refused as refused:
        return Refusal(source.name, refused.reason, refused.detail)


def _read(source: Source, asked: Asked) -> bytes | Refusal:
    try:
        return read_source(source, asked.settings.max_bytes, skip_unreachable=asked.options.skip_unreachable)
    except Refused as refused:
        return Refusal(source.name, refused.reason, refused.detail)


class _Ahead:
    """Reads sources before their turn, in threads; knows how many bytes of them wait."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._bytes, self._lock = asked, 0, threading.Lock()

    def read(self, sources: Sequence[Source]) -> list[bytes | Refusal | None]:
        """None for those that there is no room for."""
        return [self._read(source) if self._bytes < READ_AHEAD_BYTES else None for source in sources]

    def _read(self, source: Source) -> bytes | Refusal:
        data = _read(source, self._asked)
        self._count(len(data) if isinstance(data, bytes) else 0)
        return data

    def hand_over(
        self, sources: Sequence[Source], found: Sequence[bytes | Refusal | None]
    ) -> Iterator[tuple[Source, bytes | Refusal]]:
        for source, data in zip(sources, found, strict=True):
            yield source, _read(source, self._asked) if data is None else data
        self._count(-sum(len(data) for data in found if isinstance(data, bytes)))

    def _count(self, size: int) -> None:
        with self._lock:
            self._bytes += size


def _read_ahead(sources: Iterable[Source], asked: Asked) -> Iterator[tuple[Source, bytes | Refusal]]:
    """What the sources hold, in their order; threads read a few ahead, several at a time to trouble each other less."""
    rest, waiting = iter(sources), deque[tuple[list[Source], Future[list[bytes | Refusal | None]]]]()
    ahead = _Ahead(asked)
    with ThreadPoolExecutor(READERS) as threads:
        while some := list(islice(rest, READ_TOGETHER)):
            waiting.append((some, threads.submit(ahead.read, some)))
            if len(waiting) > READERS:
                first, found = waiting.popleft()
                yield from ahead.hand_over(first, found.result())
        for some, found in waiting:
            yield from ahead.hand_over(some, found.result())


def _find_commit(store: Store, plan: Plan, shard: int) -> Commit | None:
    try:
        written, refused = json.loads(store.get(plan.commit_path(shard)))
    except NotFound:
        return None
    return Commit(Written(*written), [Refusal(*one) for one in refused])


def _committed(store: Store, plan: Plan, shards: set[int]) -> int:
    """How many sources the finished ones of these shards had."""
    listed = store.list(f"{plan.folder}/commits")
    return sum(map(plan.shard_sources, shards & {int(Path(entry.path).stem) for entry in listed}))
