"""Gives a rank the samples of its lanes, batch by batch, and fetches them ahead of time in the order of need.

What comes out depends only on the order, the bytes in the store and the ids given as bad; never on timing or on which
rank reads. A lane holds what is left of its current window and, as far as `prefetch_bytes` allows, the next one.

A sample that cannot be had, or that the caller hands back as undecodable, is replaced by another of its window (see
`order.places_to_try`), recorded, and not tried again. All state lives on the store's event loop.
"""

import asyncio
import heapq
import time
from collections import Counter
from collections.abc import Container, Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from data_shards.cache import Cache
from data_shards.cutter import EMPTY, Fetched, Payload
from data_shards.errors import UserError
from data_shards.fetch import Fetcher
from data_shards.index import ShardSet
from data_shards.lane_window import Chunk, LaneWindow, lay_out
from data_shards.order import Order, places_to_try
from data_shards.section import Section

T = TypeVar("T")

LIMIT_FROM_SAMPLES = 1000  # max_bad_fraction is of at least so many: one bad sample in the first batch stops nothing


class ReaderSettings(Section):
    """How samples are fetched; nothing here changes what is learned."""

    affects_results: ClassVar[bool] = False
    prefetch_bytes: PositiveInt = 4 * 2**30  # of a rank's memory: one window a lane must fit, two are of use
    cache_dir: str | None = None  # on the node's own disk, for its ranks together; None: nothing is kept
    cache_bytes: PositiveInt = 100 * 2**30  # of that disk, about
    range_bytes: PositiveInt = 12 * 2**20  # of one request at most; a chunk of about 8 MiB is one
    connections: PositiveInt = 16  # requests at the same time
    hedge: bool = True  # a second request for a range that takes far longer than others; at most one in twenty
    retry_seconds: NonNegativeFloat = 600.0  # how long a store that does not answer is asked again
    max_bad_fraction: float = Field(0.01, ge=0, le=1)  # of the samples served (counted as 1,000 at first); 0: none


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a batch, undecoded. `index` counts the samples of its lane from step 0 on.

    `width` and `height` are pixels, after EXIF orientation. `replaced` are the ids that could not be had in its place.
    """

    id: int
    lane: int
    index: int
    data: bytes
    width: int
    height: int
    replaced: tuple[int, ...]


class BadSample(NamedTuple):
    """A sample that was replaced, the step at which it was wanted, and where it lies."""

    id: int
    step: int
    reason: str
    shard: str
    place: int


class Reader:
    """The samples of `lanes` from `start_step` on; `bad` and `removed` are ids to replace without trying them.

    Raises UserError when `prefetch_bytes` is too small for one window a lane, and from `batch` and `replace` when the
    store is gone, too many samples are bad, or a sample has no replacement left.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        lanes: range,
        start_step: int,
        settings: ReaderSettings,
        bad: Iterable[int] = (),
        removed: Container[int] = (),
    ) -> None:
        self._shards, self._order, self._lanes, self._settings = shards, order, lanes, settings
        _refuse(order, lanes, settings, shards.mean_bytes)
        self._chunk_bytes = int(order.chunk_samples * shards.mean_bytes)  # before its index is known
        self.bad: list[BadSample] = []
        self._skip, self._removed = set(bad), removed
        self._step = start_step
        self._served = self._replaced = 0
        self._wait_s = 0.0
        self._held_bytes = 0
        self._windows: dict[int, list[LaneWindow]] = {lane: [] for lane in lanes}
        self._wanted: list[tuple[int, int, int, Chunk]] = []  # a heap: index of need, lane, slot
        self._changed = asyncio.Condition()
        self._error: BaseException | None = None
        self._workers: list[asyncio.Task[None]] = []
        self._calls: set[Future[Any]] = set()
        cache = Cache(Path(settings.cache_dir), settings.cache_bytes) if settings.cache_dir else None
        self._fetcher = Fetcher(shards, settings.range_bytes, settings.retry_seconds, cache, settings.hedge)
        self._store_retries = shards.store.counters.retries
        self._wait(self._start())

    def batch(self, step: int) -> list[Sample]:
        """This rank's samples of a step, by lane, then by index. Steps are asked for one after the other.

        Blocks until they are there. Raises the error of a fetch as soon as there is one, also of a later step's.
        """
        if step != self._step:
            raise ValueError(f"step {step} was asked for, step {self._step} is next")
        begun = time.monotonic()
        samples = self._wait(self._batch(step))
        self._wait_s += time.monotonic() - begun
        return samples

    def replace(self, sample: Sample, reason: str) -> Sample:
        """The next replacement of a sample that cannot be decoded; records it. May be called for any past batch."""
        return self._wait(self._replace(sample, reason))

    @property
    def counters(self) -> dict[str, float]:
        """Since the start: seconds that `batch` waited, requests, bytes, retries, samples, what the cache had.

        `hedged`: second requests for what another was slow to give. And at present: windows, bytes held, in flight.
        """
        return {
            "bytes_read": self._fetcher.bytes_read,
            "requests": self._fetcher.requests,
            "retries": self._fetcher.retries + self._shards.store.counters.retries - self._store_retries,
            "hedged": self._fetcher.hedged,
            "wait_s": self._wait_s,
            "served": self._served,
            "replaced": self._replaced,
            "bad": len(self.bad),
            "windows": sum(map(len, self._windows.values())),
            "held_bytes": self._held_bytes,
            "in_flight": self._fetcher.in_flight,
            "cache_hits": self._fetcher.cache_hits,
            "cache_misses": self._fetcher.cache_misses,
            "cache_bytes": self._fetcher.cache_bytes,
        }

    def close(self) -> None:
        """Stop fetching and forget what is held; `batch` and `replace` raise from then on, also where they wait."""
        if self._error is None or self._workers:
            self._shards.store.submit(self._stop()).result()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self._shards.store.submit(coroutine)
        self._calls.add(future)
        try:
            result: T = future.result()
        except CancelledError:
            raise RuntimeError("the reader is closed") from None
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits for it any longer
            raise
        finally:
            self._calls.discard(future)
        return result

    # From here on: on the store's event loop.

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._workers = [loop.create_task(self._work()) for _ in range(self._settings.connections)]
        for _ in range(2):
            for lane in self._lanes:
                await self._open(lane)
                await asyncio.sleep(0)  # the first lanes' requests are on their way while the others are laid out

    async def _stop(self) -> None:
        self._fail(RuntimeError("the reader is closed"))
        for call in list(self._calls):
            call.cancel()
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._workers.clear()
        self._fetcher.close()
        self._windows = {lane: [] for lane in self._lanes}
        self._wanted.clear()
        self._held_bytes = 0

    def _fail(self, error: BaseException) -> None:
        """Nobody waits for a fetch that will not come."""
        self._error = self._error or error
        for held in (held for windows in self._windows.values() for held in windows):
            for chunk in held.chunks.values():
                chunk.fail(self._error)

    async def _open(self, lane: int) -> None:
        """Lay out the lane's next window (at the start the one that the first step needs) and want its chunks."""
        index = self._windows[lane][-1].end if self._windows[lane] else self._step * self._order.lane_batch
        held = lay_out(self._order, lane, index)
        loop = asyncio.get_running_loop()
        for slot, need in held.needs(index):
            held.chunks[slot] = Chunk(held.window.chunks[slot], loop.create_future(), self._chunk_bytes)
            heapq.heappush(self._wanted, (need, lane, slot, held.chunks[slot]))
        self._windows[lane].append(held)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _work(self) -> None:
        """Fetch what is needed soonest, again and again; several of these run at the same time."""
        while self._error is None:
            async with self._changed:
                await self._changed.wait_for(self._may_fetch)
                wanted = heapq.heappop(self._wanted)
            need, _, _, chunk = wanted
            try:
                await self._measure(chunk)
                if self._fits(need, chunk.held_bytes):
                    await self._fetch(chunk)
                else:
                    heapq.heappush(self._wanted, wanted)
            except Exception as error:  # noqa: BLE001  whatever it is, batch() raises it
                self._fail(error)

    def _may_fetch(self) -> bool:
        return bool(self._wanted) and self._fits(self._wanted[0][0], self._wanted[0][3].held_bytes)

    def _fits(self, need: int, size: int) -> bool:
        """What the step at hand needs is fetched whatever it takes, everything else while there is memory for it."""
        needed = need < (self._step + 1) * self._order.lane_batch
        return needed or self._held_bytes + size <= self._settings.prefetch_bytes

    async def _measure(self, chunk: Chunk) -> None:
        if not chunk.sized:
            chunk.held_bytes = await self._fetcher.size(chunk.first_id, self._order.chunk_samples)
            chunk.sized = True

    async def _fetch(self, chunk: Chunk) -> None:
        if chunk.passed:  # all of its samples were listed as bad
            return
        chunk.fetched = True
        self._held_bytes += chunk.held_bytes
        samples = await self._fetcher.samples(chunk.first_id, self._order.chunk_samples)
        if chunk.passed:
            return
        self._held_bytes -= chunk.held_bytes
        chunk.arrive(samples)
        self._held_bytes += chunk.held_bytes

    async def _batch(self, step: int) -> list[Sample]:
        count = self._order.lane_batch
        indices = range(step * count, (step + 1) * count)
        await self._notify()  # this step may need what there was no memory for
        samples = [
            self._at_hand(lane, index) or await self._sample(lane, index, ())
            for lane in self._lanes
            for index in indices
        ]
        self._step = step + 1
        self._served += len(samples)
        self._replaced += sum(1 for sample in samples if sample.replaced)
        for lane in self._lanes:
            while self._windows[lane][0].end <= indices.stop:
                self._forget(self._windows[lane].pop(0))
                await self._open(lane)
        await self._notify()  # memory that has become free
        return samples

    def _forget(self, held: LaneWindow) -> None:
        for chunk in held.chunks.values():
            chunk.passed = True
            self._held_bytes -= chunk.held_bytes if chunk.fetched else 0

    async def _replace(self, sample: Sample, reason: str) -> Sample:
        self._record(sample.id, sample.index // self._order.lane_batch, reason)
        self._replaced += not sample.replaced
        return await self._sample(sample.lane, sample.index, (*sample.replaced, sample.id))

    def _holding(self, lane: int, index: int) -> LaneWindow | None:
        for held in self._windows[lane]:  # nearly always the first
            if held.window.first_index <= index < held.end:
                return held
        return None

    def _at_hand(self, lane: int, index: int) -> Sample | None:
        """The sample of a place if it is here and good, as nearly all are: no coroutine for each of thousands."""
        held = self._holding(lane, index)
        if held is None or self._error is not None:
            return None
        place = index - held.window.first_index
        chunk, offset = held.chunks.get(held.slots[place]), held.offsets[place]
        if chunk is None or not chunk.ready.done():
            return None
        sample = self._order.follow(chunk.first_id, offset)
        if sample in self._skip or sample in self._removed:
            return None
        found = self._take(chunk, offset)
        return Sample(sample, lane, index, *found, ()) if found else None

    def _take(self, chunk: Chunk, offset: int) -> Payload | None:
        found = chunk.take(offset)
        self._held_bytes -= len(found.data) if found else 0
        return found

    async def _sample(self, lane: int, index: int, replaced: tuple[int, ...]) -> Sample:
        """The sample of a place of the order, or the first replacement after those in `replaced` that can be had."""
        held = self._holding(lane, index) or lay_out(self._order, lane, index)
        place, size = index - held.window.first_index, held.window.size
        for there in islice(places_to_try(place, size), len(replaced), None):
            slot, offset = held.slots[there], held.offsets[there]
            sample = self._order.follow(held.window.chunks[slot], offset)
            if sample not in self._skip and sample not in self._removed:
                found = await self._payload(held.chunks.get(slot), offset, sample, own=not replaced)
                if isinstance(found, Payload):
                    return Sample(sample, lane, index, *found, replaced)
                if found is not EMPTY:
                    self._record(sample, index // self._order.lane_batch, found.reason)
            replaced = (*replaced, sample)
        raise UserError(
            f"{self._shards.store.url}: sample {replaced[0]} and the other {size - 1} of its window are all bad, the "
            f"last in {self._where(replaced[-1])[0]}; repair the set, or take more chunks a window (data.window_chunks)"
        )

    async def _payload(self, chunk: Chunk | None, offset: int, sample: int, own: bool) -> Fetched:
        """A sample of a chunk; by itself when the chunk is not wanted for more, or has given the sample away.

        So too one that stands in for another, out of a chunk that waits for memory: only the next steps make room.
        """
        if self._error is not None:
            raise self._error
        if chunk is not None and (own or chunk.fetched):
            samples = chunk.ready.result() if chunk.ready.done() else await asyncio.shield(chunk.ready)
            found = samples[offset]
            if own:
                self._take(chunk, offset)
            if found is not None:
                return found
        return (await self._fetcher.samples(sample, 1))[0]

    def _record(self, sample: int, step: int, reason: str) -> None:
        """Note a bad sample. Raises UserError when there are too many of them."""
        if sample not in self._skip:
            self._skip.add(sample)
            self.bad.append(BadSample(sample, step, reason, *self._where(sample)))
        allowed = self._settings.max_bad_fraction * max(self._served, LIMIT_FROM_SAMPLES)
        if len(self.bad) > allowed:
            worst = Counter(bad.shard for bad in self.bad).most_common(3)
            raise UserError(
                f"{self._shards.store.url}: {len(self.bad)} bad samples among the first {self._served} of this rank, "
                f"more than reader.max_bad_fraction ({self._settings.max_bad_fraction:g}) allows; most in "
                f"{', '.join(f'{shard} ({count})' for shard, count in worst)}; the last: {reason}"
            )

    def _where(self, sample: int) -> tuple[str, int]:
        shard, place = self._shards.locate(sample)
        return self._shards.shard_name(shard), place


def _refuse(order: Order, lanes: range, settings: ReaderSettings, sample_bytes: float) -> None:
    """Raise UserError when one window a lane does not fit in memory, or no lane is read."""
    if not lanes or lanes[-1] >= order.lanes:
        raise ValueError(f"lanes {lanes} of {order.lanes}")
    needed = int(len(lanes) * order.window_samples * sample_bytes)
    if needed > settings.prefetch_bytes:
        raise UserError(
            f"reader.prefetch_bytes: {settings.prefetch_bytes:,} bytes are too few for one window of each of "
            f"{len(lanes)} lanes ({order.window_chunks} chunks of {order.chunk_samples} samples of "
            f"{sample_bytes:,.0f} bytes); {needed} would do, {2 * needed} is of use, or more ranks"
        )
