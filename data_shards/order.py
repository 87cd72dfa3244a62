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
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from pydantic import NonNegativeInt, PositiveInt

from data_shards.errors import UserError
from data_shards.permutation import MAX_SIZE, ROUNDS, Ints, Permutation, Permutations, mix, words
from data_shards.section import Section

__all__ = ["ORDER_VERSION", "DataSettings", "Order", "Permutation", "Window", "make_order", "propose_chunk_samples"]

ORDER_VERSION = 1
CHUNK_BYTES = 8 * 2**20  # one ranged read: large enough for the store's full speed, small enough to mix many
REPLACEMENTS = 8
BLOCK_STEPS = 4  # batches computed at a time: a numpy call costs as much as thousands of samples in it


class DataSettings(Section):
    """Which shards, and in which order; everything here belongs to the fingerprint of a run."""

    url: str  # of the shard set: s3://bucket/folder, file:///folder
    batch: PositiveInt  # images a step, over all ranks
    lanes: PositiveInt  # divides batch; every world size that divides it sees the same batches
    chunk_samples: PositiveInt | None = None  # consecutive samples read as one; None: about 8 MiB
    window_chunks: PositiveInt = 64  # chunks that a lane mixes
    seed: NonNegativeInt = 0


class Window(NamedTuple):
    """What a lane mixes: `size` samples, from its index `first_index` on, in chunks that start at these sample ids."""

    lane: int
    number: int
    first_index: int
    chunks: list[int]
    size: int


