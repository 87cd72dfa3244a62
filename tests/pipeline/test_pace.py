"""A rank that is slower than the others is found by a block that all of them time, and told of once."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.agreement import Agreed, Agreement, StepSums
from pipeline.pace import WINDOW, Pace, SlowRank
from pipeline.regnet import ModelSettings, RegNet
from tests.pipeline.distributed import run
from tests.pipeline.test_agreement import sums

SETTINGS = ModelSettings(trunk="custom", w_0=8, w_a=8, w_m=2, depth=3, group_width=8, stem_width=8)
IMAGES = torch.zeros(2, 3, 32, 32)
SLOW_S = 0.02


def slowed(trunk: RegNet, times: int) -> RegNet:
    """Its timed block takes SLOW_S longer in each of its first forwards."""
    left = iter(range(times))
    list(trunk.blocks())[1].get_submodule("conv2.conv").register_forward_hook(
        lambda *_: None if next(left, None) is None else time.sleep(SLOW_S)
    )
    return trunk


def test_a_step_is_timed_in_its_first_forward_and_told_of_as_a_median() -> None:
    trunk = slowed(RegNet(SETTINGS), times=2)
    pace = Pace(trunk)
    told = []
    for forwards in (1, 2, 2, 2, 2, 2):
        for _ in range(forwards):
            trunk(IMAGES)
        told.append(pace.microseconds())
    assert told[0] > 1e6 * SLOW_S  # the second slow forward is the first of the second step
    assert told[1] > 1e6 * SLOW_S
    assert 0 < told[-1] < 1e6 * SLOW_S  # four of six steps were quick


def test_what_backward_repeats_is_not_timed() -> None:
    trunk = RegNet(SETTINGS, activation_checkpointing=True)
    pace = Pace(trunk)
    for _ in range(2):
        trunk(IMAGES).sum().backward()
        assert pace.microseconds() > 0


def found(rank: int) -> Agreed | None:
    """What is agreed after some steps in which rank 1 takes longer."""
    trunk = slowed(RegNet(SETTINGS), times=100 * rank)
    pace, agreement = Pace(trunk), Agreement(dist.new_group(backend="gloo"))
    agreed = None
    for _ in range(7):
        trunk(IMAGES)
        agreement.begin(sums(block_us=pace.microseconds()), 0.0)
        agreed = agreement.finish()
    return agreed


@pytest.mark.slow
def test_two_ranks_agree_which_of_them_is_slow() -> None:
    first, second = run(2, found)
    assert first == second
    assert first.slow_rank == 1
    assert first.slow_factor > 1.5


def agreed(rank: int, factor: float | None) -> Agreed:
    zero: StepSums = sums()
    return Agreed(zero, 0.0, 0, factor, rank)


@pytest.mark.parametrize(
    ("steps", "alarms"),
    [
        pytest.param([(1, 1.31)] * (WINDOW - 1), [], id="a moment"),
        pytest.param([(1, 1.31)] * WINDOW, [1], id="long enough"),
        pytest.param([(1, 1.31)] * 3 * WINDOW, [1], id="once"),
        pytest.param([(1, 1.29)] * 3 * WINDOW, [], id="not slow enough"),
        pytest.param([(0, None)] * 3 * WINDOW, [], id="alone"),
        pytest.param([(n // 60 % 2, 1.5) for n in range(600)], [], id="now one, now the other"),
        pytest.param([(1, 1.5)] * 60 + [(1, 1.0)] + [(1, 1.5)] * 60, [], id="with a rest between"),
        pytest.param([(0, 1.5)] * WINDOW + [(1, 1.5)] * WINDOW + [(0, 2.0)] * WINDOW, [0, 1], id="each by itself"),
    ],
)
def test_a_rank_is_told_of_once_it_has_been_slow_for_a_while(
    steps: list[tuple[int, float | None]], alarms: list[int]
) -> None:
    slow = SlowRank(1.3, ["node1", "node2"])
    told = [said for rank, factor in steps if (said := slow.step(agreed(rank, factor))) is not None]
    assert [said.partition(" is slow, ")[0] for said in told] == [f"rank {rank} on node{rank + 1}" for rank in alarms]


def test_the_alarm_says_by_how_much_and_how_to_keep_off_that_node() -> None:
    slow = SlowRank(1.3, ["node1", "node2"])
    told = [slow.step(agreed(1, 1.64)) for _ in range(WINDOW)][-1]
    assert told is not None
    assert "is slow, 1.6 times the others' time for a block" in told
    assert "extra: {exclude: node2}" in told


@pytest.mark.parametrize("name", ["regnety_002", "regnety_016"])
def test_what_is_timed_lies_between_batch_norms_in_the_middle_of_a_trunk(name: str) -> None:
    """Where it has enough to do on a GPU, and waits for no other rank."""
    with torch.device("meta"):
        trunk = RegNet(ModelSettings(trunk=name))
    Pace(trunk)
    hooked = [layer for layer in trunk.modules() if layer._forward_pre_hooks]
    assert [type(layer) for layer in hooked] == [nn.Conv2d] * 3
    assert min(layer.in_channels for layer in hooked) > 100
