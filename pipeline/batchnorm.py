"""Batch norm whose statistics are those of a group of lanes, the same group on any number of ranks.

A rank's rows lie in the order of its lanes, then samples, then views, so that a group's rows are contiguous. A group
inside one rank is normalised by torch's own kernel; a group over several ranks exchanges its statistics by one
collective forward and one backward. Running statistics are the mean over groups, kept back until the step has proved
finite: one NaN batch would otherwise stay in them for ever. DDP must not broadcast buffers (`broadcast_buffers=False`):
each rank keeps the running statistics of its own groups until `average_running_statistics`.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.nn.modules._functions import SyncBatchNorm as TorchsAcrossGPUs

from data_shards.errors import UserError


def convert(
    module: nn.Module, lanes: int, rank: int, world_size: int, group_lanes: int, timeout: timedelta | None = None
) -> nn.Module:
    """Put a GroupBatchNorm in the place of every BatchNorm1d and 2d; names, parameters and buffers stay.

    lanes: how many each rank has; group_lanes: how many share statistics. Where groups span ranks the default process
    group must be there and every rank call this, since groups are made, with that timeout (None: torch's own). Returns
    the module, changed in place (or its replacement, if it is a batch norm itself). Raises UserError when ranks would
    cut groups apart.
    """
    parts, span = _layout(lanes, world_size, group_lanes)
    group = _neighbours(rank, world_size, span, timeout) if span > 1 else None
    return _replaced(module, parts, group)


def commit_statistics(module: nn.Module, keep: bool) -> None:
    """End a step: fold the statistics of its forwards into the running ones, or forget them (keep=False).

    keep: whether the step was finite. When it was not, the buffers are bit for bit what they were before it.
    """
    for norm in _norms(module):
        if keep:
            norm.fold()
        norm.pending.clear()


def average_running_statistics(module: nn.Module) -> None:
    """Set the running statistics to their mean over the ranks, before a checkpoint or an evaluation.

    A moving average is linear, so that averaging now and then changes nothing in the end. One collective, in float64,
    which leaves what is equal on all ranks as it is to the bit.
    """
    buffers = [buffer for norm in _norms(module) for buffer in (norm.running_mean, norm.running_var)]
    if not buffers or not dist.is_initialized():
        return
    flat = torch.cat([buffer.double() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean)


class GroupBatchNorm(nn.Module):
    """Batch norm of (N, C) or (N, C, H, W) over groups of rows, with the parameters and buffers of a plain one.

    parts: how many groups this rank's rows make, when each lies within the rank; group: the ranks that share one group,
    otherwise. In training `pending` holds each forward's (mean, unbiased variance), both (C,), until committed.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, plain: nn.BatchNorm1d | nn.BatchNorm2d, parts: int, group: ProcessGroup | None) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        for name, buffer in plain.named_buffers():
            self.register_buffer(name, buffer)
        if plain.momentum is None:
            raise ValueError("groups keep a moving average, with a momentum; this batch norm has a cumulative one")
        self.momentum = plain.momentum
        self.eps = plain.eps
        self.parts = parts
        self.group = group
        self.pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C) or (N, C, H, W), rows of a group together. Returns the same shape."""
        if not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        normalised, mean, variance = self._within_rank(x) if self.group is None else self._across_ranks(x, self.group)
        if torch._C._current_graph_task_id() == -1:  # not when activation checkpointing repeats a forward in backward
            self.pending.append((mean, variance))
        return normalised

    @torch.no_grad()
    def fold(self) -> None:
        """Move the pending statistics into the running ones, in the order of their forwards."""
        for mean, variance in self.pending:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += len(self.pending)

    def _within_rank(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.parts == 1:  # not split and joined, which would copy rows and gradients
            mean, variance = self._blank()
            return self._native(x, mean, variance), mean, variance
        if len(x) % self.parts:
            raise ValueError(f"{len(x)} rows do not make {self.parts} equal batch-norm groups")
        blanks = [self._blank() for _ in range(self.parts)]
        normalised = [self._native(part, *blank) for part, blank in zip(x.chunk(self.parts), blanks, strict=True)]
        means, variances = zip(*blanks, strict=True)
        return torch.cat(normalised), torch.stack(means).mean(0), torch.stack(variances).mean(0)

    def _native(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """torch's own batch norm; a moving average of momentum 1 writes the batch's statistics to mean and variance."""
        return functional.batch_norm(
            x, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )

    def _across_ranks(self, x: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        if not x.is_cuda:
            result: tuple[Tensor, Tensor, Tensor] = _AcrossRanks.apply(x, self.weight, self.bias, self.eps, group)  # type: ignore[no-untyped-call]
            return result
        mean, variance = self._blank()
        running = (mean, variance, self.eps, 1.0)
        ranks = dist.get_world_size(group)
        normalised = _AcrossGPUs.apply(x, self.weight, self.bias, *running, group, ranks)  # type: ignore[no-untyped-call]
        return normalised, mean, variance

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Where batch statistics go, (C,) each; zeros, since a momentum of 1 multiplies what is there by 0."""
        return torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)


