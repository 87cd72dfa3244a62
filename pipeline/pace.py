"""Which rank is slower than the others, though no step shows it: all end a step together.

A GPU that is hot, shared or sick makes the others wait for it in collectives, and nothing fails. So each rank times the
convolutions of one block in the middle of the trunk, as large on each and between collectives, in the first forward of
each step. On a GPU by events in its stream, which are read when the step has waited for the GPU anyway. Several, since
cuDNN may have chosen a slower way for one of them on one rank.
"""

import statistics
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from pipeline.agreement import Agreed
from pipeline.regnet import RegNet

WINDOW = 100  # steps: what is told is their median, and as many in a row make a rank a slow one
TIMED = ("conv1.conv", "conv2.conv", "conv3.conv")  # of the block


class Pace:
    """Times layers of this rank's trunk, which must be as it will stay: sharded, if it is to be."""

    def __init__(self, trunk: RegNet) -> None:
        blocks = list(trunk.blocks())
        self._marks: list[float | torch.cuda.Event] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        for name in TIMED:
            layer = blocks[len(blocks) // 2].get_submodule(name)
            layer.register_forward_pre_hook(lambda _, inputs: self._mark(inputs[0]))
            layer.register_forward_hook(lambda _, inputs, output: self._mark(output))

    def microseconds(self) -> int:
        """Median of the last steps; ends a step, whose work on a GPU must be done."""
        marks, self._marks = self._marks, []
        self._recent.append(sum(map(_seconds_between, marks[::2], marks[1::2])))
        return round(1e6 * statistics.median(self._recent))

    def _mark(self, tensor: Tensor) -> None:
        """Of the step's first forward alone; others follow for smaller crops, or where backward repeats one."""
        if len(self._marks) < 2 * len(TIMED):
            self._marks.append(_now(tensor))


class SlowRank:
    """Rank 0's eye on what the ranks agree on. factor: how many times the others' time is slow; hosts: by rank."""

    def __init__(self, factor: float, hosts: list[str]) -> None:
        self._factor, self._hosts = factor, hosts
        self._rank, self._steps = 0, 0
        self._told: set[int] = set()

    def step(self, agreed: Agreed) -> str | None:
        """What to tell of a rank that has been slow for WINDOW steps in a row, once."""
        slow, rank = (agreed.slow_factor or 0.0) >= self._factor, agreed.slow_rank
        self._steps = (self._steps + 1 if rank == self._rank else 1) if slow else 0
        self._rank = rank
        if self._steps < WINDOW or rank in self._told:
            return None
        self._told.add(rank)
        host = self._hosts[rank]
        return (
            f"rank {rank} on {host} is slow, {agreed.slow_factor:.1f} times the others' time for a block: "
            f"nvidia-smi -q -d PERFORMANCE there says why; extra: {{exclude: {host}}} in the site keeps off it"
        )


def _now(tensor: Tensor) -> "float | torch.cuda.Event":
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds_between(begun: Any, ended: Any) -> float:
    seconds: float = ended - begun if isinstance(begun, float) else begun.elapsed_time(ended) / 1e3
    return seconds
