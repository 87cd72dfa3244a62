"""Pooled features of images under a trunk, with batch-norm statistics measured on images of one's own choice."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def with_statistics_of(trunk: nn.Module, images: Tensor, batch: int = 128) -> nn.Module:
    """A copy of the trunk, in evaluation mode, whose batch-norm statistics are means over batches of `images`.

    images: (N, 3, s, s). Batches are of nearly equal size and take every n-th image, so that images that lie together
    (tiles of one photograph) do not make a batch of their own.
    """
    copied = copy.deepcopy(trunk).eval()
    copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    count = -(-len(images) // batch)
    update_bn((_to(images[first::count], copied) for first in range(count)), copied)
    return copied


@torch.no_grad()
def features(trunk: nn.Module, images: Tensor, batch: int = 128) -> Tensor:
    """images: (N, 3, s, s) -> (N, C) float32 on the CPU. The trunk is in evaluation mode already."""
    return torch.cat([trunk(_to(part, trunk)).float().cpu() for part in torch.split(images, batch)])


def _to(images: Tensor, trunk: nn.Module) -> Tensor:
    device = next(trunk.parameters()).device
    return images.to(device).contiguous(memory_format=torch.channels_last)
