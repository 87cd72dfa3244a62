"""The baselines against counting and averaging pixel by pixel."""

import numpy as np
import pytest
import torch

from pipeline.evaluate.baselines import colours, histogram, pixels


def random_images(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def test_the_histogram_counts_each_pixel_in_its_box_of_the_colour_cube() -> None:
    images = random_images(3, 12)
    expected = np.zeros((3, 512))
    for n, image in enumerate(images):
        for red, green, blue in image.reshape(3, -1).T.tolist():
            expected[n, 64 * (red // 32) + 8 * (green // 32) + blue // 32] += 1 / 144
    assert np.allclose(histogram(torch.tensor(images) / 255).numpy(), expected, atol=1e-6)


def test_the_histogram_does_not_move_when_normalisation_rounds() -> None:
    images = torch.tensor(random_images(2, 16)) / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.equal(histogram(colours(normalised, mean, std)), histogram(images))


def test_pixels_are_means_of_six_by_six_at_96_pixels() -> None:
    images = random_images(2, 96) / 255
    expected = images.reshape(2, 3, 16, 6, 16, 6).mean(axis=(3, 5)).reshape(2, -1)
    assert pixels(torch.tensor(images)).numpy() == pytest.approx(expected)
