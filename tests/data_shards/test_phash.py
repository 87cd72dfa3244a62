"""The perceptual hash: equal for what looks the same, far apart for what does not."""

import io
import itertools
import struct

import imagehash
import numpy as np
import pytest
from PIL import Image

from data_shards.phash import perceptual_hash
from tests.photos import photographs


def distance(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def encoded(photo: Image.Image, kind: str, **options: object) -> Image.Image:
    out = io.BytesIO()
    photo.save(out, kind, **options)
    image = Image.open(io.BytesIO(out.getvalue()))
    image.load()
    return image


def reference(photo: Image.Image) -> int:
    """The hash by its formula, from the library's own way to 32 x 32 pixels, in float64."""
    grey = np.asarray(photo.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    place = np.arange(32)
    cosines = np.cos(np.pi / 32 * (place[None, :] + 0.5) * place[:8, None])
    low = cosines @ grey @ cosines.T
    return int("".join("1" if value > np.median(low) else "0" for value in low.flatten()), 2)


def test_it_is_the_librarys_phash_but_for_a_few_bits_that_its_quicker_resize_turns() -> None:
    for photo in photographs():
        library = int(str(imagehash.phash(photo)), 16)
        assert library == reference(photo)
        assert (perceptual_hash(photo) ^ library).bit_count() <= 2


def test_it_fills_64_bits_and_half_of_them_are_set_in_a_photograph() -> None:
    for photo in photographs():
        found = perceptual_hash(photo)
        assert 0 <= found < 2**64
        assert found.bit_count() == 32


def test_photographs_are_far_apart() -> None:
    assert min(distance(*two) for two in itertools.combinations(photographs(), 2)) >= 16


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 50}), ("WEBP", {"quality": 60}), ("PNG", {})])
def test_a_photograph_encoded_anew_stays_near(kind: str, options: dict[str, object]) -> None:
    for photo in photographs():
        assert distance(photo, encoded(photo, kind, **options)) <= 4


def test_a_photograph_resized_stays_near() -> None:
    for photo in photographs():
        for scale in (0.5, 2):
            size = (round(photo.width * scale), round(photo.height * scale))
            assert distance(photo, photo.resize(size, Image.Resampling.BICUBIC)) <= 4


def orientation_tag(orientation: int) -> bytes:
    """EXIF with nothing but the orientation."""
    return b"Exif\0\0" + b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_sees_an_image_as_its_orientation_says(orientation: int) -> None:
    for photo in photographs():
        stored = photo.transpose(TURNED[orientation]) if orientation > 1 else photo
        tagged = encoded(stored, "JPEG", quality=95, exif=orientation_tag(orientation))
        assert distance(photo, tagged) <= 2
        if orientation > 1:
            assert distance(photo, encoded(stored, "JPEG", quality=95)) > 16


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "1"])
def test_an_image_of_any_mode_has_a_hash_near_that_of_its_colours(mode: str) -> None:
    photo = photographs()[0]
    if mode.startswith("I"):
        deep = np.asarray(photo.convert("L"), np.uint16) * 257
        image = Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
    else:
        image = photo.convert(mode)
    assert image.mode == mode
    assert distance(photo, image) <= 4


def test_an_image_without_detail_has_few_bits() -> None:
    for colour in ((0, 0, 0), (255, 255, 255), (40, 90, 200)):
        assert perceptual_hash(Image.new("RGB", (500, 375), colour)).bit_count() < 16


def test_the_smallest_and_the_longest_images_have_a_hash() -> None:
    for size in ((1, 1), (1, 4000), (4000, 1), (31, 33)):
        assert 0 <= perceptual_hash(Image.effect_noise(size, 80)) < 2**64
