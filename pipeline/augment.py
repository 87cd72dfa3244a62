"""How each crop of each sample is cut and coloured: a pure function of (seed, lane, index in the lane, crop).

In: the sizes of the images and the places of their samples in the data. Out: boxes, flips, colour factors and blur
widths, and the matrices and kernels that they stand for, which pipeline.crops and pipeline.pixels apply. The random
numbers are Philox4x32-10 and the distributions are inverse formulas, both written out here, because numpy's and torch's
may change between versions: the same place draws the same numbers on any number of ranks, after any restart. Boxes
follow torchvision's rule for RandomResizedCrop; the rest follows SwAV (arXiv 2006.09882).
"""

from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from data_shards.section import Section

Uint64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]
Share = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]

AUGMENT_VERSION = 2  # 1: contrast about the middle grey, which made one small crop in twenty-seven black
_TRIES = 10  # torchvision's; then the fallback
# A crop's numbers come in blocks of four: one block a try (area, aspect, top, left), then these.
_CHOICES, _FACTORS, _SIGMA = _TRIES, _TRIES + 1, _TRIES + 2
_BLOCKS = _TRIES + 3
# RGB to luma and two axes of chroma, as NTSC defined them
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class CropSettings(Section):
    """A crop size of the multi-crop: `count` square crops of `size` pixels from `scale` of the image's area."""

    size: PositiveInt  # pixels of a side
    count: PositiveInt
    scale: tuple[float, float]  # of the image's area

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale: [{low}, {high}] is no range within (0, 1], smaller end first")
        return self


class AugmentSettings(Section):
    """SwAV's multi-crop and its colour distortion.

    flip, jitter, grey and blur are probabilities, for each crop anew. Strengths are those of torchvision's ColorJitter:
    0.8 draws a factor from 0.2 to 1.8; hue is in turns (0.2: up to 72 degrees either way). sigma is in pixels of the
    finished crop, whatever its size.
    """

    crops: Annotated[tuple[CropSettings, ...], Field(min_length=1)] = (
        CropSettings(size=224, count=2, scale=(0.14, 1.0)),
        CropSettings(size=96, count=6, scale=(0.05, 0.14)),
    )
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Strength = 0.8
    contrast: Strength = 0.8
    saturation: Strength = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    grey: Share = 0.2
    blur: Share = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's, of values from 0 to 1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for name, (low, high) in (("aspect", self.aspect), ("sigma", self.sigma)):
            if not 0 < low <= high:
                raise ValueError(f"{name}: [{low}, {high}] is no range above 0, smaller end first")
        sizes = [crop.size for crop in self.crops]
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"crops: sizes {sizes}: each size once, with its count")
        if min(self.std) <= 0:
            raise ValueError(f"std: {self.std}: each must be above 0")
        return self


@dataclass(frozen=True, slots=True)
class Draws:
    """What becomes of one crop of n images.

    size: of the square crop, pixels. box: (n, 4) int32 of top, left, height, width, inside the image. flip: (n,) bool,
    left to right. The others are (n,) float32: brightness, contrast and saturation are factors (1: unchanged;
    saturation 0: grey), hue is an angle in degrees, sigma the blur's width in pixels of the crop (0: none).
    """

    size: int
    box: NDArray[np.int32]
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue_degrees: NDArray[np.float32]
    sigma: NDArray[np.float32]


def draw(
    settings: AugmentSettings,
    seed: int,
    lane: NDArray[np.integer],
    index: NDArray[np.integer],
    height: NDArray[np.integer],
    width: NDArray[np.integer],
) -> list[Draws]:
    """Draw all crops of n samples; one Draws a crop, in the order of `settings.crops`, each size `count` times.

    lane, index: (n,), the sample's place in the data. height, width: (n,), pixels of its image as decoded.
    The result for a sample depends on nothing but its own row and the seed.
    """
    crops = [crop for crop in settings.crops for _ in range(crop.count)]
    numbers = _uniforms(seed, np.asarray(lane), np.asarray(index), len(crops))
    return [_draw_crop(settings, crop, numbers[k], height, width) for k, crop in enumerate(crops)]


def colour(draws: Draws) -> tuple[Float64, Float64]:
    """The colour change of each crop as one linear step, y = matrix @ x + pull @ mean(x), on RGB values from 0 to 255.

    Returns matrices (n, 3, 3) and pulls (n, 3), a number that is added to all three channels; y is to be clipped to
    0..255 once, after the step. In this order: brightness b scales x, contrast c stretches it about the crop's own mean
    luma, and saturation s and hue h scale and turn its chroma in YIQ while its luma stays,
    y = c b K(s, h) x + (1 - c) b luma(mean(x)). torchvision's ColorJitter differs in that it does the four in random
    order and clips after each, and that its hue turns in HSV. Grey (s = 0) is the same in both.
    """
    turn, s = np.radians(draws.hue_degrees, dtype=np.float64), draws.saturation.astype(np.float64)
    chroma = np.zeros((len(s), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = s * np.cos(turn)
    chroma[:, 1, 2], chroma[:, 2, 1] = -s * np.sin(turn), s * np.sin(turn)
    contrast = draws.contrast.astype(np.float64)
    gain = contrast * draws.brightness
    matrix = gain[:, None, None] * (np.linalg.inv(_YIQ) @ chroma @ _YIQ)
    return matrix, ((1 - contrast) * draws.brightness)[:, None] * _YIQ[0]


def blur_kernels(sigma: NDArray[np.floating], radius: int) -> NDArray[np.float32]:
    """Sampled Gaussians, (n, 2 radius + 1), each of sum 1; where sigma is 0, the one that changes nothing."""
    offsets = np.arange(-radius, radius + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (offsets / np.maximum(sigma.astype(np.float64), 1e-3)[:, None]) ** 2)
    kernels: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return kernels


def philox(counter: Uint64, key: tuple[int, int]) -> Uint64:
    """Philox4x32-10: four random 32-bit words of each counter.

    counter: (4, ...) uint64 arrays of 32-bit words; returns the same shape. Source: Salmon, Moraes, Dror and Shaw,
    "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
    """
    low_word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (right >> half) ^ x1 ^ np.uint64(k0), right & low_word
        x2, x3 = (left >> half) ^ x3 ^ np.uint64(k1), left & low_word
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3])


