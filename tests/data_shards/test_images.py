"""Which files become samples: each rule with real bytes that break it."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_shards.images import Refused, convert, examine, read_file, read_photo

LIMITS = {"min_side": 16, "max_pixels": 10_000}


def picture(width: int = 64, height: int = 40, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, kind, **options)
    return out.getvalue()


def several(kind: str) -> bytes:
    return encoded(kind, save_all=True, append_images=[picture().rotate(180)])


def reason(data: bytes) -> str:
    with pytest.raises(Refused) as refused:
        examine(data, **LIMITS)
    assert "\n" not in refused.value.detail
    return refused.value.reason


ACCEPTED: list[tuple[str, Callable[[], bytes], str]] = [
    ("baseline JPEG", lambda: encoded("JPEG"), "jpg"),
    ("progressive JPEG", lambda: encoded("JPEG", progressive=True), "jpg"),
    ("grey JPEG", lambda: encoded("JPEG", picture(mode="L")), "jpg"),
    ("CMYK JPEG", lambda: encoded("JPEG", picture(mode="CMYK")), "jpg"),
    ("JPEG with a second picture", lambda: several("MPO"), "jpg"),
    ("PNG", lambda: encoded("PNG"), "png"),
    ("PNG of 1 bit", lambda: encoded("PNG", picture(mode="1")), "png"),
    ("PNG with a palette", lambda: encoded("PNG", picture(mode="P")), "png"),
    ("PNG with alpha", lambda: encoded("PNG", picture(mode="RGBA")), "png"),
    ("WebP", lambda: encoded("WEBP"), "webp"),
    ("BMP", lambda: encoded("BMP"), "bmp"),
    ("TIFF", lambda: encoded("TIFF"), "tif"),
    ("TIFF by LZW", lambda: encoded("TIFF", compression="tiff_lzw"), "tif"),
]


@pytest.mark.parametrize(("data", "extension"), [(a[1], a[2]) for a in ACCEPTED], ids=[a[0] for a in ACCEPTED])
def test_a_whole_image_is_kept_as_it_came(data: Callable[[], bytes], extension: str) -> None:
    photo = examine(data(), **LIMITS)
    assert (photo.data, photo.extension, photo.converted) == (data(), extension, False)
    assert (photo.width, photo.height) == (64, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_is_as_seen_after_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, **({"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}))
    photo = examine(data, **LIMITS)
    with Image.open(io.BytesIO(data)) as image:
        assert (photo.width, photo.height) == ImageOps.exif_transpose(image).size


def test_a_still_gif_becomes_a_png_with_the_same_pixels_each_time() -> None:
    gif = encoded("GIF", picture(mode="P"))
    photo = examine(gif, **LIMITS)
    assert (photo.extension, photo.converted) == ("png", True)
    assert photo.data == convert(gif) == convert(gif)
    with Image.open(io.BytesIO(gif)) as before, Image.open(io.BytesIO(photo.data)) as after:
        assert after.format == "PNG"
        assert np.array_equal(before.convert("RGB"), after)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_and_several_pages_are_refused(kind: str) -> None:
    assert reason(several(kind)) == "several frames"


@pytest.mark.parametrize(
    "data", [b"hello", b"<html></html>" * 50, os.urandom(5000), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff"]
)
def test_what_is_not_an_image_is_refused(data: bytes) -> None:
    assert reason(data) == "not an image"


@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF") for cut in (1, 5, 20, 1000, 0.1, 0.5, 0.9)]
    + [("GIF", cut) for cut in (1000, 0.1, 0.5, 0.9)],  # the last bytes of a GIF hold no pixels
)
def test_a_cut_image_is_refused(kind: str, cut: float) -> None:
    data = encoded(kind, picture(96, 96))
    assert reason(data[: -int(cut if cut >= 1 else len(data) * cut)]) in ("damaged", "not an image")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_any_damage_is_either_refused_or_still_an_image(kind: str) -> None:
    whole, random = encoded(kind), np.random.default_rng(1)
    for _ in range(200):
        data = bytearray(whole)
        for at in random.integers(0, min(len(data), 400), 3):
            data[at] = random.integers(0, 256)
        try:
            photo = examine(bytes(data), **LIMITS)
        except Refused as refused:
            assert refused.reason  # noqa: PT017
        else:
            assert photo.width * photo.height <= 10_000


def test_a_side_below_and_an_area_above_the_limit_are_refused_and_at_the_limit_taken() -> None:
    assert reason(encoded("PNG", picture(15, 90))) == "too small"
    assert reason(encoded("PNG", picture(101, 100))) == "too many pixels"
    assert examine(encoded("PNG", picture(16, 90)), **LIMITS).width == 16
    assert examine(encoded("PNG", picture(100, 100)), **LIMITS).width == 100


def test_a_bomb_is_refused_by_its_header_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (30_000, 5_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        assert reason(bomb) == "too many pixels"


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xCA])
def test_jpegs_of_a_coding_that_decoders_differ_on_are_refused(marker: int) -> None:
    data = bytearray(encoded("JPEG"))
    data[data.index(b"\xff\xc0") + 1] = marker  # lossless, arithmetic, progressive arithmetic
    assert reason(bytes(data)) == "unusual coding"


def test_a_tiff_of_one_bit_is_refused() -> None:
    assert reason(encoded("TIFF", picture(mode="1"))) == "unusual coding"


def test_files_that_are_empty_too_large_or_no_files_are_refused_without_reading_them(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(b"." * 101)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    found = {}
    for name in ("empty", "large", "pipe", "dangling"):
        with pytest.raises(Refused) as refused:
            read_file(tmp_path / name, 100)
        found[name] = refused.value.reason
    assert found == {
        "empty": "empty",
        "large": "too many bytes",
        "pipe": "not a file",
        "dangling": "not a file",
    }


def test_a_file_is_read_and_judged_in_one(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("PNG"))
    assert read_photo(tmp_path / "a.jpg", max_bytes=10**6, **LIMITS).extension == "png"  # by content, not by name
