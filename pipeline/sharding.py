"""Fully sharded training: each rank holds a part of every weight, of its gradient and of its optimizer's state.

A unit, such as a block of the trunk, is gathered for its forward and again for its backward, and let go of after each;
gradients are averaged over the ranks as DDP does. What is learned is the same up to rounding. A part is some rows, the
first dimension's, as even as may be. Sources: ZeRO (arXiv 1910.02054), PyTorch's FSDP (arXiv 2304.11277).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, units: Iterable[nn.Module], world_size: int) -> None:
    """Part the module's parameters among all ranks, unit by unit; what is in no unit is one of its own.

    The process group must be there; parameters go to its device. They must be alike on all ranks, and contiguous.
    """
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size,))
    # autocast would keep what it made of each unit, and with that half of the whole
    torch.set_autocast_cache_enabled(False)
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh)


def is_parted(tensor: Tensor) -> bool:
    """Whether the ranks have a part of it each."""
    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of one that is not parted. The same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together again on every rank, a copy; one that is not parted is given back. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