class _AcrossRanks(torch.autograd.Function):
    """The maths of torch's SyncBatchNorm for CPU tensors, which that class refuses.

    Means and variances are gathered, not sums and sums of squares: those lose all digits when the mean is far from 0.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # of bf16 the statistics would be bf16
        own = torch.stack(torch.batch_norm_update_stats(wide, None, None, 0.0))
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        means, variances = torch.stack(gathered).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean) ** 2).mean(0)
        count = x.numel() // x.size(1) * len(gathered)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.group, ctx.count = eps, group, count
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """With constant statistics by torch's kernel, then what flows through mean and variance taken off."""
        x, weight, mean, variance = ctx.saved_tensors
        fixed = (x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(grad, *fixed)
        sums = torch.stack((grad_weight, grad_bias))
        dist.all_reduce(sums, group=ctx.group)
        slope, shift = sums * (weight * torch.rsqrt(variance + ctx.eps) / ctx.count)
        grad_x -= functional.batch_norm(x, mean, variance, slope, shift, training=False, eps=ctx.eps)
        return grad_x, grad_weight, grad_bias, None, None


class _AcrossGPUs(TorchsAcrossGPUs):
    """torch's SyncBatchNorm, without what makes the host wait for the GPU at each forward.

    torch leaves out ranks without rows, which takes a look at the counts; here all ranks have as many. The backward is
    torch's own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
        momentum: float, group: ProcessGroup, ranks: int,
    ) -> Tensor:  # fmt: skip
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        own = torch.stack(torch.batch_norm_stats(x, eps))
        gathered = own.new_empty(ranks * len(own), x.size(1))
        dist.all_gather_into_tensor(gathered, own, group)
        means, inverse_stds = gathered.view(ranks, *own.shape).unbind(1)
        counts = own.new_full((ranks,), x.numel() // x.size(1))
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse_std, counts.to(torch.int32))
        ctx.process_group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)


def _norms(module: nn.Module) -> Iterator[GroupBatchNorm]:
    return (child for child in module.modules() if isinstance(child, GroupBatchNorm))


def _layout(lanes: int, world_size: int, group_lanes: int) -> tuple[int, int]:
    """(groups a rank, ranks a group); one of them is 1."""
    total = lanes * world_size
    legal = [g for g in range(1, total + 1) if total % g == 0 and (g % lanes == 0 or lanes % g == 0)]
    if group_lanes not in legal:
        raise UserError(
            f"model.batch_norm_lanes: groups of {group_lanes} of {total} lanes do not fit {world_size} ranks "
            f'of {lanes} lanes; {", ".join(map(str, legal))} would (SET="model.batch_norm_lanes={legal[-1]}")'
        )
    return max(1, lanes // group_lanes), max(1, group_lanes // lanes)


def _neighbours(rank: int, world_size: int, span: int, timeout: timedelta | None) -> ProcessGroup:
    """The process group of the `span` neighbouring ranks that this one belongs to; all ranks make all groups."""
    if not dist.is_initialized():
        raise RuntimeError("batch-norm groups span ranks: the process group must be there before the model")
    starts = range(0, world_size, span)
    groups: list[ProcessGroup] = [dist.new_group(list(range(at, at + span)), timeout=timeout) for at in starts]
    return groups[rank // span]


def _replaced(module: nn.Module, parts: int, group: ProcessGroup | None) -> nn.Module:
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return GroupBatchNorm(module, parts, group)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, parts, group))
    return module
