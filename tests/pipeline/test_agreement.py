"""What ranks agree on at each step: sums that are the same on all of them, and hashes that tell batches apart."""

import math
from dataclasses import astuple, fields
from random import Random

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agreement import Agreed, Agreement, StepSums, batch_hash, fixed_point
from tests.pipeline.distributed import run

WORD = 2**64


def sums(**values: int) -> StepSums:
    return StepSums(**{field.name: 0 for field in fields(StepSums)} | values)


def two_steps(rank: int) -> tuple[list[Agreed | None], str]:
    """What a rank reads: nothing, then what was told of its first step, then of its second, then nothing.

    And what it is told when it begins a step without having read the one before.
    """
    agreement = Agreement(dist.new_group(backend="gloo"))
    read = [agreement.finish()]
    agreement.begin(
        StepSums(
            batch_hash=2**63 - 1,
            crop_hash=-(2**63) + rank,
            loss=fixed_point([6.25, 5.5][rank]),
            not_finite=0,
            replaced=rank,
            bytes_read=2**40 + rank,
            requests=5,
            retries=3,
            cache_hits=rank,
            cache_misses=0,
            cache_bytes=0,
            hedged=1,
            decode_mismatch=rank,
            in_flight=16,
            held_bytes=2**50,
            block_us=[300, 600][rank],
            preempted=0,
            terminated=0,
        ),
        wait_s=[0.25, 1.5][rank],
    )
    with pytest.raises(RuntimeError) as told:
        agreement.begin(sums(), 0.0)
    read.append(agreement.finish())
    loss = fixed_point([math.nan, 1.0][rank])
    second = sums(loss=loss, not_finite=1 - rank, preempted=rank, block_us=[900, 0][rank])
    agreement.begin(second, 0.5 - rank / 4)
    return [*read, agreement.finish(), agreement.finish()], str(told.value)


@pytest.mark.slow
def test_both_ranks_read_the_same_sums_one_step_later_and_none_is_dropped_in_silence() -> None:
    first, second = run(2, two_steps)
    assert first == second
    (nothing, *steps, end), told = first
    one, two = (agreed.sums for agreed in steps)
    assert nothing is None
    assert end is None
    # hashes modulo 2^64
    assert astuple(one) == (-2, 1, fixed_point(11.75), 0, 1, 2**41 + 1, 10, 6, 2, 1, 0, 0, 1, 32, 2**51, 900, 0, 0)
    assert one.mean_loss(2) == 5.875
    assert (two.preempted, two.terminated, two.not_finite) == (1, 0, 1)
    assert two.mean_loss(2) is None
    assert "not read" in told
    assert [(agreed.wait_s, agreed.wait_rank) for agreed in steps] == [(1.5, 1), (0.5, 0)]
    assert [(agreed.slow_factor, agreed.slow_rank) for agreed in steps] == [(2.0, 1), (None, 0)]


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=64), st.randoms())
def test_the_mean_loss_does_not_depend_on_the_order_of_ranks(losses: list[float], random: Random) -> None:
    shuffled = list(losses)
    random.shuffle(shuffled)
    forward, backward = (sum(map(fixed_point, order)) for order in (losses, shuffled))
    mean = sums(loss=forward).mean_loss(len(losses))
    assert mean == sums(loss=backward).mean_loss(len(losses))
    assert mean == pytest.approx(math.fsum(losses) / len(losses), abs=2**-32)


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan, 3e38, -3e38])
def test_no_loss_overflows_the_sum_of_many_ranks(loss: float) -> None:
    assert abs(fixed_point(loss)) * 20_000 < 2**63


def reference_hash(ids: list[int], lanes: range, step: int) -> int:
    """The same in Python's integers, place by place."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % WORD
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
        x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
        return x ^ x >> 31

    first = lanes.start * (len(ids) // len(lanes))
    total = sum(mix(mix(sample) ^ mix((step << 32) + first + place)) for place, sample in enumerate(ids)) % WORD
    return total - WORD if total >= WORD // 2 else total


steps = st.integers(0, 10**7)
batches = st.lists(st.integers(0, 10**9), min_size=8, max_size=8)


@given(batches, steps)
def test_the_hash_of_a_batch_is_that_of_the_reference_and_the_same_however_lanes_are_dealt(
    ids: list[int], step: int
) -> None:
    batch = np.array(ids)
    whole = batch_hash(batch, range(4), step)
    assert whole == reference_hash(ids, range(4), step)
    for ranks in (2, 4):
        parts = zip(np.split(batch, ranks), np.split(np.arange(4), ranks), strict=True)
        total = sum(batch_hash(own, range(lanes[0], lanes[-1] + 1), step) for own, lanes in parts)
        assert total % WORD == whole % WORD


@given(batches, steps, st.data())
def test_the_hash_of_a_batch_tells_another_order_another_sample_and_another_step(
    ids: list[int], step: int, data: st.DataObject
) -> None:
    batch = np.array(ids)
    whole = batch_hash(batch, range(4), step)
    one, other = data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True))
    swapped, changed = batch.copy(), batch.copy()
    swapped[[one, other]] = swapped[[other, one]]
    changed[one] += 1
    assert batch_hash(changed, range(4), step) != whole
    assert batch_hash(batch, range(4), step + 1) != whole
    assert (batch_hash(swapped, range(4), step) != whole) == (batch[one] != batch[other])
