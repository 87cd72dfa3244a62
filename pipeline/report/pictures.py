"""Small pictures for the page: crops as the model saw them, tiles, as WebP and JPEG bytes."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.evaluate.baselines import colours

_GAP = 3  # pixels between crops, transparent

Triple = tuple[float, float, float]


def crop_strips(crops: Sequence[Tensor], originals: Sequence[bytes], mean: Triple, std: Triple) -> list[bytes]:
    """A WebP picture for each image: the image, its big crops, then its small ones in a block of their height.

    crops: one (B, count, 3, s, s) for each size, normalised, the biggest first. originals: B encoded images.
    """
    height = crops[0].shape[-1]
    strips = []
    for n, original in enumerate(originals):
        blocks = [_fitted(original, height)]
        for of_size in crops:
            blocks += _blocks([_pixels(crop, mean, std) for crop in of_size[n]], height)
        strips.append(_webp(_row(blocks)))
    return strips


def thumbnail(image: bytes, side: int = 112) -> bytes:
    """The largest centred square of an encoded image, as a JPEG."""
    with Image.open(io.BytesIO(image)) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    return _jpeg(ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS))


def picture(normalised: Tensor, mean: Triple, std: Triple) -> bytes:
    """A normalised image, (3, s, s), as a JPEG."""
    return _jpeg(Image.fromarray(_pixels(normalised, mean, std)))


def _pixels(normalised: Tensor, mean: Triple, std: Triple) -> NDArray[np.uint8]:
    """(3, s, s) -> (s, s, 3)."""
    image = colours(normalised[None].float().cpu(), mean, std)[0]
    array: NDArray[np.uint8] = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return array


def _fitted(image: bytes, height: int) -> NDArray[np.uint8]:
    """The whole image, at most a square of that height, in the middle of its own height."""
    with Image.open(io.BytesIO(image)) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    return np.asarray(ImageOps.contain(upright, (height, height), Image.Resampling.LANCZOS))


def _blocks(crops: list[NDArray[np.uint8]], height: int) -> list[NDArray[np.uint8]]:
    """Crops of one size, stacked in columns as high as the big ones."""
    side = crops[0].shape[0]
    in_column = max(1, (height + _GAP) // (side + _GAP), height // side)
    columns = [crops[first : first + in_column] for first in range(0, len(crops), in_column)]
    return [_column(column) for column in columns]


def _column(crops: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    canvas = np.zeros((len(crops) * (crops[0].shape[0] + _GAP) - _GAP, crops[0].shape[1], 4), np.uint8)
    for n, crop in enumerate(crops):
        top = n * (crop.shape[0] + _GAP)
        canvas[top : top + crop.shape[0], :, :3] = crop
        canvas[top : top + crop.shape[0], :, 3] = 255
    return canvas


def _row(blocks: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    height = max(block.shape[0] for block in blocks)
    canvas = np.zeros((height, sum(block.shape[1] + _GAP for block in blocks) - _GAP, 4), np.uint8)
    left = 0
    for block in blocks:
        top = (height - block.shape[0]) // 2
        part = canvas[top : top + block.shape[0], left : left + block.shape[1]]
        part[..., 3] = 255
        part[..., : block.shape[2]] = block
        left += block.shape[1] + _GAP
    return canvas


def _webp(rgba: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "WEBP", quality=88)
    return file.getvalue()


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
