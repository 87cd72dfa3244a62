"""The reader: it gives what the order says, whatever the store does, and says what it could not give."""

import asyncio
import io
import itertools
import multiprocessing
import os
import random
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.ma  # loaded late by numpy, in the middle of what a test measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.cache import Cache, cache_name
from data_shards.errors import UserError
from data_shards.index import RECORD, Manifest, ShardSet, shard_path
from data_shards.order import Order
from data_shards.reader import Reader, ReaderSettings, Sample
from data_shards.removed import Removed
from data_shards.store import Consumer, Denied, Store, Unavailable
from jobs.daemons import wait_until

SHARDS = (37, 41, 40, 3, 39)
ORDER = Order(sum(SHARDS), 5, 4, 4, 16, 7, "layout")
SETTINGS = ReaderSettings(prefetch_bytes=2**20, retry_seconds=5.0, max_bad_fraction=1.0)
names = itertools.count()

Read = Callable[[str, int | None, int | None], Awaitable[bytes]]


class Wire(Store):
    """A store with something between it and its reader: `answer` gets each read and how to make it."""

    reads: list[tuple[str, int, int]]
    answer: Callable[[Read, str, int | None, int | None], Awaitable[bytes]] | None = None

    def __init__(self, url: str) -> None:
        super().__init__(url, retry_seconds=0.2)
        self.reads = []

    async def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        self.reads.append((path, start or 0, end or 0))
        if self.answer is None:
            return await super().read(path, start, end)
        return await self.answer(super().read, path, start, end)

    async def feed(self, path: str, start: int, end: int, begin: Callable[[], Consumer]) -> Consumer:
        consumer, data = begin(), memoryview(await self.read(path, start, end))
        for at in range(0, len(data), 700):  # less than many a sample
            consumer(data[at : at + 700])
        return consumer


@dataclass
class Photos:
    """A shard set of samples of random bytes, and what they are."""

    store: Wire
    shards: ShardSet
    samples: list[tuple[bytes, int, int]]

    def where(self, sample: int) -> tuple[str, int]:
        """Path of the shard, and the byte in it at which the sample begins."""
        shard, place = self.shards.locate(sample)
        index = np.frombuffer(self.store.get(shard_path(shard).replace(".tar", ".idx")), dtype=RECORD)
        return shard_path(shard), int(index[place]["offset"])

    def damage(self, *samples: int) -> None:
        """Flip a bit of their bytes, in the store."""
        for sample in samples:
            path, offset = self.where(sample)
            data = bytearray(self.store.get(path))
            data[offset + 3] ^= 1
            self.store.put(path, bytes(data))

    def truth(self, sample: int) -> tuple[bytes, int, int]:
        return self.samples[sample]


@pytest.fixture
def photos() -> Photos:
    return photos_in(Wire(f"memory://reader-{next(names)}"))


