"""SwAV: codes by Sinkhorn, swapped prediction, prototypes, projection head and queue.

In the order of the paper's pseudo-code (arXiv 2006.09882, appendix A); pipeline.module puts them together. B samples of
this rank, V views (crops), K prototypes, D dimensions. What stands here computes in float32, whatever the precision of
the trunk: at epsilon 0.05 the rounding of a score in bfloat16 changes its code by a few per cent.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.nn import functional
from torch.profiler import record_function

from data_shards.section import Section

ASSIGNING = 2  # views whose codes the others predict: the first ones, which are the big crops


class SwAVSettings(Section):
    """The loss and what it learns besides the trunk."""

    prototypes: Annotated[int, Field(ge=2)] = 3000  # K
    head: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2048, 128)  # widths of its layers, the last is D
    head_norm: bool = True  # batch norm after each hidden layer
    epsilon: PositiveFloat = 0.05  # of the entropy that spreads samples over prototypes; smaller is sharper
    iterations: PositiveInt = 3  # Sinkhorn's
    temperature: PositiveFloat = 0.1  # of the predictions
    queue: NonNegativeInt = 0  # earlier samples that join Sinkhorn, of all ranks, for each assigning view
    queue_from_step: NonNegativeInt = 0  # and when it is full
    freeze_prototypes_steps: NonNegativeInt = 313  # of the start, in which they stay as they are


@record_function("sinkhorn")
@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Spread the samples of all ranks evenly over the prototypes.

    scores: (..., B, K), cosine similarities of this rank's B samples to K prototypes, any type; each leading index
    is a problem of its own, solved with the same messages. Returns codes of the same shape in float32; each row sums
    to 1. No gradient. In the log domain, since exp(score / epsilon) is 0 / 0 for far scores at a small epsilon.
    One score that is not finite, on any rank, makes all codes of all ranks NaN, so that all of them drop the step.
    Communicates 2K numbers an iteration. Source: section 3.1 and appendix A.
    """
    log_q = scores.float() / epsilon
    log_q += (log_q * 0).sum()  # NaN when one is not finite
    for _ in range(iterations):
        log_q -= _log_sum_exp_of_samples(log_q)  # each prototype gets the same mass
        log_q -= log_q.logsumexp(-1, keepdim=True)  # each sample gives the mass 1
    return log_q.exp()


