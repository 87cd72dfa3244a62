"""Opponents that learn nothing: what images can be told apart by without any trunk."""

import torch
from torch import Tensor
from torch.nn import functional

BINS = 8  # a colour
SIDE = 16  # pixels


def colours(normalised: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Undo a normalisation. (N, 3, s, s) -> the same shape, 0 to 1."""
    shape = (1, 3, 1, 1)
    return (normalised * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def histogram(images: Tensor) -> Tensor:
    """Shares of the 8x8x8 boxes of the RGB cube. (N, 3, s, s), 0 to 1 -> (N, 512); each row sums to 1."""
    red, green, blue = (images * 255).round().long().flatten(2).unbind(1)
    width = 256 // BINS
    box = (red // width * BINS + green // width) * BINS + blue // width
    counts = torch.zeros(len(box), BINS**3).scatter_add_(1, box, torch.ones(box.shape))
    return counts / box.shape[1]


def pixels(images: Tensor) -> Tensor:
    """The image itself, averaged down to 16x16 pixels. (N, 3, s, s) -> (N, 768)."""
    return functional.adaptive_avg_pool2d(images, SIDE).flatten(1)
