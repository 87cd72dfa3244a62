"""What ranks tell each other at each step: an asynchronous sum of a few integers and two maxima, read one step later.

It costs no stall and no sync with a GPU: what is told of step s is started at its end and read at the start of step
s + 1, by all ranks alike, so that all see a request to stop at the same batch boundary.
"""

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_shards.permutation import mix

_UNIT = 2.0**-32  # losses are added as integers of this unit: the sum does not depend on the order of ranks
_LARGEST = 1e5  # a loss beyond is told as this: the sum fits 64 bits on 20,000 ranks
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step, without which zero would stay zero
_RANKS = 2**20  # below a number of microseconds stands whose it is


@dataclass(frozen=True)
class StepSums:
    """Sums over ranks. The hashes are sums modulo 2^64 of a hash of each sample, as signed 64-bit integers."""

    batch_hash: int
    crop_hash: int
    loss: int  # fixed point; see `mean_loss`
    not_finite: int
    replaced: int
    bytes_read: int  # this and the next seven: of this step
    requests: int
    retries: int
    hedged: int
    cache_hits: int
    cache_misses: int
    cache_bytes: int
    decode_mismatch: int
    in_flight: int  # this and the next two: at present
    held_bytes: int
    block_us: int  # pipeline.pace
    preempted: int
    terminated: int

    def mean_loss(self, world_size: int) -> float | None:
        """Mean over ranks, None when the loss of one was not finite."""
        return None if self.not_finite else self.loss * _UNIT / world_size


@dataclass(frozen=True)
class Agreed:
    """What all ranks read of a step. wait_s: how long the one that waited longest for its images did; wait_rank: which.

    slow_factor: how many times as long as the others the slowest takes for the same block, None where it is alone;
    slow_rank: which. The others wait for such a one: a single rank slows down all, and no mean shows it.
    """

    sums: StepSums
    wait_s: float
    wait_rank: int
    slow_factor: float | None
    slow_rank: int


class Agreement:
    """One step in flight. Other collectives of its gloo group belong between `finish` and the next `begin`."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._begun: list[tuple[torch.Tensor, dist.Work]] = []

    def begin(self, sums: StepSums, wait_s: float) -> None:
        """Start telling this rank's values. Raises RuntimeError when those of the step before were not read."""
        if self._begun:
            raise RuntimeError("the sums of the step before were not read; call finish first")
        largest = [us * _RANKS + dist.get_rank(self._group) for us in (round(wait_s * 1e6), sums.block_us)]
        for values, how in ((astuple(sums), dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
            tensor = torch.tensor(values, dtype=torch.int64)
            self._begun.append((tensor, dist.all_reduce(tensor, how, self._group, async_op=True)))

    def finish(self) -> Agreed | None:
        """What the ranks told of the last step begun, None when none is in flight."""
        if not self._begun:
            return None
        begun, self._begun = self._begun, []
        for _, work in begun:
            work.wait()
        values, largest = (tensor.tolist() for tensor, _ in begun)
        (wait_us, wait_rank), (block_us, slow_rank) = (divmod(value, _RANKS) for value in largest)
        sums, others = StepSums(*values), dist.get_world_size(self._group) - 1
        factor = block_us * others / rest if (rest := sums.block_us - block_us) else None
        return Agreed(sums, wait_us / 1e6, wait_rank, factor, slow_rank)


def fixed_point(loss: float) -> int:
    """The loss as `StepSums.loss` takes it; 0 when it is not finite."""
    return round(min(max(loss, -_LARGEST), _LARGEST) / _UNIT) if math.isfinite(loss) else 0


def batch_hash(ids: NDArray[np.int64], lanes: range, step: int) -> int:
    """A hash of which samples stand at which place of the step's global batch; sums over ranks modulo 2^64.

    ids: (B,) of this rank, lane by lane. Mixed with splitmix64's finalizer.
    """
    per_lane = len(ids) // len(lanes)
    place = (np.uint64(step) << np.uint64(32)) + np.arange(
        lanes.start * per_lane, lanes.stop * per_lane, dtype=np.uint64
    )
    mixed = mix((mix(ids.astype(np.uint64) + _GOLDEN) ^ mix(place + _GOLDEN)) + _GOLDEN)
    return int(mixed.sum(dtype=np.uint64).astype(np.int64))