@record_function("loss")
def swav_loss(scores: Tensor, codes: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean cross-entropy between the code of each assigning view and the predictions of all other views.

    scores: (B, V, K), of all views; codes: (B, K) of view 0, of view 1, ... Returns a scalar in float32, the mean over
    this rank's samples.
    """
    log_p = functional.log_softmax(scores.float() / temperature, dim=-1)
    losses = [
        -(code * log_p[:, view]).sum(-1).mean()
        for assigning, code in enumerate(codes)
        for view in range(log_p.size(1))
        if view != assigning
    ]
    return torch.stack(losses).mean()


class Head(nn.Module):
    """Projects a trunk's features onto the unit sphere. `width`: D."""

    def __init__(self, entering: int, settings: SwAVSettings) -> None:
        super().__init__()
        *hidden, self.width = settings.head
        self.layers = nn.Sequential()
        for width in hidden:
            self.layers.append(nn.Linear(entering, width))
            if settings.head_norm:
                self.layers.append(nn.BatchNorm1d(width))
            self.layers.append(nn.ReLU(inplace=True))
            entering = width
        self.layers.append(nn.Linear(entering, self.width))

    def forward(self, features: Tensor) -> Tensor:
        """features: (N, C). Returns (N, D) in float32 or better, rows of length 1."""
        projected: Tensor = self.layers(features)
        return functional.normalize(_at_least_float32(projected), dim=-1)


class Prototypes(nn.Module):
    """K directions of length 1, the rows of `weight` (K, D)."""

    def __init__(self, width: int, settings: SwAVSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(settings.prototypes, width))
        self.frozen_steps = settings.freeze_prototypes_steps
        self.normalise_()

    def forward(self, embeddings: Tensor) -> Tensor:
        """embeddings: (..., D). Returns scores (..., K), never in less than float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return functional.linear(_at_least_float32(embeddings), self.weight)

    @torch.no_grad()
    def normalise_(self) -> None:
        """Bring the rows back to length 1; after each step of the optimizer."""
        self.weight.copy_(functional.normalize(self.weight, dim=1))

    def freeze_(self, step: int) -> None:
        """Drop the gradient while `step` (counted from 0) is one of the first; between backward and the optimizer.

        Without a gradient the optimizer leaves the weights, weight decay and momentum alone.
        """
        if step < self.frozen_steps:
            self.weight.grad = None


class Queue(nn.Module):
    """The embeddings of earlier samples, first in, first out, for each lane of this rank.

    It joins Sinkhorn when it is full and its step has come, so that a small batch need not fill all prototypes. Each
    lane keeps its own, so that any number of ranks can go on with it. It is no part of the state dict: see `state`.
    """

    embeddings: Tensor  # (views, lanes, samples of a lane, D), oldest first; rows of zeros are empty

    def __init__(self, settings: SwAVSettings, lanes: range, lanes_in_all: int, width: int) -> None:
        """lanes: those of this rank. The samples divide among all lanes, as the config has seen to."""
        super().__init__()
        self.lanes = lanes
        self.from_step = settings.queue_from_step
        empty = torch.zeros(ASSIGNING, len(lanes), settings.queue // lanes_in_all, width)
        self.register_buffer("embeddings", empty, persistent=False)
        self._was_full = False

    def samples(self, view: int, step: int) -> Tensor:
        """(n, D), what joins Sinkhorn for an assigning view at a step (counted from 0); n is 0 while it is not used."""
        if step < self.from_step or not self._full():
            return self.embeddings.new_empty(0, self.embeddings.size(-1))
        return self.embeddings[view].flatten(0, 1)

    @torch.no_grad()
    def push(self, assigning: Tensor) -> None:
        """Put a step's samples in and let the oldest go. assigning: (B, views, D), rows in the order of lanes."""
        kept = self.embeddings.size(2)
        if kept == 0:
            return
        by_lane = assigning.reshape(len(self.lanes), -1, *assigning.shape[1:])
        new = by_lane.movedim(2, 0).to(self.embeddings.dtype)
        self.embeddings.copy_(torch.cat([self.embeddings, new], dim=2)[:, :, -kept:])

    def state(self) -> dict[str, Tensor]:
        """Each lane's embeddings, (views, samples of a lane, D), by names that no other rank has; filled in place."""
        if self.embeddings.size(2) == 0:
            return {}
        return {f"queue.lane-{lane:03d}": self.embeddings[:, place] for place, lane in enumerate(self.lanes)}

    def _full(self) -> bool:
        if not self._was_full:  # asked of the device only until it is so
            self._was_full = bool(self.embeddings[:, :, :1].any(-1).all())
        return self._was_full


@torch.no_grad()
def prototype_usage(scores: Tensor, codes: Tensor) -> tuple[float, float]:
    """How the global batch uses the prototypes; a collapse shows here first.

    scores, codes: (..., K), of the assigning views. Returns the share of prototypes that are some view's first choice
    by its scores, and the mean entropy of a code as a share of ln K (1: codes say nothing), both 0 to 1. The sum of all
    codes would tell nothing: Sinkhorn makes it even, whatever the scores are. Communicates K + 2 numbers.
    """
    prototypes = scores.size(-1)
    chosen = torch.bincount(scores.argmax(-1).flatten(), minlength=prototypes).float()
    entropy = -torch.special.xlogy(codes, codes).sum()
    sums = torch.cat([chosen, torch.stack([chosen.sum(), entropy])])
    _all_reduce(sums, ReduceOp.SUM)
    used, share = torch.stack([(sums[:-2] > 0).float().mean(), sums[-1] / sums[-2] / math.log(prototypes)]).tolist()
    return used, share


def _log_sum_exp_of_samples(log_q: Tensor) -> Tensor:
    """(..., 1, K): ln of the sum of exp over the samples of all ranks."""
    largest = log_q.amax(-2, keepdim=True)
    _all_reduce(largest, ReduceOp.MAX)
    total = (log_q - largest).exp().sum(-2, keepdim=True)
    _all_reduce(total, ReduceOp.SUM)
    return largest + total.log()


def _all_reduce(tensor: Tensor, operation: "ReduceOp.RedOpType") -> None:
    """In place over all ranks; nothing where this process is alone."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
