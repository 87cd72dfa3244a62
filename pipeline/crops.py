"""From decoded pixels to finished crops: cut, resized and blurred by torch on a CPU; coloured and normalised anywhere.

Colour and normalisation are one linear step, clipped to the range of a pixel. SwAV has the blur after the colour; both
are linear, so that only clipped pixels next to an edge differ.

On a CPU torch's resize of 8-bit pixels takes a seventh of the time of DALI's. A crop is finished while it lies in the
processor's cache. A box is cut out and then resized, as PIL and torchvision do it; DALI looks beyond the box, so that a
crop's rim differs from one that a GPU made.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import groupby
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.augment import AugmentSettings, Draws, blur_kernels, colour

# A tap of less weight is left out of a blur: a seventh of a level, were it all that sees white on black
_FAINT = 6e-4


def from_images(
    images: Sequence[Tensor], draws: list[Draws], augment: AugmentSettings, pool: Executor | None = None
) -> list[Tensor]:
    """Crops of n decoded images on a CPU, (h, w, 3) uint8 each, as (n, count, 3, s, s) float32 for each size."""
    cpu = torch.device("cpu")
    sizes = [_Size(list(group), augment, len(images), cpu) for _, group in groupby(draws, lambda crop: crop.size)]
    blurs = [[_kernels(crop, augment) for crop in size.draws] for size in sizes]

    def one(i: int) -> None:
        for size, kernels in zip(sizes, blurs, strict=True):
            rows = torch.empty(size.out.shape[1:])
            for crop, kernel, into in zip(size.draws, kernels, rows, strict=True):
                pixels = _cut(images[i], crop, i)
                taps = kernel[i][kernel[i] > 0].tolist()
                if len(taps) > 1:
                    _blur(pixels, taps, into)
                else:
                    into.view(pixels.shape).copy_(pixels)
            size.colour(slice(i, i + 1), rows[None])

    list(pool.map(one, range(len(images))) if pool else map(one, range(len(images))))
    return [size.crops() for size in sizes]


def from_crops(crops: list[Tensor], draws: list[Draws], augment: AugmentSettings) -> list[Tensor]:
    """The same of crops that are cut, flipped and blurred already, (n, s, s, 3) uint8 each, on any device."""
    finished = []
    for _, group in groupby(zip(draws, crops, strict=True), lambda pair: pair[0].size):
        members, pixels = zip(*group, strict=True)
        size = _Size(list(members), augment, len(pixels[0]), pixels[0].device)
        size.colour(slice(None), torch.stack(pixels, dim=1).float().view(size.out.shape))
        finished.append(size.crops())
    return finished


def _cut(image: Tensor, crop: Draws, i: int) -> Tensor:
    """(s, s, 3) uint8, resized and flipped."""
    top, left, height, width = crop.box[i].tolist()
    box = image[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    pixels = interpolate(box, (crop.size, crop.size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return pixels.flip(1) if crop.flip[i] else pixels


def _blur(pixels: Tensor, taps: list[float], out: Tensor) -> None:
    """Filter (s, s, 3) uint8 along each axis, its rim repeated beyond itself, into rows of float32, (s, 3 s)."""
    size, radius = len(pixels), len(taps) // 2
    padded = torch.empty(size + 2 * radius, size + 2 * radius, 3)
    inner = padded[radius : radius + size]
    inner[:, radius : radius + size] = pixels
    inner[:, :radius], inner[:, radius + size :] = pixels[:, :1], pixels[:, -1:]
    padded[:radius], padded[radius + size :] = inner[0], inner[-1]
    rows = padded.view(len(padded), -1)
    down = rows[:size] * taps[0]
    for k, weight in enumerate(taps[1:], 1):
        down.add_(rows[k : k + size], alpha=weight)
    torch.mul(down[:, : 3 * size], taps[0], out=out)
    for k, weight in enumerate(taps[1:], 1):
        out.add_(down[:, 3 * k : 3 * (k + size)], alpha=weight)


def _kernels(crop: Draws, augment: AugmentSettings) -> NDArray[np.float32]:
    """The blur of each sample, (n, 2 radius + 1), symmetric, of sum 1; zero where it is faint."""
    kernels = blur_kernels(crop.sigma, ceil(3 * augment.sigma[1]))
    kernels[kernels < _FAINT] = 0
    kernels /= kernels.sum(axis=1, keepdims=True)
    return kernels


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """On the device; from pinned memory, or the host would wait for all that the GPU has to do before."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


class _Size:
    """The crops of one size: their draws, what colours and normalises them, and where they are to lie.

    A channel's neighbours in memory are the other two of its pixel, so the 3 x 3 matrix is a filter of five taps along
    the row whose weights repeat every three values: no transposition, and the same sums wherever in a batch it lies.

    taps: (n, count, 5, 3 s), [:, :, 2 + d, c] is the weight in channel c of channel c + d. pull: (n, count, 3), of the
    sums over a crop's channels. low, high, level: (3 s,), black, white, a 255th of the way from one to the other. out:
    (n, count, s, 3 s), rows of finished pixels.
    """

    def __init__(self, draws: list[Draws], augment: AugmentSettings, n: int, device: torch.device) -> None:
        size, mean, std = draws[0].size, np.array(augment.mean), np.array(augment.std)
        matrix, pull = (np.stack(parts, axis=1) for parts in zip(*map(colour, draws), strict=True))
        taps = np.zeros((n, len(draws), 5, 3))
        for to in range(3):
            for source in range(3):
                taps[:, :, 2 + source - to, to] = matrix[:, :, to, source] / (255 * std[to])
        tensors = [_sent(torch.from_numpy(x.astype(np.float32)), device) for x in (taps, -mean / std, (1 - mean) / std)]
        self.taps, self.low, self.high = (x.repeat(*[1] * (x.dim() - 1), size) for x in tensors)
        self.level = (self.high - self.low) / 255
        self.pull = _sent(torch.from_numpy(pull / size**2), device)
        self.draws = draws
        shape = (n, len(draws), size, 3 * size)
        if device.type == "cpu":
            # numpy asks for huge pages; with small ones, the faults of fresh memory take as long as the colour
            self.out = torch.from_numpy(np.empty(shape, np.float32))
        else:
            self.out = torch.empty(shape, device=device)

    def colour(self, samples: slice, rows: Tensor) -> None:
        """Finish the crops of these samples. rows: (their number, count, s, 3 s) float32."""
        taps, out = self.taps[samples], self.out[samples]
        # whole numbers are added exactly, whatever the order: a column's sums in 24 bits, a channel's in 53
        sums = rows.sum(2).view(*rows.shape[:2], -1, 3).sum(2, dtype=torch.float64)
        levels = (sums * self.pull[samples]).sum(2).float()[:, :, None, None]
        torch.addcmul(self.low + levels * self.level, rows, taps[:, :, 2:3], out=out)
        for shift in (1, 2):
            out[..., shift:].addcmul_(rows[..., :-shift], taps[:, :, 2 - shift : 3 - shift, shift:])
            out[..., :-shift].addcmul_(rows[..., shift:], taps[:, :, 2 + shift : 3 + shift, :-shift])
        torch.clamp(out, self.low, self.high, out=out)

    def crops(self) -> Tensor:
        """(n, count, 3, s, s); in memory, channels come last."""
        return self.out.view(*self.out.shape[:3], -1, 3).permute(0, 1, 4, 2, 3)
