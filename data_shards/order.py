"""Which sample is seen at which step: a pure function of (layout, seed, step), and its inverse.

Memory and time do not depend on the number of samples. Nothing here reads data, and of ranks it only knows which lanes
they own.

A *chunk* is Q consecutive sample ids. An epoch is all chunks in an order of its own, starting at an id of its own;
epochs follow each other in one endless stream of chunks, which is dealt to L *lanes*. A lane shuffles its samples
inside *windows* of G chunks; a batch takes B/L samples of each lane. In arithmetic, with E = floor(N/Q):

    stream place s = epoch e, place t    e = s div E, t = s mod E
    chunk there                          first id (start(e) + permutation(e)(t) * Q) mod N
    lane l, its chunk c                  s = c * L + l
    window w of lane l                   its chunks from max(0, w*G - h) to (w+1)*G - h, with h = l*G div L
    place p of window w                  sample u mod Q of its chunk u div Q, with u = permutation(l, w)(p)

Window 0 of most lanes is shorter: that sets the windows of the lanes l/L of a window apart. Within an epoch no sample
comes twice; where two epochs meet, one may come in both within the same windows, and seldom in the same batch.

Of several sets each has an endless stream of its own, with its own epochs; `data_shards.shares` says which set place s
of the whole stream is from, and which chunk of that set's stream it is. The L chunks of a row are then dealt to the
lanes from another lane on in each row, so that no lane gets stuck with one set. With one set nothing of this happens.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_shards.errors import UserError
from data_shards.order_limits import around, divisors, either, refuse
from data_shards.permutation import ROUNDS, Ints, Permutation, Permutations, mix, words
from data_shards.section import Section
from data_shards.shares import Schedule, schedule, whole_shares

ORDER_VERSION = 1
CHUNK_BYTES = 8 * 2**20  # one ranged read: large enough for the store's full speed, small enough to mix many
REPLACEMENTS = 8
BLOCK_STEPS = 4  # batches computed at a time: a numpy call costs as much as thousands of samples in it


class DataSource(Section):
    """One of several shard sets."""

    url: str  # of the shard set
    weight: PositiveFloat = 1.0  # its share of the samples is weight / sum of the weights


class DataSettings(Section):
    """Which shards, and in which order; everything here belongs to the fingerprint of a run."""

    url: str | None = None  # of the shard set: s3://bucket/folder, file:///folder
    sources: tuple[DataSource, ...] = ()  # of several sets; in the place of url
    batch: PositiveInt  # images a step, over all ranks
    lanes: PositiveInt  # divides batch; every world size that divides it sees the same batches
    chunk_samples: PositiveInt | None = None  # consecutive samples read as one; None: about 8 MiB
    window_chunks: PositiveInt = 64  # chunks that a lane mixes
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_or_several(self) -> "DataSettings":
        if bool(self.sources) == (self.url is not None):
            raise ValueError(
                f"give one of data.url (a shard set) and data.sources (a list of {{url, weight}}); "
                f"found {'both' if self.sources else 'neither'}"
            )
        urls = [source.url.rstrip("/") for source in self.sources]
        twice = next((url for url in urls if urls.count(url) > 1), None)
        if twice:
            raise ValueError(f"data.sources: {twice} is there twice; give it once, with the sum of the weights")
        whole_shares([source.weight for source in self.sets])
        return self

    @property
    def sets(self) -> tuple[DataSource, ...]:
        """The shard sets, whether they are one or several."""
        return self.sources or (DataSource(url=str(self.url)),)

    @property
    def shares(self) -> tuple[int, ...]:
        """Of each set, in whole numbers of chunks of the same size."""
        return whole_shares([source.weight for source in self.sets])


@dataclass(frozen=True)
class Part:
    """One of the sets of an order: `share` of all sets' shares are from it; its ids follow those of the one before."""

    samples: int
    layout_id: str
    share: int = 1
    url: str = field(default="", compare=False)  # for what is said to people


class Window(NamedTuple):
    """What a lane mixes: `size` samples, from its index `first_index` on, in chunks that start at these sample ids."""

    first_index: int
    chunks: list[int]
    size: int


