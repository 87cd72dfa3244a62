"""Several sets in one order, and as one set: shares, each set's own epochs, the inverse, what is refused."""

import itertools
import tracemalloc
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet, shard_path
from data_shards.mixture import Mixture, mixed, parts_of
from data_shards.order import DataSettings, Order, Part, make_order
from data_shards.store import Store
from tests.data_shards.test_order import BILLION, stream

relaxed = settings(max_examples=40)
LARGE = (Part(7 * 10**8, "web", 6), Part(2 * 10**8, "news", 3), Part(10**8, "books", 1))
BILLION_MIXED = replace(BILLION, layout_id="mixture", parts=LARGE)


@st.composite
def mixtures(draw: st.DrawFn) -> Order:
    """Any valid small order of one to four sets, each just large enough or a little larger."""
    chunk, window, lanes = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    shares = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    parts = []
    for number, share in enumerate(shares):
        chunks = -(-share * lanes * window // sum(shares))
        parts.append(Part(chunks * chunk + draw(st.integers(0, 30)), f"set {number}", share))
    batch = lanes * draw(st.integers(1, window * chunk))
    samples = sum(part.samples for part in parts)
    return Order(samples, chunk, window, lanes, batch, draw(st.integers(0, 2**70)), "mixture", tuple(parts))


def bounds(order: Order) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(part.samples for part in order.parts))
    return [(end - part.samples, end) for end, part in zip(ends, order.parts, strict=True)]


def rows(order: Order, count: int) -> np.ndarray:
    """First ids of the chunks of the first rows of the stream, (count, L)."""
    chunks = stream(order, count * order.lanes)
    return np.array([[chunks[row * order.lanes + lane] for lane in range(order.lanes)] for row in range(count)])


@relaxed
@given(mixtures())
def test_after_every_row_of_the_lanes_each_set_has_had_its_share_to_within_a_chunk(order: Order) -> None:
    found = rows(order, 3 * order.window_chunks)
    total = sum(part.share for part in order.parts)
    for part, (first, end) in zip(order.parts, bounds(order), strict=True):
        had = np.cumsum(((first <= found) & (found < end)).sum(axis=1))
        for row, count in enumerate(had.tolist(), 1):
            assert abs(count - Fraction(row * order.lanes * part.share, total)) < 1


