"""The order: what each epoch sees, what it does not depend on, its inverse, and what is refused."""

import itertools
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.order import (
    CHUNK_BYTES,
    DataSettings,
    Order,
    make_order,
    places_to_try,
    propose_chunk_samples,
    replacement_place,
)
from data_shards.permutation import Permutation

KEY = bytes(range(64))
BILLION = Order(10**9, 164, 64, 512, 8192, 1, "billion")
relaxed = settings(max_examples=60)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any valid small order: all remainders, windows of one chunk, chunks of one sample, batches of a whole window."""
    chunk, window, lanes = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    samples = lanes * window * chunk + draw(st.integers(0, 60))
    batch = lanes * draw(st.integers(1, window * chunk))
    return Order(samples, chunk, window, lanes, batch, draw(st.integers(0, 2**70)), draw(st.text(max_size=8)))


def stream(order: Order, chunks: int) -> dict[int, int]:
    """First ids of the first chunks of the endless stream, by their place in it, gathered from the lanes' windows."""
    found: dict[int, int] = {}
    for lane in range(order.lanes):
        for number in itertools.count():
            window = order.window(lane, number)
            first = window.first_index // order.chunk_samples
            found |= {(first + i) * order.lanes + lane: chunk for i, chunk in enumerate(window.chunks)}
            if (first + len(window.chunks)) * order.lanes > chunks:
                break
    return found


def ids_of(order: Order, first: int) -> list[int]:
    return [(first + j) % order.samples for j in range(order.chunk_samples)]


@pytest.mark.slow
@relaxed
@given(orders())
def test_an_epoch_has_each_sample_once_but_for_fewer_than_a_chunk(order: Order) -> None:
    chunks = stream(order, 3 * order.epoch_chunks)
    for epoch in range(3):
        places = range(epoch * order.epoch_chunks, (epoch + 1) * order.epoch_chunks)
        ids = [sample for place in places for sample in ids_of(order, chunks[place])]
        assert len(set(ids)) == len(ids)
        assert 0 <= order.samples - len(ids) < order.chunk_samples


@pytest.mark.slow
@relaxed
@given(orders())
def test_batches_are_the_windows_shuffled_each_sample_once(order: Order) -> None:
    steps = 3 * order.window_samples // order.lane_batch + 2
    seen = np.concatenate([order.batch(step) for step in range(steps)], axis=1)
    for lane in range(order.lanes):
        for number in range(2):
            window = order.window(lane, number)
            assert window.size == len(window.chunks) * order.chunk_samples
            there = seen[lane, window.first_index : window.first_index + window.size].tolist()
            assert Counter(there) == Counter(sample for first in window.chunks for sample in ids_of(order, first))
        assert order.window(lane, 1).first_index == order.window(lane, 0).size


@relaxed
@given(orders(), st.integers(0, 10**12))
def test_places_slots_and_samples_agree_with_the_batch(order: Order, step: int) -> None:
    batch = order.batch(step)
    for lane, i in itertools.product(range(order.lanes), {0, order.lane_batch - 1}):
        index = step * order.lane_batch + i
        number, place, size = (int(value) for value in order.place(lane, index))
        window = order.window(lane, number)
        slot, offset = order.slots(lane, number, place)
        assert (window.first_index + place, window.size) == (index, size)
        assert batch[lane, i] == order.sample(lane, number, place)
        assert batch[lane, i] == ids_of(order, window.chunks[int(slot)])[int(offset)]


@pytest.mark.slow
@settings(relaxed, max_examples=12)
@given(orders())
def test_the_inverse_names_exactly_the_steps_that_see_a_sample(order: Order) -> None:
    last = 2 * order.samples // order.batch_size + 1
    expected = defaultdict(list)
    for step in range(last + 1):
        for (lane, i), sample in np.ndenumerate(order.batch(step)):
            expected[sample].append((step, lane, step * order.lane_batch + i))
    for sample in range(order.samples):
        assert order.seen(sample, last) == sorted(expected[sample])


