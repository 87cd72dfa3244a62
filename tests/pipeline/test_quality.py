"""How far the crops of real photographs are from a reference without any rounding, both ways of cutting.

In levels of 255. Limits are twice what was measured (docs/BENCHMARKS.md), and 4 decibels below it.
"""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.augment import AugmentSettings, Draws, draw
from pipeline.pixels import Encoded, Graph
from tests.photos import photographs

AUGMENT = AugmentSettings()  # 2 x 224 and 6 x 96, as trained
SEED, COPIES = 5, 3  # each photograph so many times, with other draws
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@pytest.fixture(scope="module")
def batch() -> Encoded:
    images = []
    for photo in photographs() * COPIES:
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    sizes = np.array([photo.size[::-1] for photo in photographs() * COPIES])
    places = np.arange(len(images))
    return Encoded(images, sizes, draw(AUGMENT, SEED, np.zeros_like(places), places, *sizes.T))


def levels(batch: Encoded, dali_cuts: bool) -> list[NDArray[np.float64]]:
    """Each crop of all images, (n, s, s, 3), from 0 to 255."""
    sizes = [crop.size for crop in batch.draws]
    graph = Graph(AUGMENT, sizes, len(batch.images), torch.device("cpu"), dali_cuts=dali_cuts)
    flat = [crops[:, k] for crops in graph.run(batch) for k in range(crops.shape[1])]
    return [255 * (x.permute(0, 2, 3, 1).numpy().astype(np.float64) * AUGMENT.std + AUGMENT.mean) for x in flat]


@pytest.fixture(scope="module")
def by_torch(batch: Encoded) -> list[NDArray[np.float64]]:
    return levels(batch, dali_cuts=False)


@pytest.fixture(scope="module")
def by_dali(batch: Encoded) -> list[NDArray[np.float64]]:
    return levels(batch, dali_cuts=True)


def expected(image: bytes, crop: Draws, i: int, beyond: bool) -> NDArray[np.float64]:
    """One crop without a rounding: PIL's antialiased resize of floats, a true Gaussian, each colour step in turn.

    beyond: whether the resize sees what lies around the box.
    """
    top, left, height, width = (int(v) for v in crop.box[i])
    box = (left, top, left + width, top + height)
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    if not beyond:
        opened, box = opened.crop(box), (0, 0, width, height)
    bands = [band.convert("F").resize((crop.size,) * 2, Image.Resampling.BILINEAR, box) for band in opened.split()]
    x = np.stack([np.asarray(band, np.float64) for band in bands], axis=-1)
    if crop.flip[i]:
        x = x[:, ::-1]
    if crop.sigma[i] > 0:
        x = ndimage.gaussian_filter(x, (float(crop.sigma[i]),) * 2 + (0,), truncate=6, mode="nearest")
    x = x * crop.brightness[i]
    x = crop.contrast[i] * x + (1 - crop.contrast[i]) * (x @ YIQ[0]).mean()
    luma = (x @ YIQ[0])[..., None]
    x = crop.saturation[i] * x + (1 - crop.saturation[i]) * luma
    turn = np.exp(1j * np.radians(float(crop.hue_degrees[i])))
    chroma = (x @ YIQ[1] + 1j * (x @ YIQ[2])) * turn
    yiq = np.stack([luma[..., 0], chroma.real, chroma.imag], axis=-1)
    return np.clip(yiq @ np.linalg.inv(YIQ).T, 0, 255)


def errors(batch: Encoded, ours: list[NDArray[np.float64]], beyond: bool) -> tuple[NDArray[np.float64], float]:
    """The mean absolute difference of each crop of each image, and the PSNR over all, in decibels."""
    means, squares = [], []
    for crop, pixels in zip(batch.draws, ours, strict=True):
        for i, image in enumerate(batch.images):
            difference = pixels[i] - expected(image, crop, i, beyond)
            means.append(np.abs(difference).mean())
            squares.append((difference**2).mean())
    return np.array(means), 10 * np.log10(255**2 / np.mean(squares))


def test_crops_of_a_cpu_are_those_of_a_float_reference(batch: Encoded, by_torch: list[NDArray[np.float64]]) -> None:
    means, psnr = errors(batch, by_torch, beyond=False)
    assert means.mean() < 0.3
    assert means.max() < 1.3
    assert psnr > 55.5


def test_crops_that_dali_cuts_are_those_of_a_float_reference(
    batch: Encoded, by_dali: list[NDArray[np.float64]]
) -> None:
    """The graph of a GPU, run on a CPU."""
    means, psnr = errors(batch, by_dali, beyond=True)
    assert means.mean() < 0.4
    assert means.max() < 1.9
    assert psnr > 54.5


def test_both_ways_of_cutting_give_nearly_the_same_crops(
    by_torch: list[NDArray[np.float64]], by_dali: list[NDArray[np.float64]]
) -> None:
    """But for a rim of four pixels, where one of them sees beyond the box."""
    differences = [np.abs(a - b) for a, b in zip(by_torch, by_dali, strict=True)]
    inner = [x[:, 4:-4, 4:-4].mean(axis=(1, 2, 3)) for x in differences]
    whole = [x.mean(axis=(1, 2, 3)) for x in differences]
    assert np.mean(inner) < 0.35
    assert np.max(inner) < 1.9
    assert np.mean(whole) < 0.35
