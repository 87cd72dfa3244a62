"""The shares of sets in a stream: at every place right to within a chunk, and known both ways without a walk."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.shares import PERIOD, Schedule, whole_shares

some_shares = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(some_shares)
def test_at_every_place_each_set_has_had_its_share_to_within_one_chunk(shares: list[int]) -> None:
    which, _ = Schedule(shares).chunk(np.arange(3 * sum(shares)))
    for k, share in enumerate(shares):
        had = np.cumsum(which == k)
        for slots, count in enumerate(had.tolist(), 1):
            assert abs(count - Fraction(slots * share, sum(shares))) < 1


@given(some_shares, st.integers(0, 10**12))
def test_each_set_s_chunks_follow_each_other_and_are_found_again(shares: list[int], first: int) -> None:
    schedule = Schedule(shares)
    slots = np.arange(first, first + 2 * sum(shares))
    which, chunk = schedule.chunk(slots)
    for k, share in enumerate(shares):
        own = chunk[which == k]
        assert len(own) == 2 * share
        assert (np.diff(own) == 1).all()
        assert own[0] == schedule.count(k, first)
        assert [schedule.slot(k, c) for c in own.tolist()] == slots[which == k].tolist()


def test_one_set_has_the_stream_as_it_is() -> None:
    which, chunk = Schedule((1,)).chunk([0, 5, 10**15])
    assert which.tolist() == [0, 0, 0]
    assert chunk.tolist() == [0, 5, 10**15]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([5.0], (1,)),
        ([0.7, 0.3], (7, 3)),
        ([1, 1, 1], (1, 1, 1)),
        ([0.5, 0.25, 0.25], (2, 1, 1)),
        ([1 / 3, 2 / 3], (1, 2)),
        ([999_983, 1_000_003, 500_009], (2, 2, 1)),
        ([100_003, 100_003, 100_019], (3333, 3333, 3334)),  # rounded down one of 10,000 is left, for who lost most
    ],
)
def test_weights_become_whole_numbers_in_the_same_ratio(weights: list[float], shares: tuple[int, ...]) -> None:
    found = whole_shares(weights)
    total = sum(weights)
    assert sum(found) <= PERIOD
    for weight, share in zip(weights, found, strict=True):
        assert abs(share / sum(found) - weight / total) <= 1 / PERIOD
    assert found == shares


def test_a_weight_that_would_never_have_a_chunk_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a weight of 0.001 is less than one in 10,000 of 100.001"):
        whole_shares([100, 0.001])