@dataclass(frozen=True)
class Order:
    """The order of a run: N samples in chunks of Q, windows of G chunks, L lanes, batches of B; see the module.

    `layout_id` names the packing plan, so that another one gets another order. `parts` are the sets when they are
    several: N is the sum of theirs then, and all of them have chunks of Q. Raises UserError, with the numbers that
    would fit, when the given ones do not go together. Indices count the samples of a lane from step 0 on.
    """

    samples: int
    chunk_samples: int
    window_chunks: int
    lanes: int
    batch_size: int
    seed: int
    layout_id: str
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        refuse(self)

    @property
    def epoch_chunks(self) -> int:
        """Chunks in an epoch of each set, added up."""
        return sum(part.samples // self.chunk_samples for part in self.sets)

    @property
    def sets(self) -> tuple[Part, ...]:
        """The parts; of a single set, itself."""
        return self.parts or (Part(self.samples, self.layout_id),)

    @property
    def lane_batch(self) -> int:
        """Samples that a batch takes of each lane."""
        return self.batch_size // self.lanes

    @property
    def window_samples(self) -> int:
        """The size of every window but the first of a lane, which may be smaller."""
        return self.window_chunks * self.chunk_samples

    @property
    def steps_per_epoch(self) -> float:
        return self.epoch_chunks * self.chunk_samples / self.batch_size

    def batch(self, step: int) -> Ints:
        """The sample ids of a step, (L, B/L)."""
        block, place = divmod(step, BLOCK_STEPS)
        return np.array(_batches(self, block)[place])

    def place(self, lane: ArrayLike, index: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """Where indices of lanes lie: the window's number, the place in it and its size; arrays broadcast."""
        skipped = self._skipped(lane) * self.chunk_samples
        index = np.asarray(index, dtype=np.int64)
        number = (index + skipped) // self.window_samples
        missing = np.where(number == 0, skipped, 0)
        first = np.maximum(number * self.window_samples - skipped, 0)
        return number, index - first, self.window_samples - missing

    def sample(self, lane: ArrayLike, window: ArrayLike, place: ArrayLike) -> Ints:
        """The sample ids at places of windows of lanes; arrays broadcast. The windows' numbers should be close."""
        numbers = np.asarray(window, dtype=np.int64)
        windows = _windows(self, low := int(numbers.min()), int(numbers.max()))
        row, shuffled = windows.shuffled((numbers - low) * self.lanes + np.asarray(lane), place)
        slot = shuffled // self.chunk_samples
        ids = windows.chunks[row, slot] + (shuffled - slot * self.chunk_samples)
        return np.asarray(ids % self.samples if not self.parts else self._wrapped(ids, windows.sets[row, slot]))

    def follow(self, first_id: int, offset: int) -> int:
        """The id of a sample of the chunk that starts at `first_id`: after the last id of a set comes its first."""
        which = bisect_right(self._end_list, first_id)
        sample = first_id + offset
        return sample if sample < self._end_list[which] else sample - self.sets[which].samples

    def window(self, lane: int, number: int) -> Window:
        windows = _windows(self, number, number)
        size = int(windows.shuffles.sizes[lane])
        first = max(0, number * self.window_samples - int(self._skipped(lane)) * self.chunk_samples)
        return Window(first, windows.chunks[lane, : size // self.chunk_samples].tolist(), size)

    def slots(self, lane: int, number: int, place: ArrayLike) -> tuple[Ints, Ints]:
        """Of places of one window: which of its chunks, and which sample of that chunk."""
        _, shuffled = _windows(self, number, number).shuffled(lane, place)
        return shuffled // self.chunk_samples, shuffled % self.chunk_samples

    def replacement(self, lane: int, index: int, k: int) -> int:
        """The k-th sample (1 to 8) to try in place of a bad one: of the same window, but not of its neighbourhood."""
        number, place, size = (int(value) for value in self.place(lane, index))
        return int(self.sample(lane, number, replacement_place(place, size, k)))

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes of a rank. Raises UserError, naming what is legal, when they do not divide among the ranks."""
        if self.lanes % world_size:
            legal = divisors(self.lanes)
            near = [lanes for lanes in around(self.lanes, world_size) if self.batch_size % lanes == 0]
            hint = f'; for {world_size} ranks: SET="data.lanes={near[0]}" in a new run' if near else ""
            raise UserError(
                f"data.lanes: {self.lanes} does not divide among {world_size} ranks; {either(legal)} ranks would{hint}"
            )
        share = self.lanes // world_size
        return range(rank * share, (rank + 1) * share)

    def seen(self, sample: int, last_step: int) -> list[tuple[int, int, int]]:
        """Where the order puts a sample up to and including `last_step`: (step, lane, index), by step.

        Costs a hash an epoch. Does not know of samples that were replaced.
        """
        which = int(np.searchsorted(self._ends, sample, side="right"))
        size = self.sets[which].samples
        epoch_chunks = size // self.chunk_samples
        sample -= int(self._ends[which]) - size
        found: list[tuple[int, int, int]] = []
        for epoch in range(self._last_epoch(which, last_step) + 1):
            start, chunks = _epoch(self, which, epoch)
            chunk, offset = divmod((sample - start) % size, self.chunk_samples)
            if chunk < epoch_chunks:
                own = epoch * epoch_chunks + int(chunks.inverse(chunk))
                found.append(self._step_of(self._schedule.slot(which, own), offset))
        return sorted(place for place in found if place[0] <= last_step)

    def _step_of(self, stream: int, offset: int) -> tuple[int, int, int]:
        """(step, lane, index) of a sample of the chunk at that place of the stream."""
        chunk, place = divmod(stream, self.lanes)
        lane = (place - int(self._turn(chunk))) % self.lanes
        skipped = int(self._skipped(lane))
        number = (chunk + skipped) // self.window_chunks
        first = max(0, number * self.window_chunks - skipped)
        shuffled = (chunk - first) * self.chunk_samples + offset
        shuffles = _windows(self, number, number).shuffles
        place = int(shuffles.inverse(np.array([lane]), np.array([shuffled]))[0])
        index = first * self.chunk_samples + place
        return index // self.lane_batch, lane, index

    def _last_epoch(self, which: int, last_step: int) -> int:
        """The last epoch of a set of which a chunk can be in a window that a lane has entered by that step."""
        chunk = (last_step + 1) * self.lane_batch // self.chunk_samples + self.window_chunks
        own = self._schedule.count(which, (chunk + 1) * self.lanes)
        return own // (self.sets[which].samples // self.chunk_samples)

    @cached_property
    def _ends(self) -> Ints:
        """After the last id of each set."""
        return np.cumsum([part.samples for part in self.sets], dtype=np.int64)

    @cached_property
    def _end_list(self) -> list[int]:
        return list(self._ends.tolist())

    @property
    def _schedule(self) -> Schedule:
        return schedule(tuple(part.share for part in self.sets))

    def _wrapped(self, ids: Ints, which: Ints) -> Ints:
        """Ids that ran over the end of their set."""
        ends = self._ends[which]
        return np.where(ids < ends, ids, ids - np.array([part.samples for part in self.sets])[which])

    def _turn(self, row: ArrayLike) -> Ints:
        """Which lane gets the first chunk of rows of the stream, counted backwards; lane 0 when there is one set."""
        rows = np.asarray(row, dtype=np.int64)
        if not self.parts:
            return np.zeros_like(rows)
        word = mix(rows.reshape(-1).astype(np.uint64) ^ words(_hash(self, self.layout_id, "turn"))[0])
        return (word % np.uint64(self.lanes)).astype(np.int64).reshape(rows.shape)

    def _skipped(self, lane: ArrayLike) -> Ints:
        """By how many chunks window 0 of a lane is shorter."""
        return np.asarray(lane, dtype=np.int64) * self.window_chunks // self.lanes


def make_order(
    settings: DataSettings, samples: int, sample_bytes: float, layout_id: str, parts: tuple[Part, ...] = ()
) -> Order:
    """The order that a config asks for on a set of `samples` samples of `sample_bytes` bytes on average.

    parts: the sets, when they are several.
    """
    chunk = settings.chunk_samples or propose_chunk_samples(sample_bytes)
    return Order(
        samples, chunk, settings.window_chunks, settings.lanes, settings.batch, settings.seed, layout_id, parts
    )


def propose_chunk_samples(sample_bytes: float) -> int:
    """How many samples of that many bytes on average (with their tar header) make a chunk of about 8 MiB."""
    return max(1, round(CHUNK_BYTES / max(sample_bytes, 1.0)))


def replacement_place(place: int, size: int, k: int) -> int:
    """The place of a window to try as the k-th (1 to 8) in place of `place`."""
    return (place + k * size // 2 + k * k) % size


def places_to_try(place: int, size: int) -> Iterator[int]:
    """`place` itself, its 8 replacements, which are few different ones in a small window, then all others of it."""
    first = [place, *(replacement_place(place, size, k) for k in range(1, REPLACEMENTS + 1))]
    yield from first
    yield from (there for n in range(1, size) if (there := (place + n) % size) not in first)


@dataclass(frozen=True)
class _Windows:
    """Some windows of every lane, a row each: the first ids of its chunks (rows, G), their sets, and its shuffle."""

    chunks: Ints
    sets: Ints
    shuffles: Permutations

    def shuffled(self, row: ArrayLike, place: ArrayLike) -> tuple[Ints, Ints]:
        """Rows, and the samples at places in those windows, counted in the chunks' order; broadcast to one shape."""
        rows, places = np.broadcast_arrays(np.asarray(row, dtype=np.int64), np.asarray(place, dtype=np.int64))
        return rows, self.shuffles.forward(rows.reshape(-1), places.reshape(-1)).reshape(places.shape)


@lru_cache(maxsize=8)
def _windows(order: Order, low: int, high: int) -> _Windows:
    """Windows `low` to `high`; row (number - low) * L + lane."""
    number, lane = (part.reshape(-1) for part in np.mgrid[low : high + 1, : order.lanes])
    skipped = order._skipped(lane)
    first = np.maximum(number * order.window_chunks - skipped, 0)
    rows = first[:, None] + np.arange(order.window_chunks)
    stream = rows * order.lanes + (lane[:, None] + order._turn(rows)) % order.lanes
    sizes = (order.window_chunks - np.where(number == 0, skipped, 0)) * order.chunk_samples
    key = words(_hash(order, order.layout_id, "window"))
    tweak = mix(mix(lane.astype(np.uint64) + key[ROUNDS]) + number.astype(np.uint64) + key[ROUNDS + 1])
    return _Windows(*_first_ids(order, stream), Permutations(sizes, mix(key[:ROUNDS, None] ^ tweak)))


@lru_cache(maxsize=4)
def _batches(order: Order, block: int) -> Ints:
    """The sample ids of BLOCK_STEPS steps, (steps, L, B/L)."""
    step = block * BLOCK_STEPS + np.arange(BLOCK_STEPS)[:, None, None]
    lane = np.arange(order.lanes)[:, None]
    number, place, _ = order.place(lane, step * order.lane_batch + np.arange(order.lane_batch))
    return order.sample(lane, number, place)


def _first_ids(order: Order, stream: Ints) -> tuple[Ints, Ints]:
    """The first sample ids of the chunks at those places of the stream, and which sets they are from."""
    sets, own = order._schedule.chunk(stream)
    ids = np.empty_like(stream)
    for which, part in enumerate(order.sets):
        of_set = sets == which
        epoch, place = np.divmod(own, part.samples // order.chunk_samples)
        for one in np.unique(epoch[of_set]).tolist():
            start, chunks = _epoch(order, which, one)
            here = of_set & (epoch == one)
            ids[here] = (start + chunks(place[here]) * order.chunk_samples) % part.samples
        ids[of_set] += order._ends[which] - part.samples
    return ids, sets


@lru_cache(maxsize=64)
def _epoch(order: Order, which: int, epoch: int) -> tuple[int, Permutation]:
    """The id, within its set, that an epoch of a set starts from, and the order of its chunks."""
    part = order.sets[which]
    start = int.from_bytes(_hash(order, part.layout_id, "start", epoch)[:16], "little") % part.samples
    return start, Permutation(part.samples // order.chunk_samples, _hash(order, part.layout_id, "chunks", epoch))


def _hash(order: Order, layout_id: str, *parts: str | int) -> bytes:
    """64 bytes. All parts are hashed together: seed 43 in epoch 0 has nothing in common with seed 42 in epoch 1."""
    text = json.dumps(["farseer order", ORDER_VERSION, layout_id, order.seed, *parts])
    return blake2b(text.encode()).digest()
