"""Batches as large as those of a real run, of which one image is no image."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from pipeline.augment import AugmentSettings, CropSettings, draw
from pipeline.pixels import Encoded, Graph, UndecodableError
from tests.photos import bmp_of_16_bits

AUGMENT = AugmentSettings(crops=(CropSettings(size=16, count=1, scale=(0.3, 1.0)),))
MANY, HEIGHT, WIDTH = 256, 50, 60  # DALI reads the headers of 32 and more in several threads


def encode(kind: str, **options: Any) -> bytes:
    photo = Image.fromarray(photographs.astronaut()).crop((100, 0, 100 + WIDTH, HEIGHT))
    photo.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def tiff_of_floats() -> bytes:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(file := io.BytesIO(), "TIFF")
    return file.getvalue()


JPEG, TURNED = encode("JPEG"), Image.Exif()
TURNED[0x0112] = 6
UNREADABLE = {
    "garbage": b"\xff\xd8garbage",
    "a page": b"<html><body>503 Slow Down</body></html>",
    "nothing": b"",
    "a JPEG's first bytes": JPEG[:60],
    "a PNG's first bytes": encode("PNG")[:20],
    "a GIF": encode("GIF"),
    "a BMP of no channel": bmp_of_16_bits(WIDTH, HEIGHT),
    "a TIFF of floats": tiff_of_floats(),
    "a JPEG 2000": encode("JPEG2000"),  # whose parser some files end the process in
    "a PNG of a chunk that would be 2 GB": encode("PNG")[:33] + b"\x7f\xff\xff\xffIDAT" + encode("PNG")[41:],
    "a WebP of a chunk that would be 2 GB": encode("WEBP")[:16] + b"\xfe\xff\xff\x7f" + encode("WEBP")[20:],
}


def encoded(images: list[bytes], size: tuple[int, int] = (HEIGHT, WIDTH)) -> Encoded:
    sizes = np.full((len(images), 2), size)
    return Encoded(images, sizes, draw(AUGMENT, 0, np.zeros(len(images), np.int64), np.arange(len(images)), *sizes.T))


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_without_a_header_fails_its_batch_and_no_other(kind: str) -> None:
    good = encoded([JPEG] * MANY)
    batches = [good]
    for place in (0, MANY - 1):
        images = [JPEG] * MANY
        images[place] = UNREADABLE[kind]
        batches += [encoded(images), good]
    fed = iter(batches)
    graph = Graph(AUGMENT, [16], MANY, torch.device("cpu"), threads=2, depth=2, feed=lambda: next(fed))
    graph.schedule()
    (first,) = graph.collect(good)
    for broken, whole in zip(batches[1::2], batches[2::2], strict=True):
        graph.schedule()
        with pytest.raises(UndecodableError, match=r"^does not decode: "):
            graph.collect(broken)
        graph.schedule()
        (crops,) = graph.collect(whole)
        assert torch.equal(crops, first)


@pytest.mark.parametrize("dali_cuts", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_that_the_index_has_turned_and_dali_does_not_fails_its_batch(kind: str, dali_cuts: bool) -> None:
    """Boxes would lie beyond it."""
    graph = Graph(AUGMENT, [16], 1, torch.device("cpu"), dali_cuts=dali_cuts)
    with pytest.raises(UndecodableError, match=f"^decodes to {HEIGHT} x {WIDTH} pixels, not {WIDTH} x {HEIGHT}$"):
        graph.run(encoded([encode(kind)], (WIDTH, HEIGHT)))
    graph.run(encoded([encode(kind, exif=TURNED)], (WIDTH, HEIGHT)))


def test_a_picture_whose_exif_dali_passes_over_fails_its_batch_where_the_index_has_turned_it() -> None:
    broken = Image.Exif()
    broken[0x0112], broken[0x010F] = 6, "a maker's name"
    exif = bytearray(broken.tobytes())
    exif[exif.index(b"\x01\x0f") + 7] = 0xFF  # longer than all of it: then DALI reads none of it
    graph = Graph(AUGMENT, [16], MANY, torch.device("cpu"), threads=2, dali_cuts=True)
    images = [encode("JPEG", exif=bytes(exif))] * MANY  # of some of which the boxes lie beyond the picture
    with pytest.raises(UndecodableError, match=f"^decodes to {HEIGHT} x {WIDTH} pixels, not {WIDTH} x {HEIGHT}$"):
        graph.run(encoded(images, (WIDTH, HEIGHT)))


def files() -> list[bytes]:
    """Of each kind, also of those that no shard has."""
    jpegs: list[dict[str, Any]] = [{}, {"progressive": True}, {"exif": TURNED, "subsampling": 0}]
    made = [encode("JPEG", **options) for options in jpegs]
    made += [encode("WEBP", **options) for options in ({}, {"lossless": True, "exif": TURNED})]
    made += [encode("TIFF", **options) for options in ({}, {"compression": "tiff_lzw"}, {"tiffinfo": TURNED})]
    return [*made, encode("PNG"), encode("PNG", exif=TURNED), *map(encode, ("BMP", "GIF", "JPEG2000", "PPM"))]


def spoilt(data: bytes, draw: np.random.Generator) -> bytes:
    """Cut, or some bytes of it others, most of them near its beginning, where headers are."""
    if draw.random() < 0.2:
        return data[: draw.integers(len(data))]
    changed = bytearray(data)
    for _ in range(draw.integers(1, 6)):
        near = min(len(data), 300 if draw.random() < 0.8 else len(data))
        changed[draw.integers(near)] = draw.choice([0, 1, 2, 3, 4, 8, 16, 127, 128, 255, draw.integers(256)])
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("dali_cuts", [False, True])
def test_no_bytes_that_come_in_the_place_of_an_image_end_the_process(dali_cuts: bool) -> None:
    whole, places, failed = files(), np.random.default_rng(0), 0
    graph = Graph(AUGMENT, [16], 64, torch.device("cpu"), threads=2, dali_cuts=dali_cuts)
    for _ in range(100):
        images = [JPEG] * 64
        for place in places.choice(64, places.integers(1, 40), replace=False):
            images[place] = spoilt(whole[places.integers(len(whole))], places)
        try:
            graph.run(encoded(images))
        except UndecodableError:
            failed += 1
    assert failed > 90
    assert len(graph.run(encoded([JPEG] * 64))) == 1


def test_no_size_that_an_index_says_makes_an_image_of_what_is_none() -> None:
    graph = Graph(AUGMENT, [16], MANY, torch.device("cpu"))
    for size in ((1, 1), (1, 2), (2, 1)):
        with pytest.raises(UndecodableError, match=r"^does not decode: "):
            graph.run(encoded([b"garbage"] * MANY, size))
