"""Brings samples out of shards: ranged reads, each sample proven by the length and CRC32C of the index.

A store that does not answer is asked again; bytes that are wrong are asked for again, three times in all, and then the
sample is damaged. Nothing here knows of steps, lanes or batches. Everything runs on the store's event loop.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_shards.cache import Cache, Part, cache_name
from data_shards.cutter import EMPTY, Cutter, Damage, Fetched, Payload, Record
from data_shards.index import RECORD, ShardSet, Span
from data_shards.store import NotFound, Store, Truncated, Unavailable

T = TypeVar("T")
Ask = Callable[[], Coroutine[Any, Any, T]]  # a request

TRIES = 3
BLOCK_RECORDS = 2048  # of the index are read at once (48 KiB): a small set's whole shard, under 1 % of a large set
BLOCKS = 64  # are kept
BLOCK = 512  # bytes, of which a tar is made
HEDGE_LOOK_S = 0.5  # how often a request that is not answered is looked at: none is hedged sooner
HEDGE_TIMES = 2.0  # the 95th percentile of the last requests of its kind, and a second one is asked for
HEDGE_KNOWN = 10  # requests of its kind, at least
HEDGE_SHARE = 0.05  # of all requests at most are second ones: a store that is overloaded is not asked for much more
LARGE = 2**20  # bytes; a request of so many is of another kind than one for a piece of an index


class Fetcher:
    """Fetches samples by id. Counts what it asked the store for; the store's counters have what went over the wire."""

    def __init__(
        self,
        shards: ShardSet,
        range_bytes: int,
        retry_seconds: float,
        cache: Cache | None = None,
        hedge: bool = False,
    ) -> None:
        self.requests = self.in_flight = self.retries = 0
        self.hedged = 0  # requests for what another was asked for already
        self.bytes_read = 0  # from the store
        self.cache_hits = self.cache_misses = 0  # ranges that were there whole, and those that were not
        self.cache_bytes = 0  # read from there
        self._cache = cache
        self._shards = shards
        self._range_bytes = range_bytes
        self._retry_seconds = retry_seconds
        self._hedge = hedge
        self._took: dict[bool, deque[float]] = {large: deque(maxlen=100) for large in (False, True)}  # seconds
        self._blocks: OrderedDict[tuple[int, int], asyncio.Task[bytes]] = OrderedDict()

    async def samples(self, first_id: int, count: int) -> list[Fetched]:
        """`count` samples with consecutive ids, which may pass from one shard to the next and from the last id to 0.

        Raises Unavailable when the store has not answered for `retry_seconds`, Denied and the like at once.
        """
        spans = [await self._span(span) for span in self._shards.spans(first_id, count)]
        return [sample for span in spans for sample in span]

    async def size(self, first_id: int, count: int) -> int:
        """Bytes of `count` samples with consecutive ids, by their index; 0 for those of which it cannot be read."""
        found = 0
        for span in self._shards.spans(first_id, count):
            with contextlib.suppress(NotFound, Truncated):
                found += int((await self._records(span.shard, span.first, span.count))["size"].sum())
        return found

    def close(self) -> None:
        for task in self._blocks.values():
            task.cancel()
        self._blocks.clear()

    async def _span(self, span: Span) -> list[Fetched]:
        try:
            records = await self._records(span.shard, span.first, span.count)
        except (NotFound, Truncated) as error:
            return [Damage(f"no index of its shard ({error})")] * span.count
        found: list[Fetched] = []
        starts = records["offset"]
        for start, end in ranges(starts.tolist(), (starts + records["size"]).tolist(), self._range_bytes):
            found += await self._range(span.shard, span.first + start, records[start:end])
        return found

    async def _range(self, shard: int, first: int, records: NDArray[np.void]) -> list[Fetched]:
        """The samples `first` and following of a shard by one read; those that are wrong again, each alone."""
        start, end = int(records[0]["offset"]), int(records[-1]["offset"] + records[-1]["size"])
        end = self._inside(shard, start, end)
        plain = records.tolist()  # numpy's own numbers cost more than the checksum
        cutter, fresh = Cutter(start, end, plain), list[Part]()
        try:
            if self._cache is None:
                cutter = await self._fed(shard, start, end, plain)
            else:
                cutter, fresh = await self._cached(self._cache, shard, start, end, plain)
        except NotFound as error:
            return [Damage(f"its shard is missing ({error})")] * len(records)
        except Truncated:
            pass
        found = cutter.samples
        wrong = [(i, one) for i, one in enumerate(found) if isinstance(one, Damage) and one is not EMPTY]
        for i, damage in wrong:
            found[i] = await self._again(shard, first + i, damage)
        if self._cache is not None and not wrong:
            for part in fresh:
                await asyncio.to_thread(self._cache.put, self._cache_name(shard), part.start, part.data or b"")
        return found

    async def _fed(self, shard: int, start: int, end: int, records: Sequence[Record]) -> Cutter:
        """A cutter that has got bytes `start` to `end` of a shard."""
        store, path = self._shards.tar(shard)
        ask = partial(store.feed, path, start, end, lambda: Cutter(start, end, records))
        return await self._asked(end - start, ask)

    async def _cached(
        self, cache: Cache, shard: int, start: int, end: int, records: Sequence[Record]
    ) -> tuple[Cutter, list[Part]]:
        """The same by way of the cache, and those parts of the bytes that the store had to give.

        What is kept begins with the first sample's header in the tar and ends with the padding of the last, so that
        ranges of neighbouring samples leave no gap between them.
        """
        if end <= start:
            return Cutter(start, end, records), []
        start, end = max(0, start - BLOCK), min(-(-end // BLOCK) * BLOCK, self._shards.manifest.shard_bytes[shard])
        parts = await asyncio.to_thread(cache.parts, self._cache_name(shard), start, end)
        fresh = []
        for i, part in enumerate(parts):
            if part.data is None:
                data = await self._read(*self._shards.tar(shard), part.start, part.end)
                parts[i] = Part(part.start, part.end, data)
                fresh.append(parts[i])
        self.cache_hits += not fresh
        self.cache_misses += bool(fresh)
        self.cache_bytes += end - start - sum(part.end - part.start for part in fresh)
        cutter = Cutter(start, end, records)
        for part in parts:
            cutter(memoryview(part.data or b""))
        return cutter, fresh

    def _cache_name(self, shard: int) -> str:
        store, path = self._shards.tar(shard)
        manifest = self._shards.manifest
        return cache_name(store.url, path, manifest.layout_id, manifest.contents_id, manifest.shard_bytes[shard])

    async def _again(self, shard: int, place: int, wrong: Damage) -> Fetched:
        """A sample whose bytes were wrong once, by itself; its index record too may have been what was wrong."""
        for _ in range(TRIES - 1):
            self.retries += 1
            self._blocks.pop((shard, place // BLOCK_RECORDS), None)
            try:
                # not from the cache: what is there may be what was wrong
                record = (await self._records(shard, place, 1))[0].item()
                start = record[0]
                end = self._inside(shard, start, start + record[1])
                if self._cache is not None:
                    await asyncio.to_thread(self._cache.drop, self._cache_name(shard), start, end)
                (sample,) = (await self._fed(shard, start, end, [record])).samples
            except NotFound as error:
                return Damage(f"its shard is missing ({error})")
            except Truncated as error:
                wrong = Damage(f"its shard is cut short ({error})")
                continue
            if isinstance(sample, Payload) or sample is EMPTY:
                return sample
            wrong = sample
        return wrong

    def _inside(self, shard: int, start: int, end: int) -> int:
        """`end`, unless a damaged index makes it so wrong that nothing should be read at all."""
        return end if start <= end <= self._shards.manifest.shard_bytes[shard] else start

    async def _records(self, shard: int, first: int, count: int) -> NDArray[np.void]:
        blocks = range(first // BLOCK_RECORDS, (first + count - 1) // BLOCK_RECORDS + 1)
        data = b"".join([await self._block(shard, block) for block in blocks])
        skipped = first - blocks[0] * BLOCK_RECORDS
        return np.frombuffer(data, dtype=RECORD)[skipped : skipped + count]

    async def _block(self, shard: int, block: int) -> bytes:
        """A part of a shard's index. Who comes second waits for the read of the first."""
        key = (shard, block)
        task = self._blocks.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            first = block * BLOCK_RECORDS
            end = min(first + BLOCK_RECORDS, self._shards.manifest.shard_samples[shard])
            read = self._read(*self._shards.index(shard), first * RECORD.itemsize, end * RECORD.itemsize)
            task = self._blocks[key] = asyncio.get_running_loop().create_task(read)
        self._blocks.move_to_end(key)
        while len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        data: bytes = await asyncio.shield(task)
        return data

    async def _read(self, store: Store, path: str, start: int, end: int) -> bytes:
        return await self._asked(end - start, partial(store.read, path, start, end))

    async def _asked(self, size: int, ask: Ask[T]) -> T:
        """A range, asked for until `retry_seconds` are over; the store itself asks again within its own limit."""
        begun = time.monotonic()
        while True:
            try:
                answer = await self._soonest(size, ask)
            except Unavailable:
                if time.monotonic() - begun >= self._retry_seconds:
                    raise
                self.retries += 1
            else:
                self.bytes_read += size
                return answer
            await asyncio.sleep(min(1.0, self._retry_seconds / 10))

    async def _soonest(self, size: int, ask: Ask[T]) -> T:
        """A range, by one request, or by a second one too when the first takes far longer than those before it."""
        took, begun = self._took[size >= LARGE], time.monotonic()
        asked, pending = 1, {asyncio.ensure_future(self._counted(ask))}
        try:
            while True:
                look = HEDGE_LOOK_S if self._hedge and asked == 1 else None
                done, pending = await asyncio.wait(pending, timeout=look, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    if not (pending and task.exception()):  # the last one's error is the range's
                        if asked == 1:
                            took.append(time.monotonic() - begun)
                        return task.result()
                if not done and self._late(time.monotonic() - begun, took):
                    self.hedged, asked = self.hedged + 1, 2
                    pending.add(asyncio.ensure_future(self._counted(ask)))
        finally:
            for task in pending:
                task.cancel()

    def _late(self, seconds: float, took: deque[float]) -> bool:
        """Whether a request has taken so long that a second one is worth it, and there are few enough of these."""
        known = len(took) >= HEDGE_KNOWN and self.hedged < HEDGE_SHARE * self.requests
        return known and seconds > HEDGE_TIMES * sorted(took)[int(0.95 * len(took))]

    async def _counted(self, ask: Ask[T]) -> T:
        self.requests += 1
        self.in_flight += 1
        try:
            return await ask()
        finally:
            self.in_flight -= 1


def ranges(starts: Sequence[int], ends: Sequence[int], most_bytes: int) -> Iterator[tuple[int, int]]:
    """Consecutive samples that are read at once, as (first, end): up to so many bytes, but at least one sample."""
    first = 0
    for i in range(1, len(starts) + 1):
        if i == len(starts) or ends[i] - starts[first] > most_bytes:
            yield first, i
            first = i