def photos_in(
    store: Wire, largest: int = 900, sizes: list[int] | None = None, shards: tuple[int, ...] = SHARDS
) -> Photos:
    rng = random.Random(1)
    sizes = sizes or [rng.randint(largest // 20, largest) for _ in range(sum(shards))]
    samples = [(rng.randbytes(size), rng.randint(1, 9999), rng.randint(1, 9999)) for size in sizes]
    rest = iter(samples)
    lengths = []
    for number, count in enumerate(shards):
        tar, index = shard_of(list(itertools.islice(rest, count)), number)
        lengths.append(len(tar))
        store.put(shard_path(number), tar)
        store.put(shard_path(number).replace(".tar", ".idx"), index)
    manifest = Manifest("layout", "contents", sum(shards), shards, tuple(lengths), settings={}, refused={})
    return Photos(store, ShardSet(store, manifest), samples)


def shard_of(samples: list[tuple[bytes, int, int]], number: int) -> tuple[bytes, bytes]:
    buffer, index = io.BytesIO(), np.zeros(len(samples), dtype=RECORD)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (data, width, height) in enumerate(samples):
            info = tarfile.TarInfo(f"{number:06d}{i:04d}.jpg")
            info.size = len(data)
            index[i] = (buffer.tell() + 512, len(data), google_crc32c.value(data), width, height)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue(), index.tobytes()


@dataclass
class Opened:
    """Readers of a test, closed at its end."""

    photos: Photos

    def __post_init__(self) -> None:
        self.readers: list[Reader] = []

    def __call__(
        self,
        order: Order = ORDER,
        lanes: range | None = None,
        start: int = 0,
        bad: tuple[int, ...] = (),
        **changes: float,
    ) -> Reader:
        settings = SETTINGS.model_copy(update=changes)
        reader = Reader(self.photos.shards, order, lanes or range(order.lanes), start, settings, bad)
        self.readers.append(reader)
        return reader


@pytest.fixture
def opened(photos: Photos) -> Iterator[Opened]:
    made = Opened(photos)
    yield made
    for reader in made.readers:
        reader.close()


def expected(photos: Photos, order: Order, step: int, lanes: range | None = None) -> list[Sample]:
    """The samples of a step as the order has them, none of them bad."""
    found = []
    for lane in lanes or range(order.lanes):
        for i, sample in enumerate(order.batch(step)[lane].tolist()):
            found.append(Sample(sample, lane, step * order.lane_batch + i, *photos.truth(sample), ()))
    return found


def wanted_at(order: Order, step: int, lane: int, i: int) -> list[int]:
    """The sample of a place, and its replacements."""
    index = step * order.lane_batch + i
    return [int(order.batch(step)[lane, i]), *(order.replacement(lane, index, k) for k in range(1, 9))]


def drain(reader: Reader, steps: range) -> list[list[Sample]]:
    return [reader.batch(step) for step in steps]


def test_batches_are_those_of_the_order_over_several_epochs(photos: Photos, opened: Opened) -> None:
    reader = opened()
    for step in range(40):
        assert reader.batch(step) == expected(photos, ORDER, step)
    assert reader.bad == []


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(0, 10**6), st.data())
def test_any_order_is_read_from_any_step(chunk: int, window: int, lanes: int, start: int, data: st.DataObject) -> None:
    photos = shared_photos()
    batch = lanes * data.draw(st.integers(1, chunk * window))
    order = Order(160, chunk, window, lanes, batch, 3, "layout")
    one_window = -(-lanes * order.window_samples * sum(photos.shards.manifest.shard_bytes) // 160)
    changes = {"prefetch_bytes": one_window, "connections": data.draw(st.integers(1, 4)), "range_bytes": 2000}
    with Reader(photos.shards, order, range(lanes), start, SETTINGS.model_copy(update=changes)) as reader:
        for step in range(start, start + 3 * order.window_samples // order.lane_batch + 2):
            assert reader.batch(step) == expected(photos, order, step)


def shared_photos(made: list[Photos] = []) -> Photos:  # noqa: B006
    """One set for all examples of a property."""
    if not made:
        made.append(photos_in(Wire("memory://reader-shared")))
    return made[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_same_batch(photos: Photos, opened: Opened, world_size: int) -> None:
    readers = [opened(lanes=ORDER.lanes_of(rank, world_size)) for rank in range(world_size)]
    for step in range(12):
        assert [sample for reader in readers for sample in reader.batch(step)] == expected(photos, ORDER, step)


def test_a_start_far_into_a_run_reads_the_current_windows_and_no_more_than_the_next(photos: Photos) -> None:
    step = 100_003
    one_window = 4 * ORDER.window_samples * sum(photos.shards.manifest.shard_bytes) // 160
    with Reader(photos.shards, ORDER, range(4), step, SETTINGS) as reader:
        assert reader.batch(step) == expected(photos, ORDER, step)
        assert reader.counters["windows"] <= 8
        assert reader.counters["bytes_read"] < 2.2 * one_window


def test_what_the_first_batch_needs_is_asked_for_first(photos: Photos) -> None:
    """In the middle of a window, with one request at a time, and only the first chunks let through."""
    step = 10_002
    first = {int(sample) for sample in ORDER.batch(step).reshape(-1)}
    chunks = {chunk_of(ORDER, step, sample) for sample in first}
    tars = itertools.count()

    async def only_the_first(read: Read, path: str, start: int | None, end: int | None) -> bytes:
        if path.endswith(".tar") and next(tars) > 2 * len(chunks):  # a chunk may lie in two shards
            await asyncio.sleep(3600)
        return await read(path, start, end)

    photos.store.answer = only_the_first
    with Reader(photos.shards, ORDER, range(4), step, SETTINGS.model_copy(update={"connections": 1})) as reader:
        assert in_time(reader, step) == expected(photos, ORDER, step)


def chunk_of(order: Order, step: int, sample: int) -> int:
    """The first id of the chunk that a sample of that step comes from."""
    for lane, index in itertools.product(range(order.lanes), range(order.lane_batch)):
        number, place, _ = (int(value) for value in order.place(lane, step * order.lane_batch + index))
        if int(order.sample(lane, number, place)) == sample:
            slot, _ = order.slots(lane, number, place)
            return order.window(lane, number).chunks[int(slot)]
    raise AssertionError(sample)


def test_a_chunk_is_one_request_as_long_as_it_is_not_over_range_bytes(photos: Photos, opened: Opened) -> None:
    order = Order(160, 8, 5, 4, 16, 7, "layout")
    reader = opened(order)
    drain(reader, range(10))
    reader.close()  # what it reads ahead is not the other's
    whole = [end - start for path, start, end in photos.store.reads if path.endswith(".tar")]
    photos.store.reads.clear()
    small = opened(order, range_bytes=2500)
    drain(small, range(10))
    parts = [end - start for path, start, end in photos.store.reads if path.endswith(".tar")]
    assert max(whole) > 2 * 2500
    assert max(parts) <= 2500
    assert len(parts) > 2 * len(whole)


@pytest.mark.slow
def test_memory_stays_inside_the_budget_and_the_next_windows_are_fetched_when_there_is_room() -> None:
    photos = photos_in(Wire(f"memory://reader-{next(names)}"), largest=20_000)
    one_window = int(4 * ORDER.window_samples * photos.shards.mean_bytes)
    for budget, full in ((one_window + 40_000, 0.7), (3 * one_window, 1.15)):
        tracemalloc.start()
        settings = SETTINGS.model_copy(update={"prefetch_bytes": budget})
        with Reader(photos.shards, ORDER, range(4), 2, settings) as reader:
            for step in range(2, 25):
                reader.batch(step)
                held = settled(reader)
                assert full * one_window < held <= budget + one_window / 16  # a chunk: estimated by the mean
                assert held <= tracemalloc.get_traced_memory()[0] < held + 400_000
                assert reader.counters["windows"] == 8
        tracemalloc.stop()


def settled(reader: Reader) -> float:
    """The bytes held once nothing more is on its way."""
    end, before = time.monotonic() + 20, (-1.0, -1.0)
    while time.monotonic() < end:
        now = (reader.counters["requests"], reader.counters["held_bytes"])
        if now == before:
            return now[1]
        before = now
        time.sleep(0.03)
    raise AssertionError(before)


def test_a_budget_below_one_window_a_lane_is_refused_in_words(photos: Photos) -> None:
    with pytest.raises(UserError, match=r"reader.prefetch_bytes: 5,000 bytes are too few for one window of each of 4 "):
        Reader(photos.shards, ORDER, range(4), 0, SETTINGS.model_copy(update={"prefetch_bytes": 5000}))


def test_a_flipped_bit_is_tried_three_times_and_then_replaced(photos: Photos, opened: Opened) -> None:
    wrong, other = wanted_at(ORDER, 3, 1, 2)[:2]
    photos.damage(wrong)
    shard, place = photos.shards.locate(wrong)
    path, offset = photos.where(wrong)
    photos.store.reads.clear()
    reader = opened()
    batches = drain(reader, range(4))
    found = batches[3][1 * 4 + 2]
    assert found == Sample(other, 1, 3 * 4 + 2, *photos.truth(other), (wrong,))
    good = [sample for sample in expected(photos, ORDER, 3) if sample.id != wrong]
    assert [sample for sample in batches[3] if not sample.replaced] == good
    (bad,) = reader.bad
    assert (bad.id, bad.step, bad.shard, bad.place) == (wrong, 3, shard_path(shard), place)
    assert "CRC32C" in bad.reason
    tries = [read for read in photos.store.reads if read[0] == path and read[1] <= offset < read[2]]
    assert len(tries) == 3


@pytest.mark.parametrize("wrong", [1, 2])
def test_bytes_that_are_wrong_once_or_twice_and_then_right_replace_nothing(
    photos: Photos, opened: Opened, wrong: int
) -> None:
    sample = wanted_at(ORDER, 0, 0, 0)[0]
    path, offset = photos.where(sample)
    times = itertools.count()

    async def flip(read: Read, name: str, start: int | None, end: int | None) -> bytes:
        data = await read(name, start, end)
        if name == path and (start or 0) <= offset < (end or 0) and next(times) < wrong:
            data = data[: offset - (start or 0)] + b"?" + data[offset - (start or 0) + 1 :]
        return data

    photos.store.answer = flip
    reader = opened()
    assert reader.batch(0) == expected(photos, ORDER, 0)
    assert reader.bad == []
    assert reader.counters["retries"] == wrong


def test_a_wrong_index_record_that_comes_right_replaces_nothing(photos: Photos, opened: Opened) -> None:
    times = itertools.count()

    async def flip(read: Read, name: str, start: int | None, end: int | None) -> bytes:
        data = await read(name, start, end)
        return bytes(len(data)) if name.endswith(".idx") and next(times) < 1 else data

    photos.store.answer = flip
    reader = opened()
    for step in range(10):
        assert reader.batch(step) == expected(photos, ORDER, step)
    assert reader.bad == []


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_the_samples_of_a_missing_object_are_replaced(photos: Photos, opened: Opened, suffix: str) -> None:
    photos.store.delete([shard_path(1).replace(".tar", suffix)])
    missing = set(range(37, 37 + 41))
    reader = opened()
    for step in range(10):
        for found, wanted in zip(reader.batch(step), expected(photos, ORDER, step), strict=True):
            assert (found.id != wanted.id) == (wanted.id in missing)
            assert found.id not in missing
            assert (found.data, found.width, found.height) == photos.truth(found.id)
    assert {bad.id for bad in reader.bad} <= missing
    assert {bad.shard for bad in reader.bad} == {shard_path(1)}


def test_only_the_samples_behind_the_cut_of_a_shard_are_replaced(photos: Photos, opened: Opened) -> None:
    path, offset = photos.where(37 + 20)
    photos.store.put(path, photos.store.get(path)[: offset + 5])
    reader = opened()
    for step in range(10):
        for found, wanted in zip(reader.batch(step), expected(photos, ORDER, step), strict=True):
            assert (found.id != wanted.id) == (57 <= wanted.id < 78)
    assert all("cut short" in bad.reason for bad in reader.bad)


def test_a_replacement_that_is_bad_too_gives_way_to_the_next(photos: Photos, opened: Opened) -> None:
    chain = wanted_at(ORDER, 2, 3, 1)
    photos.damage(*chain[:3])
    reader = opened()
    found = drain(reader, range(3))[2][3 * 4 + 1]
    assert found.id == chain[3]
    assert found.replaced == tuple(chain[:3])
    assert {bad.id for bad in reader.bad} >= set(chain[:3])


@pytest.mark.parametrize("lane", range(4))
def test_the_last_good_sample_of_a_window_however_small_stands_in_for_all_others(opened: Opened, lane: int) -> None:
    order = replace(ORDER, chunk_samples=2, window_chunks=4, batch_size=4)
    size = order.window(lane, 0).size  # 8, 6, 4, 2
    window = [int(order.sample(lane, 0, place)) for place in range(size)]
    for good in window[1:]:
        reader = opened(order, bad=tuple(set(window) - {good}))
        (sample,) = (sample for sample in reader.batch(0) if sample.lane == lane)
        assert sample.id == good
        assert sample.replaced[0] == window[0]
        assert set(sample.replaced) <= set(window) - {good}


def test_a_sample_in_a_window_without_a_good_one_stops_the_run_in_words(opened: Opened) -> None:
    window = ORDER.window(0, 0)
    reader = opened(bad=tuple(int(ORDER.sample(0, 0, place)) for place in range(window.size)))
    first = wanted_at(ORDER, 0, 0, 0)[0]
    with pytest.raises(UserError, match=f"sample {first} and the other {window.size - 1} of its window are all bad"):
        reader.batch(0)


def test_listed_samples_are_replaced_without_a_try_and_as_if_found_bad(photos: Photos, opened: Opened) -> None:
    listed = [wanted_at(ORDER, step, lane, 1)[0] for step, lane in ((0, 0), (2, 1), (5, 3))]
    known = opened(bad=tuple(listed))
    batches = drain(known, range(8))
    assert known.bad == []
    photos.damage(*listed)
    finding = opened()
    assert drain(finding, range(8)) == batches
    assert {bad.id for bad in finding.bad} == set(listed)
    assert known.counters["replaced"] == finding.counters["replaced"] >= 3


def test_a_sample_that_cannot_be_decoded_is_replaced_on_request(photos: Photos, opened: Opened) -> None:
    chain = wanted_at(ORDER, 1, 2, 3)
    reader = opened()
    sample = drain(reader, range(2))[1][2 * 4 + 3]
    first = reader.replace(sample, "cannot be decoded: no JPEG")
    assert first == Sample(chain[1], 2, 7, *photos.truth(chain[1]), (chain[0],))
    second = reader.replace(first, "cannot be decoded: no PNG")
    assert second == Sample(chain[2], 2, 7, *photos.truth(chain[2]), tuple(chain[:2]))
    assert [(bad.id, bad.step, bad.reason) for bad in reader.bad] == [
        (chain[0], 1, "cannot be decoded: no JPEG"),
        (chain[1], 1, "cannot be decoded: no PNG"),
    ]


def test_a_sample_is_replaced_the_same_way_when_its_window_is_long_gone(photos: Photos, opened: Opened) -> None:
    reader = opened()
    early = reader.batch(0)[5]
    drain(reader, range(1, 30))
    late = reader.replace(early, "cannot be decoded")
    again = opened()
    assert late == again.replace(again.batch(0)[5], "cannot be decoded")


def test_what_was_bad_once_is_not_tried_again(photos: Photos, opened: Opened) -> None:
    wrong = wanted_at(ORDER, 0, 0, 0)[0]
    reader = opened()
    reader.replace(reader.batch(0)[0], "cannot be decoded")
    served = [sample.id for step in range(1, 40) for sample in reader.batch(step)]
    assert wrong not in served
    assert [bad.id for bad in reader.bad] == [wrong]


def test_too_many_bad_samples_stop_the_run_and_name_the_shard(photos: Photos, opened: Opened) -> None:
    photos.damage(*range(40, 70))
    reader = opened(max_bad_fraction=0.01)
    with pytest.raises(
        UserError, match=r"11 bad samples .* reader.max_bad_fraction \(0.01\) .* most in shards/.*\(11\)"
    ):
        drain(reader, range(40))


def test_the_first_bad_sample_stops_a_run_that_allows_none(photos: Photos, opened: Opened) -> None:
    photos.damage(wanted_at(ORDER, 1, 0, 0)[0])
    reader = opened(max_bad_fraction=0.0)
    reader.batch(0)
    with pytest.raises(UserError, match="1 bad samples among the first 16"):
        reader.batch(1)


def test_a_store_that_does_not_answer_for_a_while_replaces_nothing(photos: Photos, opened: Opened) -> None:
    asked: list[float] = []

    async def away(read: Read, path: str, start: int | None, end: int | None) -> bytes:
        asked.append(time.monotonic())
        if asked[-1] < asked[0] + 1.0:
            raise Unavailable("memory://: no answer")
        return await read(path, start, end)

    photos.store.answer = away
    reader = opened()
    assert reader.batch(0) == expected(photos, ORDER, 0)
    assert reader.bad == []
    assert reader.counters["retries"] > 0
    assert reader.counters["wait_s"] > 0.3


@pytest.mark.parametrize("error", [Unavailable("memory://: no answer for 1 s"), Denied("memory://: key refused")])
def test_a_store_that_stays_away_stops_the_batch_with_its_error(
    photos: Photos, opened: Opened, error: Exception
) -> None:
    async def away(read: Read, path: str, start: int | None, end: int | None) -> bytes:
        raise error

    reader = opened(retry_seconds=0.3)
    drain(reader, range(3))
    photos.store.answer = away
    with pytest.raises(type(error), match=str(error)):
        drain(reader, range(3, 60))
    assert reader.bad == []


def test_batches_do_not_depend_on_when_answers_come(photos: Photos, opened: Opened) -> None:
    rng = random.Random(2)

    async def late(read: Read, path: str, start: int | None, end: int | None) -> bytes:
        await asyncio.sleep(rng.choice((0.0, 0.0, 0.004)))
        return await read(path, start, end)

    photos.damage(*range(0, 160, 9))
    still = opened(connections=1)
    batches = drain(still, range(15))
    photos.store.answer = late
    shaken = opened(connections=7, range_bytes=1500)
    assert drain(shaken, range(15)) == batches
    assert shaken.bad == still.bad


def test_steps_are_asked_for_one_after_the_other(opened: Opened) -> None:
    reader = opened(start=5)
    with pytest.raises(ValueError, match="step 6 was asked for, step 5 is next"):
        reader.batch(6)
    reader.batch(5)


def test_closing_wakes_a_batch_that_waits(photos: Photos) -> None:
    asked = threading.Event()

    async def never(read: Read, path: str, start: int | None, end: int | None) -> bytes:
        asked.set()
        await asyncio.sleep(3600)
        raise AssertionError

    photos.store.answer = never
    reader = Reader(photos.shards, ORDER, range(4), 0, SETTINGS)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            reader.batch(0)
        except RuntimeError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert asked.wait(10)
    reader.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert "closed" in str(errors[0])
    with pytest.raises(RuntimeError, match="closed"):
        reader.batch(0)
    reader.close()


def test_counters_say_what_was_read(photos: Photos, opened: Opened) -> None:
    reader = opened()
    drain(reader, range(10))

    def all_counted() -> bool:  # what is read ahead counts when it is here
        return bool(reader.counters["bytes_read"] == sum(end - start for _, start, end in photos.store.reads))

    assert wait_until(all_counted, 10)
    counters = reader.counters
    assert counters["served"] == 160
    assert counters["requests"] == len(photos.store.reads)
    assert ORDER.lanes * 2 == counters["windows"]


def test_what_is_held_is_never_over_the_budget_and_what_the_step_at_hand_needs() -> None:
    """Of samples of very different sizes, one of them larger than the budget."""
    rng = random.Random(4)
    sizes = [rng.choice((50, 400, 3000, 20_000)) for _ in range(160)]
    sizes[77] = 900_000
    photos = photos_in(Wire(f"memory://reader-{next(names)}"), sizes=sizes)
    budget = int(4 * ORDER.window_samples * photos.shards.mean_bytes)
    seen: list[tuple[int, float]] = []

    async def watched(read: Read, path: str, start: int | None, end: int | None) -> bytes:
        seen.append((step, reader.counters["held_bytes"]))
        data = await read(path, start, end)
        await asyncio.sleep(0)
        seen.append((step, reader.counters["held_bytes"]))
        return data

    step = 0
    with Reader(photos.shards, ORDER, range(4), 0, SETTINGS.model_copy(update={"prefetch_bytes": budget})) as reader:
        photos.store.answer = watched
        for step in range(40):
            assert reader.batch(step) == expected(photos, ORDER, step)
    assert len(seen) > 100
    needed = {at: needed_bytes(photos, at) for at in range(41)}
    for at, held in seen:  # `batch` may have come on by one since `step` was set
        assert held <= budget + max(needed[max(at - 1, 0)], needed[at], needed[at + 1])


def needed_bytes(photos: Photos, step: int) -> int:
    """The bytes of all chunks that a step takes samples of."""
    firsts = set()
    for lane, index in itertools.product(range(4), range(step * 4, step * 4 + 4)):
        number, place, _ = (int(value) for value in ORDER.place(lane, index))
        firsts.add(ORDER.window(lane, number).chunks[int(ORDER.slots(lane, number, place)[0])])
    return sum(len(photos.samples[(first + i) % 160][0]) for first in firsts for i in range(ORDER.chunk_samples))


def test_a_replacement_out_of_a_chunk_that_memory_has_no_room_for_yet_is_not_waited_for() -> None:
    """Neighbours are alike in size, so windows are not; and one lane has no more memory than a mean window."""
    rng = random.Random(5)
    sizes = [int(rng.uniform(0.8, 1.2) * mean) for mean in rng.choices((3000, 6000, 24_000), k=40) for _ in range(40)]
    photos = photos_in(Wire(f"memory://reader-{next(names)}"), sizes=sizes, shards=(400,) * 4)
    for seed in (1, 11):
        order = Order(1600, 8, 16, 8, 32, seed, "layout")
        settings = SETTINGS.model_copy(
            update={"prefetch_bytes": int(order.window_samples * photos.shards.mean_bytes) + 1}
        )
        removed = Removed.of(np.random.default_rng(seed).choice(1600, 80, replace=False))
        with Reader(photos.shards, order, range(1), 0, settings, removed=removed) as reader:
            replaced = sum(len(sample.replaced) for step in range(230) for sample in in_time(reader, step))
        assert replaced > 20


def in_time(reader: Reader, step: int) -> list[Sample]:
    """The batch of a step, or a failure after ten seconds."""
    closing = threading.Timer(10, reader.close)
    closing.start()
    try:
        return reader.batch(step)
    finally:
        closing.cancel()


def test_a_giant_sample_is_one_range_of_its_own_however_small_ranges_are() -> None:
    sizes = [500] * 160
    sizes[60] = 300_000
    photos = photos_in(Wire(f"memory://reader-{next(names)}"), sizes=sizes)
    settings = SETTINGS.model_copy(update={"range_bytes": 4000})
    with Reader(photos.shards, ORDER, range(4), 0, settings) as reader:
        for step in range(20):
            assert reader.batch(step) == expected(photos, ORDER, step)
    asked = [end - start for path, start, end in photos.store.reads if path.endswith(".tar")]
    assert max(asked) == 300_000
    assert sorted(set(asked))[-2] <= 4000


def test_ten_thousand_tiny_samples_and_empty_shards_are_read_as_they_are() -> None:
    counts = (0, 4000, 0, 0, 5999, 1, 0)
    photos = photos_in(Wire(f"memory://reader-{next(names)}"), sizes=[1 + k % 3 for k in range(10_000)], shards=counts)
    order = Order(10_000, 500, 3, 2, 500, 1, "layout")
    with Reader(photos.shards, order, range(2), 0, SETTINGS.model_copy(update={"prefetch_bytes": 2**23})) as reader:
        for step in range(24):  # over the end of an epoch
            assert reader.batch(step) == expected(photos, order, step)
        assert reader.bad == []


def test_a_start_at_any_step_costs_the_same_requests_and_bytes(photos: Photos) -> None:
    """Windows are equally full at steps that are a whole number of windows apart."""
    costs = []
    for start in (100, 100 + 5 * 200_000):
        photos.store.reads.clear()
        with Reader(photos.shards, ORDER, range(4), start, SETTINGS) as reader:
            assert reader.batch(start) == expected(photos, ORDER, start)
            settled(reader)
            reads = [(path.endswith(".tar"), end - start) for path, start, end in photos.store.reads]
        costs.append((len(reads), sum(size for is_tar, size in reads if is_tar)))
    (few, small), (many, large) = costs
    assert abs(few - many) <= 0.3 * few  # chunks may lie over the border of two shards or not
    assert abs(small - large) <= 0.2 * small


def cached(folder: Path, **changes: float | str) -> ReaderSettings:
    return SETTINGS.model_copy(update={"cache_dir": str(folder), **changes})


def test_a_second_reader_takes_everything_from_the_cache_also_where_its_chunks_lie_elsewhere(
    photos: Photos, tmp_path: Path
) -> None:
    """The chunks of another seed start at other ids; what an epoch left out is all that the store is asked for."""
    with Reader(photos.shards, ORDER, range(4), 0, cached(tmp_path)) as first:
        for step in range(20):
            assert first.batch(step) == expected(photos, ORDER, step)
        assert first.counters["cache_misses"] > 0
    other = replace(ORDER, seed=11)
    with Reader(photos.shards, other, range(4), 0, cached(tmp_path)) as second:
        photos.store.reads.clear()
        for step in range(10):
            assert second.batch(step) == expected(photos, other, step)
        assert not [path for path, *_ in photos.store.reads if path.endswith(".tar")]
        counters = second.counters
    assert counters["cache_hits"] >= 32
    assert counters["cache_misses"] == 0
    assert counters["cache_bytes"] > 10 * 16 * 400


def test_a_damaged_entry_replaces_nothing_and_is_fetched_again(photos: Photos, tmp_path: Path) -> None:
    with Reader(photos.shards, ORDER, range(4), 0, cached(tmp_path)) as first:
        drain(first, range(20))
    entries = sorted(tmp_path.rglob("*.bytes"))
    for path in entries[::2]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        path.write_bytes(data)
    retries = 1.0
    for _ in range(10):
        with Reader(photos.shards, ORDER, range(4), 0, cached(tmp_path)) as again:
            for step in range(10):
                assert again.batch(step) == expected(photos, ORDER, step)
            assert again.bad == []
            retries = again.counters["retries"]
        if not retries:
            break
    assert retries == 0  # in a later round: what was damaged and has been read is gone


def test_with_a_cache_bad_samples_are_the_same_as_without(photos: Photos, tmp_path: Path) -> None:
    photos.damage(*range(0, 160, 9))
    path, offset = photos.where(37 + 20)
    photos.store.put(path, photos.store.get(path)[: offset + 5])
    with Reader(photos.shards, ORDER, range(4), 0, SETTINGS) as plain:
        wanted = drain(plain, range(15))
    for _ in range(2):
        with Reader(photos.shards, ORDER, range(4), 0, cached(tmp_path)) as reader:
            assert drain(reader, range(15)) == wanted
            assert {bad.id for bad in reader.bad} == {bad.id for bad in plain.bad}


def test_what_arrived_wrong_is_not_kept_in_the_cache(photos: Photos, tmp_path: Path) -> None:
    whole = {path: photos.store.get(path) for path, _ in map(photos.where, range(0, 160, 9))}
    photos.damage(*range(0, 160, 9))
    with Reader(photos.shards, ORDER, range(4), 0, cached(tmp_path)) as reader:
        drain(reader, range(15))
        assert reader.bad
    for path, data in whole.items():
        photos.store.put(path, data)
    with Reader(photos.shards, ORDER, range(4), 0, cached(tmp_path)) as again:
        for step in range(15):
            assert again.batch(step) == expected(photos, ORDER, step)
        assert again.counters["retries"] == 0


def read_in_turn(photos: Photos, folder: Path, seed: int) -> None:
    order = replace(ORDER, seed=seed)
    with Reader(photos.shards, order, range(4), 0, cached(folder, cache_bytes=40_000)) as reader:
        os._exit(0 if all(reader.batch(step) == expected(photos, order, step) for step in range(30)) else 1)


def test_processes_share_a_cache_that_is_too_small_for_them(photos: Photos, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=read_in_turn, args=(photos, tmp_path, seed)) for seed in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    Cache(tmp_path, 40_000).put(cache_name("another"), 0, b"1")  # they ended without making room for what they kept
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.bytes"))
    assert 1 < held <= 40_000