@pytest.mark.slow
@relaxed
@given(mixtures())
def test_an_epoch_of_each_set_has_each_of_its_samples_once_but_for_fewer_than_a_chunk(order: Order) -> None:
    order = replace(order, lanes=1, batch_size=1)  # so that the stream can be seen as it is
    total = sum(part.share for part in order.parts)
    for part, (first, end) in zip(order.parts, bounds(order), strict=True):
        epoch = part.samples // order.chunk_samples
        found = rows(order, -(-3 * epoch * total // part.share) + total).reshape(-1).tolist()
        own = [chunk for chunk in found if first <= chunk < end]
        for number in range(3):
            chunks = own[number * epoch : (number + 1) * epoch]
            ids = [order.follow(chunk, j) for chunk in chunks for j in range(order.chunk_samples)]
            assert all(first <= sample < end for sample in ids)
            assert len(set(ids)) == len(ids) == epoch * order.chunk_samples > part.samples - order.chunk_samples


@relaxed
@given(mixtures())
def test_each_row_of_the_lanes_is_the_next_part_of_the_stream_whatever_the_number_of_lanes(order: Order) -> None:
    count = 2 * order.window_chunks
    straight = rows(replace(order, lanes=1, batch_size=1), count * order.lanes).reshape(count, order.lanes)
    assert np.sort(rows(order, count), axis=1).tolist() == np.sort(straight, axis=1).tolist()


@pytest.mark.slow
@settings(relaxed, max_examples=12)
@given(mixtures())
def test_the_inverse_names_exactly_the_steps_that_see_a_sample(order: Order) -> None:
    last = 2 * order.samples // order.batch_size + 1
    expected = defaultdict(list)
    for step in range(last + 1):
        for (lane, i), sample in np.ndenumerate(order.batch(step)):
            expected[sample].append((step, lane, step * order.lane_batch + i))
    for sample in range(order.samples):
        assert order.seen(sample, last) == sorted(expected[sample])


@relaxed
@given(mixtures(), st.integers(0, 10**9))
def test_every_world_size_sees_the_same_batch_as_its_windows_say(order: Order, step: int) -> None:
    batch = order.batch(step)
    for lane, i in itertools.product(range(order.lanes), {0, order.lane_batch - 1}):
        index = step * order.lane_batch + i
        number, place, _ = (int(value) for value in order.place(lane, index))
        slot, offset = order.slots(lane, number, place)
        assert batch[lane, i] == order.follow(order.window(lane, number).chunks[int(slot)], int(offset))


def test_no_lane_is_stuck_with_one_set_where_the_lanes_are_a_multiple_of_the_period() -> None:
    order = Order(20_000, 4, 16, 8, 64, 0, "mixture", (Part(10_000, "a"), Part(10_000, "b")))
    of_first = rows(order, 64) < 10_000
    assert (of_first.sum(axis=1) == 4).all()
    assert ((of_first.mean(axis=0) > 0.25) & (of_first.mean(axis=0) < 0.75)).all()


def test_a_set_has_chunks_of_its_own_order_whatever_it_is_mixed_with() -> None:
    def firsts(others: tuple[Part, ...], lanes: int) -> list[int]:
        parts = (Part(1000, "a", 3), *others)
        order = Order(sum(part.samples for part in parts), 5, 8, lanes, 3 * lanes, 7, "mixture", parts)
        return [first for first in rows(order, 60).reshape(-1).tolist() if first < 1000]

    one, two = firsts((Part(500, "b", 1),), 1), firsts((Part(4000, "c", 2), Part(600, "d", 1)), 1)
    alone = stream(Order(1000, 5, 8, 1, 3, 7, "a"), 30)
    assert one[:30] == two[:30] == [alone[place] for place in range(30)]


@pytest.mark.slow
def test_a_billion_samples_of_several_sets_take_no_more_memory_and_are_found_again() -> None:
    tracemalloc.start()
    for step in (0, 1, 10**4, 10**6, 10**8):
        BILLION_MIXED.batch(step)
    for lane, i in ((0, 0), (511, 15), (77, 3)):
        sample = int(BILLION_MIXED.batch(10**6)[lane, i])
        assert (10**6, lane, 10**6 * 16 + i) in BILLION_MIXED.seen(sample, 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
    share = (BILLION_MIXED.batch(10**6) < 7 * 10**8).mean()
    assert abs(share - 0.6) < 0.05


def test_a_set_that_comes_around_within_the_windows_is_refused_with_numbers() -> None:
    parts = (Part(100_000, "large", 1, "s3://large"), Part(400, "small", 1, "s3://small"))
    with pytest.raises(UserError) as refused:
        Order(100_400, 8, 64, 4, 64, 0, "mixture", parts)
    text = str(refused.value)
    assert "s3://small: 400 samples at 0.5 of the whole come around every 100 chunks of 8 samples" in text
    assert "4 lanes with windows of 64 mix 256 at a time" in text
    assert "window_chunks 25 would" in text
    Order(100_400, 8, 25, 4, 64, 0, "mixture", parts)


def test_the_order_of_a_mixture_has_not_changed() -> None:
    """Golden vectors. If this fails, running jobs would see other data: raise ORDER_VERSION instead of mending it."""
    order = Order(1500, 7, 8, 4, 32, 42, "mixture-1", (Part(1000, "layout-1", 3), Part(500, "layout-2", 1)))
    assert order.batch(0).tolist() == [
        [1382, 401, 695, 405, 793, 700, 1384, 779],
        [1417, 725, 918, 1416, 916, 726, 917, 484],
        [1315, 322, 987, 983, 1087, 988, 319, 1310],
        [949, 950, 283, 285, 952, 947, 286, 953],
    ]
    assert order.batch(311)[:, 0].tolist() == [109, 788, 386, 76]
    assert order.seen(1200, 200) == [(44, 0, 357), (63, 1, 505), (179, 2, 1439)]


# ---- as one set


def shard_set(name: str, counts: tuple[int, ...], layout: str, mean: int = 10) -> ShardSet:
    sizes = tuple(count * mean for count in counts)
    return ShardSet(Store(f"memory://{name}"), Manifest(layout, "c", sum(counts), counts, sizes, {}, {}))


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), min_size=2, max_size=4),
    st.integers(1, 9),
)
def test_ids_and_shards_of_a_set_follow_those_of_the_one_before_and_wrap_around_inside_it(
    counts: list[list[int]], length: int
) -> None:
    sets = [shard_set(f"set{k}", tuple(some), f"layout {k}") for k, some in enumerate(counts)]
    joined = Mixture(sets, [1] * len(sets))
    samples, shards = 0, 0
    for one in sets:
        for sample in range(one.manifest.samples):
            shard, place = one.locate(sample)
            assert joined.locate(samples + sample) == (shards + shard, place)
            assert joined.tar(shards + shard) == (one.store, shard_path(shard))
            assert joined.index(shards + shard) == one.index(shard)
            assert joined.shard_name(shards + shard) == f"{one.store.url}/{shard_path(shard)}"
            expected = [(shards + span.shard, span.first, span.count) for span in one.spans(sample, length)]
            found = [(span.shard, span.first, span.count) for span in joined.spans(samples + sample, length)]
            assert found == expected
        samples, shards = samples + one.manifest.samples, shards + len(one.manifest.shard_samples)
    assert joined.manifest.samples == samples


