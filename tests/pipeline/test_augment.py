"""pipeline.augment against published vectors, frozen draws and a plain loop over torchvision's rule."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from pipeline.augment import AugmentSettings, CropSettings, Draws, blur_kernels, colour, draw, philox

SEED = 20
SAMPLES = 10_000
SHAPES = [(375, 500), (500, 375), (128, 128), (90, 1200), (1500, 60), (333, 37)]


def one_crop(scale: tuple[float, float] = (0.14, 1.0), **changes: object) -> AugmentSettings:
    return AugmentSettings(crops=(CropSettings(size=64, count=1, scale=scale),), **changes)


def draw_many(settings: AugmentSettings, n: int, height: int, width: int, seed: int = SEED) -> list[Draws]:
    return draw(settings, seed, np.arange(n) % 4, np.arange(n) // 4, np.full(n, height), np.full(n, width))


def torchvision_box(
    rng: random.Random, height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box as torchvision documents it, one sample at a time."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height
    if width / height < aspect[0]:
        h = round(w / aspect[0])
    elif width / height > aspect[1]:
        w = round(h * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: list[int], key: list[int], words: str) -> None:
    drawn = philox(np.array(counter, np.uint64), (key[0], key[1]))
    assert " ".join(f"{word:08x}" for word in drawn) == words


def test_the_draws_of_a_place_never_change() -> None:
    """Golden vectors: another value here means that no run from before can be gone on with."""
    drawn = draw(
        AugmentSettings(),
        0x1234_5678_9ABC_DEF0,
        lane=np.array([0, 3, 63]),
        index=np.array([0, 17, 2**40 + 5]),
        height=np.array([375, 480, 90]),
        width=np.array([500, 320, 1200]),
    )
    big, small = drawn[0], drawn[7]
    assert [(d.size, len(d.box)) for d in drawn] == [(224, 3)] * 2 + [(96, 3)] * 6
    assert big.box.tolist() == [[153, 54, 181, 177], [113, 105, 186, 210], [0, 540, 90, 120]]
    assert big.flip.tolist() == [False, True, True]
    assert big.brightness == pytest.approx([0.376927, 1.125719, 1.436672], abs=2e-6)
    assert big.contrast == pytest.approx([1.321482, 0.231253, 0.883718], abs=2e-6)
    assert big.saturation == pytest.approx([0.478647, 0.911159, 0.457353], abs=2e-6)
    assert big.hue_degrees == pytest.approx([-28.600418, -64.831589, 55.729401], abs=2e-6)
    assert big.sigma == pytest.approx([0.582561, 0.0, 1.41031], abs=2e-6)
    assert small.box.tolist() == [[115, 317, 154, 128], [182, 144, 114, 126], [5, 319, 80, 71]]
    assert small.flip.tolist() == [False, True, True]
    assert small.brightness == pytest.approx([1.786974, 1.0, 1.0], abs=2e-6)
    assert small.contrast == pytest.approx([0.874556, 1.0, 1.0], abs=2e-6)
    assert small.saturation == pytest.approx([0.0, 1.0, 1.0], abs=2e-6)
    assert small.hue_degrees == pytest.approx([65.01329, 0.0, 0.0], abs=2e-6)
    assert small.sigma == pytest.approx([0.0, 0.0, 0.533526], abs=2e-6)


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_distributed_as_torchvision_draws_them(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    settings = one_crop(scale)
    ours = draw_many(settings, SAMPLES, *shape)[0].box.astype(np.float64)
    rng = random.Random(SEED)
    theirs = np.array([torchvision_box(rng, *shape, scale, settings.aspect) for _ in range(SAMPLES)], np.float64)
    measures = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
    }
    for name, measure in measures.items():
        p = stats.ks_2samp(measure(ours), measure(theirs), method="asymp").pvalue
        assert p > 1e-3, f"{name} of {shape}, {scale}: p = {p}"


def test_an_elongated_image_gets_the_centred_box_when_ten_tries_fail() -> None:
    boxes = draw_many(one_crop((0.5, 1.0)), 200, 90, 1200)[0].box
    assert (boxes == [0, 540, 90, 120]).all()
    boxes = draw_many(one_crop((0.5, 1.0)), 200, 1500, 60)[0].box
    assert (boxes == [710, 0, 80, 60]).all()


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    seed=st.integers(-(2**70), 2**70),
)
def test_a_box_is_never_empty_and_never_leaves_the_image(
    height: int, width: int, scale: list[float], seed: int
) -> None:
    top, left, box_h, box_w = draw_many(one_crop((scale[0], scale[1])), 8, height, width, seed)[0].box.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (box_h > 0).all()
    assert (box_w > 0).all()
    assert (top + box_h <= height).all()
    assert (left + box_w <= width).all()


def test_flip_jitter_grey_and_blur_come_at_their_rates_and_independently() -> None:
    settings = AugmentSettings()
    drawn = draw_many(settings, SAMPLES, 375, 500)
    flip = np.stack([d.flip for d in drawn])
    jitter = np.stack([d.hue_degrees != 0 for d in drawn])
    grey = np.stack([d.saturation == 0 for d in drawn])
    blur = np.stack([d.sigma > 0 for d in drawn])
    choices = {"flip": (flip, 0.5), "jitter": (jitter, 0.8), "grey": (grey, 0.2), "blur": (blur, 0.5)}
    for name, (chosen, rate) in choices.items():
        for crop, share in enumerate(chosen.mean(axis=1)):
            assert stats.binomtest(round(share * SAMPLES), SAMPLES, rate).pvalue > 1e-4, (name, crop, share)
    bits = np.concatenate([chosen for chosen, _ in choices.values()]).astype(np.float64)
    correlation = np.corrcoef(bits) - np.eye(len(bits))
    assert np.abs(correlation).max() < 5 / math.sqrt(SAMPLES)


def test_factors_are_uniform_where_jitter_was_drawn_and_neutral_elsewhere() -> None:
    drawn = draw_many(one_crop(grey=0.0), SAMPLES, 375, 500)[0]
    jitter = drawn.hue_degrees != 0
    ranges = {"brightness": (0.2, 1.8), "contrast": (0.2, 1.8), "saturation": (0.2, 1.8), "hue_degrees": (-72, 72)}
    for name, (low, high) in ranges.items():
        values = getattr(drawn, name)
        assert (values[~jitter] == (0 if name == "hue_degrees" else 1)).all()
        assert stats.kstest(values[jitter], stats.uniform(low, high - low).cdf).pvalue > 1e-3, name
    assert stats.kstest(drawn.sigma[drawn.sigma > 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_a_sample_draws_the_same_alone_and_among_others() -> None:
    lane, index = np.repeat([0, 1, 2, 3], 2), np.array([5, 6] * 4)
    height, width = np.arange(200, 208), np.arange(300, 308)
    whole = draw(AugmentSettings(), SEED, lane, index, height, width)
    for row in range(8):
        alone = draw(AugmentSettings(), SEED, *(column[row : row + 1] for column in (lane, index, height, width)))
        for ours, theirs in zip(whole, alone, strict=True):
            assert ours.box[row].tolist() == theirs.box[0].tolist()
            assert (ours.sigma[row], ours.hue_degrees[row]) == (theirs.sigma[0], theirs.hue_degrees[0])


@pytest.mark.parametrize(
    "other", [(SEED + 1, 0, 0), (SEED + 2**40, 0, 0), (SEED, 1, 0), (SEED, 0, 1), (SEED, 0, 2**32)]
)
def test_another_seed_lane_or_index_draws_something_else(other: tuple[int, int, int]) -> None:
    def boxes(seed: int, lane: int, index: int) -> list[list[int]]:
        place = (np.array([value]) for value in (lane, index, 400, 600))
        return [drawn.box[0].tolist() for drawn in draw(AugmentSettings(), seed, *place)]

    first = boxes(SEED, 0, 0)
    assert len({tuple(box) for box in first}) == len(first)
    assert all(ours != theirs for ours, theirs in zip(first, boxes(*other), strict=True))


def test_the_choices_of_a_replaced_sample_stay_those_of_its_place() -> None:
    """Only the box looks at the image."""
    before, after = draw_many(AugmentSettings(), 50, 375, 500), draw_many(AugmentSettings(), 50, 640, 480)
    for ours, theirs in zip(before, after, strict=True):
        for name in ("flip", "brightness", "contrast", "saturation", "hue_degrees", "sigma"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))


def test_no_jitter_leaves_a_colour_and_no_saturation_leaves_its_luma() -> None:
    drawn = draw_many(one_crop(jitter=0.0, grey=0.5), 100, 375, 500)[0]
    matrix, pull = colour(drawn)
    rgb = np.random.default_rng(SEED).uniform(0, 255, (100, 3))
    luma = np.repeat((rgb @ [0.299, 0.587, 0.114])[:, None], 3, axis=1)
    expected = np.where((drawn.saturation == 0)[:, None], luma, rgb)
    assert np.abs((matrix @ rgb[:, :, None])[:, :, 0] - expected).max() < 1e-9
    assert not pull.any()


def test_saturation_and_hue_keep_the_luma_and_contrast_keeps_the_mean_luma_of_a_crop() -> None:
    drawn = draw_many(one_crop(brightness=0.0, contrast=0.0, grey=0.0), 100, 375, 500)[0]
    matrix, _ = colour(drawn)
    rgb = np.random.default_rng(SEED).uniform(0, 255, (100, 3))
    assert np.abs(((matrix @ rgb[:, :, None])[:, :, 0] - rgb) @ [0.299, 0.587, 0.114]).max() < 1e-9
    drawn = draw_many(one_crop(grey=0.0), 100, 375, 500)[0]
    matrix, pull = colour(drawn)
    coloured = (matrix @ rgb[:, :, None])[:, :, 0] + (pull * rgb).sum(1)[:, None]  # of crops of one colour
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(coloured @ luma - drawn.brightness * (rgb @ luma)).max() < 1e-4  # factors are float32
    assert np.abs(matrix - np.eye(3)).max() > 0.5


def test_blur_kernels_are_gaussians_and_no_blur_is_the_identity() -> None:
    kernels = blur_kernels(np.array([0.0, 0.1, 1.0, 2.0], np.float32), 6)
    x = np.arange(-6, 7)
    for sigma, kernel in ((1.0, kernels[2]), (2.0, kernels[3])):
        density = stats.norm.pdf(x, scale=sigma)
        assert kernel == pytest.approx(density / density.sum(), abs=1e-7)
    assert kernels[0].tolist() == (x == 0).tolist()
    assert kernels.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"crops": [{"size": 96, "count": 1, "scale": [0.5, 0.1]}]}, r"scale: \[0.5, 0.1\]"),
        ({"crops": [{"size": 96, "count": 1, "scale": [0.1, 0.5]}] * 2}, r"each size once"),
        ({"crops": []}, "crops"),
        ({"sigma": [0.0, 2.0]}, r"sigma: \[0.0, 2.0\]"),
        ({"hue": 0.6}, "hue"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(changes: dict[str, object], found: str) -> None:
    with pytest.raises(ValidationError, match=found):
        AugmentSettings.model_validate(changes)