@relaxed
@given(orders(), st.integers(0, 10**9))
def test_every_world_size_sees_the_same_batch_in_the_same_order(order: Order, step: int) -> None:
    for world_size in (size for size in range(1, order.lanes + 1) if order.lanes % size == 0):
        ranks = [order.lanes_of(rank, world_size) for rank in range(world_size)]
        assert [lane for lanes in ranks for lane in lanes] == list(range(order.lanes))
        parts = []
        for lanes in ranks:
            index = step * order.lane_batch + np.arange(order.lane_batch)
            number, place, _ = order.place(np.array(lanes)[:, None], index)
            parts.append(order.sample(np.array(lanes)[:, None], number, place))
        assert (np.concatenate(parts) == order.batch(step)).all()


def test_a_rank_is_refused_in_words_when_the_lanes_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"data.lanes: 12 does not divide among 8 ranks; 1, 2, 3, 4, 6 or 12 ranks"):
        Order(10_000, 4, 4, 12, 48, 0, "x").lanes_of(0, 8)


def test_epochs_seeds_and_layouts_have_orders_of_their_own() -> None:
    order = Order(4000, 4, 8, 4, 32, 42, "layout")
    chunks = stream(order, 4 * order.epoch_chunks)
    epochs = [[chunks[e * order.epoch_chunks + t] for t in range(order.epoch_chunks)] for e in range(4)]
    others = [stream(replace(order, **change), order.epoch_chunks) for change in ({"seed": 43}, {"layout_id": "b"})]
    epochs += [[other[t] for t in range(order.epoch_chunks)] for other in others]
    for one, two in itertools.combinations(epochs, 2):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 10
        steps = [[(b - a) % order.samples for a, b in itertools.pairwise(epoch)] for epoch in (one, two)]
        assert sum(a == b for a, b in zip(*steps, strict=True)) < 10  # nor the same order from another start


def test_the_left_out_samples_are_others_in_each_epoch() -> None:
    order = Order(1003, 10, 4, 2, 8, 0, "layout")
    chunks = stream(order, 6 * order.epoch_chunks)
    left = []
    for epoch in range(6):
        firsts = [chunks[epoch * order.epoch_chunks + t] for t in range(order.epoch_chunks)]
        left.append(frozenset(range(1003)) - {sample for first in firsts for sample in ids_of(order, first)})
    assert {len(ids) for ids in left} == {3}
    assert len(set(left)) == 6


def test_the_lanes_turn_over_at_different_steps() -> None:
    order = Order(10**6, 10, 16, 8, 64, 0, "layout")
    ends = [order.window(lane, 1).first_index for lane in range(8)]
    assert ends == [160 - 20 * lane for lane in range(8)]


def test_a_permutation_is_a_bijection_for_every_n_up_to_300() -> None:
    for n in range(1, 301):
        check_bijection(n)


@pytest.mark.slow
def test_a_permutation_is_a_bijection_for_every_n_up_to_5000() -> None:
    for n in range(301, 5001):
        check_bijection(n)


@pytest.mark.parametrize("n", [2**k + d for k in range(9, 21) for d in (-1, 0, 1)])
def test_a_permutation_around_a_power_of_two_is_a_bijection(n: int) -> None:
    check_bijection(n)


def check_bijection(n: int) -> None:
    permutation = Permutation(n, KEY)
    places = np.arange(n)
    there = permutation(places)
    assert there.min() == 0
    assert there.max() == n - 1
    assert np.bincount(there, minlength=n).max() == 1
    assert (permutation.inverse(there) == places).all()