def test_a_mixture_s_layout_is_that_of_its_sets_and_shares() -> None:
    sets = [shard_set("a", (9,), "A"), shard_set("b", (5,), "B"), shard_set("c", (5,), "C")]
    ids = [
        Mixture(some, shares).manifest.layout_id
        for some, shares in [(sets[:2], (1, 2)), (sets[:2], (2, 1)), (sets[1::-1], (1, 2)), (sets, (1, 2, 1))]
    ]
    assert len(set(ids)) == 4


def test_a_mixture_is_known_again_by_what_it_was_called_before() -> None:
    manifest = Mixture([shard_set("a", (9,), "A"), shard_set("b", (5,), "B")], (1, 2)).manifest
    assert manifest.layout_id == "7f9cdcddc607edcdbdb8b1ea745c6969"  # in the records of runs
    assert manifest.contents_id == "e7849ee7c8a8178efe2bd14b43296014"


def test_bytes_of_a_sample_are_by_the_shares_not_by_the_sizes() -> None:
    sets = [shard_set("a", (1000,), "A", mean=100), shard_set("b", (10,), "B", mean=500)]
    assert Mixture(sets, (3, 1)).mean_bytes == 200


def test_a_single_set_is_itself_and_has_the_order_that_it_always_had() -> None:
    one = shard_set("a", (1000,), "layout-1")
    assert mixed([one], (1,)) is one
    several = DataSettings(sources=[{"url": "memory://a", "weight": 3}], batch=32, lanes=4, chunk_samples=7)
    alone = DataSettings(url="memory://a", batch=32, lanes=4, chunk_samples=7)
    assert several.shares == alone.shares == (1,)
    assert several.sets[0].url == alone.sets[0].url


def test_the_same_set_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"memory://a and memory://b are the same set \(layout A\)"):
        mixed([shard_set("a", (9,), "A"), shard_set("b", (9,), "A")], (1, 1))


def test_the_order_over_a_mixture_reads_each_set_as_often_as_its_weight_says() -> None:
    data = DataSettings(
        sources=[{"url": "memory://a", "weight": 0.8}, {"url": "memory://b", "weight": 0.2}],
        batch=40, lanes=4, chunk_samples=5, window_chunks=10,
    )  # fmt: skip
    sets = [shard_set("a", (700, 300), "A"), shard_set("b", (500,), "B")]
    joined = mixed(sets, data.shares)
    order = make_order(data, 1500, joined.mean_bytes, joined.manifest.layout_id, parts_of(sets, data.shares))
    ids = np.concatenate([order.batch(step).reshape(-1) for step in range(250)])
    assert abs((ids < 1000).mean() - 0.8) < 0.01