@dataclass(frozen=True)
class Order:
    """The order of a run: N samples in chunks of Q, windows of G chunks, L lanes, batches of B; see the module.

    `layout_id` names the packing plan, so that another one gets another order. Raises UserError, with the numbers that
    would fit, when the given ones do not go together. Indices count the samples of a lane from step 0 on.
    """

    samples: int
    chunk_samples: int
    window_chunks: int
    lanes: int
    batch_size: int
    seed: int
    layout_id: str

    def __post_init__(self) -> None:
        _refuse(self)

    @property
    def epoch_chunks(self) -> int:
        return self.samples // self.chunk_samples

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
        offset = shuffled - slot * self.chunk_samples
        return np.asarray((windows.chunks[row, slot] + offset) % self.samples)

    def window(self, lane: int, number: int) -> Window:
        windows = _windows(self, number, number)
        size = int(windows.shuffles.sizes[lane])
        first = max(0, number * self.window_samples - int(self._skipped(lane)) * self.chunk_samples)
        return Window(lane, number, first, windows.chunks[lane, : size // self.chunk_samples].tolist(), size)

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
            legal = _divisors(self.lanes)
            around = [lanes for lanes in _around(self.lanes, world_size) if self.batch_size % lanes == 0]
            hint = f'; for {world_size} ranks: SET="data.lanes={around[0]}" in a new run' if around else ""
            raise UserError(
                f"data.lanes: {self.lanes} does not divide among {world_size} ranks; {_either(legal)} ranks would{hint}"
            )
        share = self.lanes // world_size
        return range(rank * share, (rank + 1) * share)

    def seen(self, sample: int, last_step: int) -> list[tuple[int, int, int]]:
        """Where the order puts a sample up to and including `last_step`: (step, lane, index), by step.

        Costs a hash an epoch. Does not know of samples that were replaced.
        """
        found: list[tuple[int, int, int]] = []
        for epoch in range(self._last_epoch(last_step) + 1):
            start, chunks = _epoch(self, epoch)
            chunk, offset = divmod((sample - start) % self.samples, self.chunk_samples)
            if chunk < self.epoch_chunks:
                stream = epoch * self.epoch_chunks + int(chunks.inverse(chunk))
                found.append(self._step_of(stream, offset))
        return sorted(place for place in found if place[0] <= last_step)

    def _step_of(self, stream: int, offset: int) -> tuple[int, int, int]:
        """(step, lane, index) of a sample of the chunk at that place of the stream."""
        chunk, lane = divmod(stream, self.lanes)
        skipped = int(self._skipped(lane))
        number = (chunk + skipped) // self.window_chunks
        first = max(0, number * self.window_chunks - skipped)
        shuffled = (chunk - first) * self.chunk_samples + offset
        shuffles = _windows(self, number, number).shuffles
        place = int(shuffles.inverse(np.array([lane]), np.array([shuffled]))[0])
        index = first * self.chunk_samples + place
        return index // self.lane_batch, lane, index

    def _last_epoch(self, last_step: int) -> int:
        """The last epoch of which a chunk can be in a window that a lane has entered by that step."""
        chunk = (last_step + 1) * self.lane_batch // self.chunk_samples + self.window_chunks
        return (chunk + 1) * self.lanes // self.epoch_chunks

    def _skipped(self, lane: ArrayLike) -> Ints:
        """By how many chunks window 0 of a lane is shorter."""
        return np.asarray(lane, dtype=np.int64) * self.window_chunks // self.lanes


def make_order(settings: DataSettings, samples: int, sample_bytes: float, layout_id: str) -> Order:
    """The order that a config asks for on a set of `samples` samples of `sample_bytes` bytes on average."""
    chunk = settings.chunk_samples or propose_chunk_samples(sample_bytes)
    return Order(samples, chunk, settings.window_chunks, settings.lanes, settings.batch, settings.seed, layout_id)


def propose_chunk_samples(sample_bytes: float) -> int:
    """How many samples of that many bytes on average (with their tar header) make a chunk of about 8 MiB."""
    return max(1, round(CHUNK_BYTES / max(sample_bytes, 1.0)))


def replacement_place(place: int, size: int, k: int) -> int:
    """The place of a window to try as the k-th (1 to 8) in place of `place`."""
    if not 1 <= k <= REPLACEMENTS:
        raise ValueError(f"replacement {k}; there are 1 to {REPLACEMENTS}")
    return (place + k * size // 2 + k * k) % size


@dataclass(frozen=True)
class _Windows:
    """Some windows of every lane, a row each: the first ids of its chunks (rows, G), and its shuffle."""

    chunks: Ints
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
    stream = (first[:, None] + np.arange(order.window_chunks)) * order.lanes + lane[:, None]
    sizes = (order.window_chunks - np.where(number == 0, skipped, 0)) * order.chunk_samples
    key = words(_hash(order, "window"))
    tweak = mix(mix(lane.astype(np.uint64) + key[ROUNDS]) + number.astype(np.uint64) + key[ROUNDS + 1])
    return _Windows(_first_ids(order, stream), Permutations(sizes, mix(key[:ROUNDS, None] ^ tweak)))


@lru_cache(maxsize=4)
def _batches(order: Order, block: int) -> Ints:
    """The sample ids of BLOCK_STEPS steps, (steps, L, B/L)."""
    step = block * BLOCK_STEPS + np.arange(BLOCK_STEPS)[:, None, None]
    lane = np.arange(order.lanes)[:, None]
    number, place, _ = order.place(lane, step * order.lane_batch + np.arange(order.lane_batch))
    return order.sample(lane, number, place)


def _first_ids(order: Order, stream: Ints) -> Ints:
    """The first sample ids of the chunks at those places of the stream."""
    epoch, place = np.divmod(stream, order.epoch_chunks)
    ids = np.empty_like(stream)
    for one in range(int(epoch.min()), int(epoch.max()) + 1):
        start, chunks = _epoch(order, one)
        here = epoch == one
        ids[here] = (start + chunks(place[here]) * order.chunk_samples) % order.samples
    return ids


@lru_cache(maxsize=64)
def _epoch(order: Order, epoch: int) -> tuple[int, Permutation]:
    """The id that an epoch starts from, and the order of its chunks."""
    start = int.from_bytes(_hash(order, "start", epoch)[:16], "little") % order.samples
    return start, Permutation(order.epoch_chunks, _hash(order, "chunks", epoch))


def _hash(order: Order, *parts: str | int) -> bytes:
    """64 bytes. All parts are hashed together: seed 43 in epoch 0 has nothing in common with seed 42 in epoch 1."""
    text = json.dumps(["farseer order", ORDER_VERSION, order.layout_id, order.seed, *parts])
    return blake2b(text.encode()).digest()


def _refuse(order: Order) -> None:
    """Raise UserError when the numbers of an order do not go together."""
    for name in ("samples", "chunk_samples", "window_chunks", "lanes", "batch_size"):
        if getattr(order, name) < 1:
            raise UserError(f"data.{name}: found {getattr(order, name)}; it must be at least 1")
    if order.samples > MAX_SIZE:
        raise UserError(f"data.samples: found {order.samples}; a set has 2^53 at most")
    if order.batch_size % order.lanes:
        fitting = [lanes for lanes in _divisors(order.batch_size) if lanes <= 2 * order.lanes]
        raise UserError(
            f"data.lanes: {order.lanes} does not divide data.batch ({order.batch_size}); {_either(fitting[-3:])} would"
        )
    wrong = _too_small(order)
    if wrong:
        raise UserError(f"{wrong}; {_what_would_fit(order)}")


def _too_small(order: Order) -> str:
    """What the set, or a window, is too small for; empty when it is not."""
    n, q, g, lanes, batch = order.samples, order.chunk_samples, order.window_chunks, order.lanes, order.batch_size
    if lanes * g > n // q:
        return (
            f"data.window_chunks: {lanes} lanes with windows of {g} chunks need {lanes * g} chunks of {q} samples, "
            f"the set of {n} samples has {n // q}, so that a sample would meet itself in a batch"
        )
    if batch > lanes * g * q:
        return (
            f"data.batch: {batch} samples over {lanes} lanes take {batch // lanes} of each, "
            f"a window has only {g * q} ({g} chunks of {q} samples)"
        )
    return ""


def _what_would_fit(order: Order) -> str:
    """Changes of one number that would make the order of this set possible."""
    n, q, g, lanes, batch = order.samples, order.chunk_samples, order.window_chunks, order.lanes, order.batch_size
    need = -(-batch // (lanes * q))  # chunks a window must have for the batch
    candidates = {
        "window_chunks": n // q // lanes if need < g else need,
        "chunk_samples": n // (lanes * g),
        "lanes": max((some for some in _divisors(batch) if some * g * q <= n), default=0),
        "batch": lanes * g * q,
    }
    fitting = [f"{name} {value}" for name, value in candidates.items() if value and _fits(order, **{name: value})]
    if not fitting and _fits(order, chunk_samples=1, window_chunks=n // lanes):
        fitting = [f"chunk_samples 1 with window_chunks {n // lanes}"]
    if not fitting:
        return f"a batch of {batch} over {lanes} lanes needs more samples"
    return f"{fitting[0]} would" + (f" (or {', or '.join(fitting[1:])})" if fitting[1:] else "")


def _fits(order: Order, **changed: int) -> bool:
    numbers = {"chunk_samples": order.chunk_samples, "window_chunks": order.window_chunks}
    numbers |= {"lanes": order.lanes, "batch": order.batch_size, **changed}
    window = numbers["lanes"] * numbers["window_chunks"]
    chunks = order.samples // numbers["chunk_samples"]
    return 0 < window <= chunks and numbers["batch"] <= window * numbers["chunk_samples"]


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _around(number: int, factor: int) -> list[int]:
    """The multiples of `factor` next to `number`, the nearest first."""
    below = number // factor * factor
    return sorted((m for m in (below, below + factor) if m), key=lambda m: (abs(m - number), -m))


def _either(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