@settings(max_examples=60)
@given(st.integers(2**20, 2**53), st.binary(min_size=64, max_size=64), st.data())
def test_a_large_permutation_stays_inside_and_has_its_inverse(n: int, key: bytes, data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    there = Permutation(n, key)(values)
    assert 0 <= there.min() <= there.max() < n
    assert len(set(there.tolist())) == len(values)
    assert (Permutation(n, key).inverse(there) == values).all()


@pytest.mark.parametrize("n", [12, 16, 100, 1000])
def test_every_value_goes_everywhere_equally_often(n: int) -> None:
    keys = np.random.default_rng(0).bytes(64 * 2000)
    there = np.array([Permutation(n, keys[64 * i : 64 * i + 64])([0, n // 2, n - 1]) for i in range(2000)])
    bins = min(n, 20)
    for value in there.T:
        counts = np.bincount(value * bins // n, minlength=bins)
        widths = np.bincount(np.arange(n) * bins // n, minlength=bins)
        expected = 2000 * widths / n
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < (bins - 1) + 5 * np.sqrt(2 * (bins - 1))


def test_neighbours_do_not_stay_neighbours() -> None:
    order = Order(10**6, 50, 40, 4, 400, 3, "layout")
    window = order.window(1, 5)
    there = order.sample(1, 5, np.arange(window.size))
    near = np.abs(np.diff(there)) < order.chunk_samples
    assert near.mean() < 2 / 40  # one in 40 by chance
    assert abs(np.corrcoef(there[:-1], there[1:])[0, 1]) < 5 / np.sqrt(window.size)


@pytest.mark.parametrize("value", [-1, 10])
def test_a_value_outside_a_permutation_is_an_error(value: int) -> None:
    with pytest.raises(ValueError, match=f"{value}"):
        Permutation(10, KEY)(value)


def test_a_place_outside_a_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="160"):
        Order(10**6, 10, 16, 8, 64, 0, "layout").sample(0, 3, 160)


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    peaks = []
    for samples in (10**7, 10**9, 10**12):
        order = replace(BILLION, samples=samples)
        tracemalloc.start()
        for step in (0, 1, 10**4, 10**6, 10**8):
            order.batch(step)
        order.seen(samples // 2, 10**6 if samples > 10**8 else 10**3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 16 * 2**20


def test_a_billion_samples_are_found_again_by_the_inverse() -> None:
    for step in (0, 122_000, 10**6):
        for lane, i in ((0, 0), (511, 15), (77, 3)):
            sample = int(BILLION.batch(step)[lane, i])
            assert (step, lane, step * 16 + i) in BILLION.seen(sample, step)


@relaxed
@given(orders(), st.integers(0, 10**6), st.integers(1, 8))
def test_a_replacement_is_the_place_of_the_window_that_the_formula_says(order: Order, index: int, k: int) -> None:
    for lane in range(order.lanes):
        number, place, size = (int(value) for value in order.place(lane, index))
        other = (place + (k * size) // 2 + k**2) % size
        assert order.replacement(lane, index, k) == order.sample(lane, number, other)


@given(st.integers(1, 200), st.integers(0, 10**6))
def test_what_is_tried_in_place_of_a_sample_is_its_replacements_and_then_the_rest_of_its_window(
    size: int, place: int
) -> None:
    place %= size
    tried = list(places_to_try(place, size))
    assert tried[:9] == [place, *((place + (k * size) // 2 + k**2) % size for k in range(1, 9))]
    assert set(tried) == set(range(size))
    assert len(set(tried[9:]) - set(tried[:9])) == len(tried[9:])


@given(st.integers(500, 20_000), st.integers(0, 10**6))
def test_replacements_of_a_large_window_are_different_and_not_of_the_same_batch(size: int, place: int) -> None:
    place %= size
    others = [replacement_place(place, size, k) for k in range(1, 9)]
    assert len({place, *others}) == 9
    assert abs((others[0] - place) % size - size / 2) < 3


@relaxed
@given(
    st.integers(1, 3000),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(1, 300),
)
def test_what_is_refused_is_refused_in_words_with_numbers_that_would_fit(
    samples: int, chunk: int, window: int, lanes: int, batch: int
) -> None:
    try:
        order = Order(samples, chunk, window, lanes, batch, 0, "x")
    except UserError as error:
        message = str(error)
    else:
        assert lanes * window <= samples // chunk
        assert order.batch(3).size == batch
        assume(False)
        return
    assert message.startswith("data.")
    assert "\n" not in message
    if batch % lanes:
        assert "does not divide data.batch" in message
        return
    now = {"chunk_samples": chunk, "window_chunks": window, "lanes": lanes, "batch_size": batch}
    words = message.rpartition("; ")[2].replace("batch ", "batch_size ").replace("(or ", "").replace(")", "")
    for option in words.replace(" would", ",").split(","):
        name, _, value = option.strip().partition(" ")
        if name in now:
            changes = {name: int(value.split()[0])} | (
                {"window_chunks": int(option.split()[-1])} if "with" in option else {}
            )
            Order(samples=samples, seed=0, layout_id="x", **(now | changes))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((800, 8, 64, 4, 64), "window_chunks 25 would"),
        ((800, 8, 64, 4, 66), "data.lanes: 4 does not divide data.batch (66); 2, 3 or 6 would"),
        ((800, 8, 2, 4, 128), "data.batch: 128 samples over 4 lanes take 32 of each, a window has only 16"),
        ((20, 8, 1, 4, 64), "a batch of 64 over 4 lanes needs more samples"),
        ((0, 8, 1, 4, 64), "data.samples: found 0"),
        ((800, 8, 0, 4, 64), "data.window_chunks: found 0"),
    ],
)
def test_a_refusal_says_what_would_fit(numbers: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        Order(*numbers, 0, "x")
    assert message in str(error.value)


def test_the_demo_s_set_fits() -> None:
    assert Order(800, 8, 16, 4, 64, 0, "demo").steps_per_epoch == 12.5


def test_the_proposed_chunk_has_about_8_mib() -> None:
    assert propose_chunk_samples(50_000) == 168
    assert propose_chunk_samples(100 * CHUNK_BYTES) == 1
    data = DataSettings(url="memory://set", batch=64, lanes=4, window_chunks=4)
    assert make_order(data, 10**6, 50_000.0, "x").chunk_samples == 168
    assert make_order(data.model_copy(update={"chunk_samples": 5}), 10**6, 50_000.0, "x").chunk_samples == 5


def test_the_order_has_not_changed() -> None:
    """Golden vectors. If this fails, running jobs would see other data: raise ORDER_VERSION instead of mending it."""
    order = Order(1000, 7, 8, 4, 32, 42, "layout-1")
    assert order.batch(0).tolist() == [
        [473, 879, 747, 947, 484, 914, 733, 735],
        [697, 404, 95, 698, 988, 868, 867, 866],
        [189, 186, 190, 637, 729, 307, 725, 635],
        [779, 784, 319, 321, 782, 781, 785, 320],
    ]
    assert order.batch(31)[:, 0].tolist() == [928, 487, 721, 95]
    assert order.seen(500, 100) == [(6, 1, 48), (39, 1, 318), (84, 1, 676)]
    billion = Order(10**9, 164, 64, 512, 1024, 1, "billion")
    assert billion.batch(10**6)[::128].tolist() == [
        [701229054, 614032191],
        [395429509, 693309522],
        [12161834, 648016982],
        [197074245, 135410189],
    ]
    assert billion.window(3, 77).chunks[:4] == [257278714, 674161466, 909931142, 627786530]
    assert billion.replacement(3, 10**6, 2) == 973721158
    assert Permutation(10, KEY)(range(10)).tolist() == [9, 8, 7, 1, 4, 3, 5, 2, 0, 6]
    assert Permutation(10**15, KEY)([0, 1, 10**14]).tolist() == [567586644400776, 578433886955293, 995599206535361]
