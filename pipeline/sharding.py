"""Fully sharded training: each rank holds a part of every weight, of its gradient and of its optimizer's state.

A unit, such as a block of the trunk, is gathered for its forward and again for its backward, and let go of after each;
gradients are averaged over the ranks as DDP does. What is learned is the same up to rounding. A part is some rows, the
first dimension's, as even as may be. Sources: ZeRO (arXiv 1910.02054), PyTorch's FSDP (arXiv 2304.11277).
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, units: Iterable[Sequence[nn.Module]], world_size: int) -> None:
    """Part the module's parameters among all ranks, unit by unit; what is in no unit is one of its own.

    units: each with those that are in it behind it. The process group must be there; parameters go to its device. They
    must be alike on all ranks, and contiguous.
    """
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size,))
    for unit_and_inner in units:
        for unit in reversed(unit_and_inner):
            fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)


def gather_ahead(trunk: Sequence[Sequence[nn.Module]], head: nn.Module) -> None:
    """Let each unit of the trunk, as it begins, ask for the one that comes next, which is on its way meanwhile.

    trunk: its units in the order of the forward, each before those in it. By itself FSDP does so in the order that it
    has seen, which it forgets with the loss's backward: the trunk's comes in others after that. And the last gather of
    the loss's would be for nothing.
    """
    backward = [unit for outer, *inner in reversed(trunk) for unit in (outer, *reversed(inner))]
    for unit, following in (*pairwise(backward), (head, head)):
        cast(FSDPModule, unit).set_modules_to_backward_prefetch([cast(FSDPModule, following)])
    forward = [pair for units in trunk for pair in pairwise(units)]
    # a layer asks for no other block: when a forward is done again for the backward, that block's time is over
    forward += [(unit, following) for (unit, *inner), (following, *_) in pairwise(trunk) if not inner]
    for unit, following in forward:
        cast(FSDPModule, unit).set_modules_to_forward_prefetch([cast(FSDPModule, following)])


def is_parted(tensor: Tensor) -> bool:
    """Whether the ranks have a part of it each."""
    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of one that is not parted. The same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm_of_parts(norms: Tensor) -> Tensor:
    """Euclidean norms of whole tensors out of those of this rank's parts, of any shape. One collective for all."""
    squares = norms.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def first_row(tensor: Tensor) -> int:
    """Where this rank's part of a parted tensor begins."""
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    return min(tensor.shape[0], mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()))


@torch.no_grad()
def spread(filled: Tensor | None, tensor: Tensor) -> None:
    """Fill each rank's part with that of a whole tensor that rank 0 has; the others give None. A collective."""
    assert isinstance(tensor, DTensor)
    device = part(tensor).device
    source = torch.empty(tensor.shape, dtype=tensor.dtype) if filled is None else filled
    parted = distribute_tensor(source.to(device), tensor.device_mesh, tensor.placements)
    part(tensor).copy_(part(parted))
