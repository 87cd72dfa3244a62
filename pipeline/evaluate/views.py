"""The images of an evaluation as a trunk sees them: clean, distorted and grey, through the training's own loader.

Distortions are drawn by the augmentation's own rule from a seed of their own, once: every trunk and every baseline is
asked about the same pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.errors import UserError
from pipeline.augment import AugmentSettings, CropSettings, Draws, draw
from pipeline.evaluate.tiles import Tiles, unusable
from pipeline.loader import render

SIZE = 96  # pixels; figures at another size are not comparable
SEED = 20  # of the distortions
PART = 256  # images decoded at once: a whole set of them, in full size, is more than memory holds

Places = NDArray[np.integer]  # in the tiles


@dataclass(frozen=True)
class Views:
    """Normalised images, each (n, 3, s, s) float32 on the CPU; mean and std are those of the normalisation.

    bank: all tiles of the bank; held_out: all held-out tiles; distorted, grey: the held-out tiles of photographs.
    """

    bank: Tensor
    held_out: Tensor
    distorted: Tensor
    grey: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def render_views(bank: Tiles, held_out: Tiles, augment: AugmentSettings) -> Views:
    """Decode and draw all views. augment: the run's own, of which the mean and std are kept.

    Raises UserError for an image that does not decode.
    """
    photographs = held_out.photographs()
    sizes, every = held_out.sizes[photographs], np.arange(len(held_out))
    grey = replace(plain(sizes), saturation=np.zeros(len(sizes), np.float32))
    return Views(
        bank=_show(bank, np.arange(len(bank)), plain(bank.sizes), augment),
        held_out=_show(held_out, every, plain(held_out.sizes), augment),
        distorted=render_distorted(held_out, augment, np.arange(len(photographs))),
        grey=_show(held_out, photographs, grey, augment),
        mean=augment.mean,
        std=augment.std,
    )


def render_distorted(held_out: Tiles, augment: AugmentSettings, which: NDArray[np.integer]) -> Tensor:
    """(n, 3, s, s): those rows of Views.distorted alone, the same pixels."""
    chosen = held_out.photographs()[which]
    settings, sizes = distortion(augment), held_out.sizes[chosen]
    draws = draw(settings, SEED, np.zeros_like(chosen), which.astype(np.int64), sizes[:, 0], sizes[:, 1])[0]
    return _show(held_out, chosen, draws, settings)


def _show(tiles: Tiles, places: Places, draws: Draws, augment: AugmentSettings) -> Tensor:
    shown = [torch.empty(0, 3, SIZE, SIZE)]
    for first in range(0, len(places), PART):
        part = slice(first, first + PART)
        images, sizes = [tiles.images[place] for place in places[part]], tiles.sizes[places[part]]
        try:
            (crops,) = render(images, sizes, augment, [_part(draws, part)])
        except ValueError as error:
            told = partial(_unusable, tiles, places[part])
            raise culprit(images, sizes, augment, told) or UserError(f"{tiles.url}: an image {error}") from error
        shown.append(crops[:, 0])
    return torch.cat(shown).contiguous(memory_format=torch.channels_last)


def _unusable(tiles: Tiles, places: Places, row: int, reason: str) -> UserError:
    place = int(places[row])
    return unusable(tiles.url, tiles.keys[place] if tiles.keys else f"{place}", reason)


def culprit(
    images: Sequence[Any], sizes: NDArray[np.int64], augment: AugmentSettings, told: Callable[[int, str], UserError]
) -> UserError | None:
    """What is told of the first of these encoded images that does not decode alone, on the host; None when all do."""
    for place in range(len(images)):
        one = slice(place, place + 1)
        try:
            render(images[one], sizes[one], augment, [plain(sizes[one])])
        except ValueError as error:
            return told(place, str(error))
    return None


def _part(draws: Draws, part: slice) -> Draws:
    rows = {f.name: getattr(draws, f.name)[part] for f in fields(draws) if f.name != "size"}
    return Draws(size=draws.size, **rows)


def distortion(augment: AugmentSettings) -> AugmentSettings:
    """What "distorted" means: half to nine tenths of the area, flipped, mildly coloured, sometimes grey or blurred."""
    return AugmentSettings(
        crops=(CropSettings(size=SIZE, count=1, scale=(0.5, 0.9)),),
        flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5,
        mean=augment.mean, std=augment.std,
    )  # fmt: skip


def plain(sizes: NDArray[np.int64], size: int = SIZE, share: float = 1.0) -> Draws:
    """The middle of each image, a square of that share of its shorter side. sizes: (n, 2), heights and widths."""
    side = (sizes.min(axis=1) * share).round().clip(1).astype(np.int64)
    top, left = ((sizes - side[:, None]) // 2).T
    n = len(sizes)
    one, zero = np.ones(n, np.float32), np.zeros(n, np.float32)
    return Draws(
        size=size,
        box=np.stack([top, left, side, side], axis=1).astype(np.int32),
        flip=np.zeros(n, np.bool_),
        brightness=one, contrast=one, saturation=one, hue_degrees=zero, sigma=zero,
    )  # fmt: skip