def _uniforms(seed: int, lane: NDArray[np.integer], index: NDArray[np.integer], crops: int) -> Float64:
    """Every number of every crop, in the open interval (0, 1): (crops, blocks, 4, n).

    The seed is Philox's key, (index, lane, crop and block) its counter: no two numbers share one.
    """
    place = index.astype(np.uint64)
    slots = np.arange(crops, dtype=np.uint64)[:, None] << np.uint64(8) | np.arange(_BLOCKS, dtype=np.uint64)
    words = (place & np.uint64(0xFFFFFFFF), place >> np.uint64(32), lane.astype(np.uint64), slots[:, :, None])
    counter = np.stack(np.broadcast_arrays(*words))
    drawn = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return (np.moveaxis(drawn, 0, 2).astype(np.float64) + 0.5) * 2.0**-32


def _draw_crop(
    settings: AugmentSettings,
    crop: CropSettings,
    numbers: Float64,
    height: NDArray[np.integer],
    width: NDArray[np.integer],
) -> Draws:
    """One crop of n samples from its numbers, (blocks, 4, n)."""
    flip, jitter, grey, blur = numbers[_CHOICES] < np.array(
        [[settings.flip], [settings.jitter], [settings.grey], [settings.blur]]
    )
    u_brightness, u_contrast, u_saturation, u_hue = numbers[_FACTORS]

    def factor(u: Float64, strength: float) -> NDArray[np.float32]:
        return np.where(jitter, _between(u, max(0.0, 1 - strength), 1 + strength), 1).astype(np.float32)

    saturation = factor(u_saturation, settings.saturation)
    hue = np.where(jitter, 360 * _between(u_hue, -settings.hue, settings.hue), 0)
    sigma = np.where(blur, _between(numbers[_SIGMA][0], *settings.sigma), 0)
    return Draws(
        size=crop.size,
        box=_boxes(numbers[:_TRIES], crop.scale, settings.aspect, height, width),
        flip=flip,
        brightness=factor(u_brightness, settings.brightness),
        contrast=factor(u_contrast, settings.contrast),
        saturation=np.where(grey, np.float32(0), saturation),
        hue_degrees=hue.astype(np.float32),
        sigma=sigma.astype(np.float32),
    )


def _boxes(
    numbers: Float64,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    height: NDArray[np.integer],
    width: NDArray[np.integer],
) -> NDArray[np.int32]:
    """(n, 4) boxes from (tries, 4, n) numbers: the first try that fits into the image, else the largest centred box
    whose aspect is within the range."""
    image_h, image_w = np.asarray(height, np.int64), np.asarray(width, np.int64)
    u_area, u_aspect, u_top, u_left = np.moveaxis(numbers, 1, 0)
    area = image_h * image_w * _between(u_area, *scale)
    ratio = np.exp(_between(u_aspect, *np.log(aspect)))
    box_h, box_w = _whole(np.sqrt(area / ratio)), _whole(np.sqrt(area * ratio))
    fits = (box_h > 0) & (box_h <= image_h) & (box_w > 0) & (box_w <= image_w)
    top, left = _below(u_top, image_h - box_h + 1), _below(u_left, image_w - box_w + 1)
    tries = np.stack([top, left, box_h, box_w], axis=-1)
    first = np.take_along_axis(tries, fits.argmax(axis=0)[None, :, None], axis=0)[0]
    boxes = np.where(np.any(fits, axis=0, keepdims=True).T, first, _centred(aspect, image_h, image_w))
    return boxes.astype(np.int32)


def _centred(aspect: tuple[float, float], image_h: NDArray[np.int64], image_w: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, 4): the whole image, or as much of its middle as keeps width / height within the range."""
    box_h = np.clip(_whole(image_w / np.float64(aspect[0])), 1, image_h)
    box_w = np.clip(_whole(image_h * np.float64(aspect[1])), 1, image_w)
    return np.stack([(image_h - box_h) // 2, (image_w - box_w) // 2, box_h, box_w], axis=-1)


def _between(u: Float64, low: float, high: float) -> Float64:
    return low + u * (high - low)


def _below(u: Float64, count: NDArray[np.int64]) -> NDArray[np.int64]:
    """A whole number from 0 to count - 1; of no meaning where count < 1."""
    return (u * count).astype(np.int64)


def _whole(x: Float64) -> NDArray[np.int64]:
    """Rounded to the nearest, halves to even, as Python's round."""
    return np.rint(x).astype(np.int64)
