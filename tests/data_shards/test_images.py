"""Which files become samples: each rule with real bytes that break it."""

import ast
import io
import pickle
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from data_shards.exif import jpeg_segments
from data_shards.exif import orientation as exif_orientation
from data_shards.images import Refused, Rules, examine
from data_shards.phash import perceptual_hash
from tests.photos import bmp_of_16_bits, photographs

LIMITS = Rules(min_side=16, max_pixels=10_000)


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
    return reason_of(data, LIMITS)


def reason_of(data: bytes, rules: Rules) -> str:
    with pytest.raises(Refused) as refused:
        examine(data, rules)
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
    ("TIFF", lambda: encoded("TIFF"), "tif"),
    ("TIFF by LZW", lambda: encoded("TIFF", compression="tiff_lzw"), "tif"),
]


@pytest.mark.parametrize(("data", "extension"), [(a[1], a[2]) for a in ACCEPTED], ids=[a[0] for a in ACCEPTED])
def test_a_whole_image_is_kept_as_it_came(data: Callable[[], bytes], extension: str) -> None:
    photo = examine(data(), LIMITS)
    assert (photo.data, photo.extension, photo.converted) == (data(), extension, False)
    assert (photo.width, photo.height) == (64, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_is_as_seen_after_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, **({"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}))
    photo = examine(data, LIMITS)
    with Image.open(io.BytesIO(data)) as image:
        assert (photo.width, photo.height) == ImageOps.exif_transpose(image).size


def test_a_still_gif_becomes_a_png_with_the_same_pixels_each_time() -> None:
    gif = encoded("GIF", picture(mode="P"))
    photo = examine(gif, LIMITS)
    assert (photo.extension, photo.converted) == ("png", True)
    assert photo.data == examine(gif, LIMITS).data
    with Image.open(io.BytesIO(gif)) as before, Image.open(io.BytesIO(photo.data)) as after:
        assert after.format == "PNG"
        assert np.array_equal(before.convert("RGB"), after)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_and_several_pages_are_refused(kind: str) -> None:
    assert reason(several(kind)) == "several frames"


def test_the_pages_of_a_tiff_are_not_counted_to_refuse_it() -> None:
    whole = encoded("TIFF")
    (directory,) = struct.unpack_from("<I", whole, 4)
    (entries,) = struct.unpack_from("<H", whole, directory)
    page = whole[directory : directory + 2 + 12 * entries]
    assert len(whole) % 2 == 0
    starts = range(len(whole), len(whole) + 6000 * (len(page) + 4), len(page) + 4)
    chain = b"".join(page + struct.pack("<I", start) for start in [*starts[1:], 0])
    linked = whole[: directory + len(page)] + struct.pack("<I", len(whole)) + whole[directory + len(page) + 4 :]
    begun = time.process_time()
    assert reason(linked + chain) == "several frames"
    assert time.process_time() - begun < 0.5  # to go through them takes their number squared


@pytest.mark.parametrize(
    "data",
    [b"hello", b"<html></html>" * 50, random.Random(0).randbytes(5000), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff"],
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
    whole, rng = encoded(kind), np.random.default_rng(1)
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 400), 3):
            data[at] = rng.integers(0, 256)
        try:
            photo = examine(bytes(data), LIMITS)
        except Refused as refused:
            assert refused.reason  # noqa: PT017
        else:
            assert photo.width * photo.height <= 10_000


def test_a_side_below_and_an_area_above_the_limit_are_refused_and_at_the_limit_taken() -> None:
    assert reason(encoded("PNG", picture(15, 90))) == "too small"
    assert reason(encoded("PNG", picture(101, 100))) == "too many pixels"
    assert examine(encoded("PNG", picture(16, 90)), LIMITS).width == 16
    assert examine(encoded("PNG", picture(100, 100)), LIMITS).width == 100


def bombs() -> dict[str, bytes]:
    """Small files that are, or claim to be, images of 900 million pixels and more."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 30_000
    rows = zlib.compress(bytes(side * (1 + side // 8)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    jpeg, gif, lossless, canvas = map(bytearray, (encoded("JPEG"), encoded("GIF"), webp(lossless=True), webp()))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    lossless[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    canvas[24:30] = (40_000).to_bytes(3, "little") * 2
    lossy = bytearray(encoded("WEBP"))
    lossy[26:30] = struct.pack("<HH", 16_383, 16_383)
    tiff = encoded("TIFF")
    for size in (64, 40):
        tiff = tiff.replace(struct.pack("<HII", 4, 1, size), struct.pack("<HII", 4, 1, 60_000))
    return {
        "PNG": b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""),
        "JPEG": bytes(jpeg),
        "GIF": bytes(gif),
        "WebP": bytes(lossy),
        "lossless WebP": bytes(lossless),
        "extended WebP": bytes(canvas),
        "TIFF": tiff,
    }


def webp(**options: Any) -> bytes:
    return encoded("WEBP", **options) if options else encoded("WEBP", exif=oriented(6))


@pytest.mark.slow
def test_a_bomb_is_refused_by_its_header_before_it_takes_memory(tmp_path: Path) -> None:
    (tmp_path / "bombs").write_bytes(pickle.dumps(bombs()))
    assert (tmp_path / "bombs").stat().st_size < 200_000
    program = f"""
import pickle, resource
from data_shards.images import Refused, Rules, examine
def reason(data):
    try:
        return examine(data, Rules(max_aspect=1e9)).width
    except Refused as refused:
        return refused.reason
bombs = pickle.load(open({str(tmp_path / "bombs")!r}, "rb"))
reason(b"loads Pillow's parts")
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 48 * 2**20,) * 2)
print({{kind: reason(data) for kind, data in bombs.items()}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    found = ast.literal_eval(done.stdout)
    assert found == dict.fromkeys(bombs(), "too many pixels")


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xCA])
def test_jpegs_of_a_coding_that_decoders_differ_on_are_refused(marker: int) -> None:
    data = bytearray(encoded("JPEG"))
    data[data.index(b"\xff\xc0") + 1] = marker  # lossless, arithmetic, progressive arithmetic
    assert reason(bytes(data)) == "unusual coding"


def test_a_jpeg_of_more_scans_than_dali_takes_is_refused() -> None:
    data = encoded("JPEG", progressive=True)
    scan = next(data[start:end] for marker, start, end in jpeg_segments(data) if marker == 0xDA)
    assert reason(data[:-2] + scan * 300 + data[-2:]) == "unusual coding"


def test_a_jpeg_with_bytes_between_its_segments_is_refused_as_dali_does_not_decode_it() -> None:
    data = encoded("JPEG")
    at = data.index(b"\xff\xc4")
    with Image.open(io.BytesIO(data[:at] + b"junk" + data[at:])) as image:
        image.load()  # Pillow passes over them
    assert reason(data[:at] + b"junk" + data[at:]) == "unusual coding"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_tiff_whose_range_nobody_knows_is_refused(mode: str) -> None:
    assert reason(encoded("TIFF", picture(mode="L").convert(mode))) == "unusual coding"


def test_an_orientation_in_xmp_alone_is_not_applied_as_dali_does_not_either() -> None:
    assert (examine(encoded("JPEG", xmp=XMP), LIMITS).width, examine(encoded("WEBP", xmp=XMP), LIMITS).width) == (
        64,
        64,
    )


def small_photo(mode: str = "RGB") -> Image.Image:
    return photographs()[1].resize((64, 40)).convert(mode)


def cmyk_without_adobes_mark() -> bytes:
    data = encoded("JPEG", small_photo("CMYK"))
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 16 :]


CONVERSIONS: list[tuple[str, Callable[[], bytes], str]] = [
    ("BMP", lambda: encoded("BMP", small_photo()), "png"),
    ("BMP of 16 bits", lambda: bmp_of_16_bits(64, 40), "png"),
    ("CMYK JPEG without Adobe's mark", cmyk_without_adobes_mark, "jpg"),
    ("AVIF", lambda: encoded("AVIF", small_photo()), "jpg"),
    ("JPEG 2000", lambda: encoded("JPEG2000", small_photo()), "jpg"),
    ("PPM", lambda: encoded("PPM", small_photo()), "png"),
    ("TIFF of 1 bit", lambda: encoded("TIFF", small_photo("1")), "png"),
    ("TIFF of 16 bits", lambda: encoded("TIFF", Image.fromarray(np.full((40, 64), 0x8001, np.uint16))), "png"),
    ("TIFF of CMYK", lambda: encoded("TIFF", small_photo("CMYK")), "png"),
]


@pytest.mark.parametrize(("make", "extension"), [(c[1], c[2]) for c in CONVERSIONS], ids=[c[0] for c in CONVERSIONS])
def test_what_dali_does_not_read_is_converted_to_the_same_bytes_each_time(
    make: Callable[[], bytes], extension: str
) -> None:
    photo = examine(make(), LIMITS)
    assert (photo.extension, photo.converted, photo.width, photo.height) == (extension, True, 64, 40)
    assert photo.phash is not None
    assert examine(make(), LIMITS).data == photo.data
    with Image.open(io.BytesIO(make())) as before, Image.open(io.BytesIO(photo.data)) as after:
        expected = np.asarray(before) >> 8 if before.mode == "I;16" else np.asarray(before.convert("RGB"))
        difference = np.asarray(after.convert("L" if expected.ndim == 2 else "RGB")).astype(int) - expected
        assert np.abs(difference).mean() < (6 if extension == "jpg" else 1e-9)


def test_elongated_images_are_refused_and_those_at_the_limit_taken() -> None:
    assert reason(encoded("PNG", picture(16, 161))) == "too elongated"
    assert reason(encoded("PNG", picture(161, 16))) == "too elongated"
    assert examine(encoded("PNG", picture(16, 160)), LIMITS).height == 160


def test_more_bytes_than_the_limit_are_refused() -> None:
    with pytest.raises(Refused, match="too many bytes"):
        examine(encoded("PNG"), Rules(max_bytes=100))


def test_only_the_header_is_read_when_that_is_asked_for() -> None:
    data = encoded("JPEG", photographs()[1])
    cut = data[: len(data) // 2]
    assert reason_of(cut, Rules()) == "damaged"
    photo = examine(cut, Rules(decode="header"))
    assert (photo.width, photo.height, photo.phash, photo.data) == (451, 300, None, cut)


def test_a_photograph_is_hashed_as_it_is_seen() -> None:
    photo = photographs()[1]
    plain, turned = encoded("PNG", photo), encoded("PNG", photo.rotate(90, expand=True), exif=oriented(6))
    assert examine(plain, Rules()).phash == examine(turned, Rules()).phash == perceptual_hash(photo)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_larger_image_is_shrunk_upright_to_the_longest_side_and_a_smaller_one_stays(
    kind: str, orientation: int
) -> None:
    photo, rules = photographs()[1], Rules(longest_side=128)
    options: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": oriented(orientation)}
    data = encoded(kind, photo, **({} if kind == "BMP" else options))
    with Image.open(io.BytesIO(data)) as image:
        seen = ImageOps.exif_transpose(image).convert("RGB")
    small = examine(data, rules)
    assert (small.extension, max(small.width, small.height)) == ("jpg", 128)
    assert abs(small.width / small.height - seen.width / seen.height) < 0.02
    with Image.open(io.BytesIO(small.data)) as image:
        assert (image.size, image.getexif().get(0x0112)) == ((small.width, small.height), None)
        reference = seen.resize(image.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(reference)).mean() < 3
    assert examine(data, rules).data == small.data
    fits = encoded("PNG", photo.resize((128, 80)))
    assert examine(fits, rules).data == fits


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6" note="SECRET"/>
</rdf:RDF></x:xmpmeta>"""


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_secrets(kind: str, orientation: int) -> bytes:
    """A photograph that tells where it was taken, in every way that its format has."""
    exif = oriented(orientation)
    exif[0x010E] = "SECRET"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 29: "SECRET"})
    options: dict[str, Any] = {"exif": exif, "xmp": XMP}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", "SECRET")
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options["pnginfo"] = info
    if kind == "TIFF":
        options = {"tiffinfo": {0x0112: orientation, 0x010E: "SECRET", 700: XMP}}
    if kind in ("JPEG", "MPO"):
        options["comment"] = b"SECRET"
    if kind == "MPO":
        options |= {"save_all": True, "append_images": [photographs()[1].resize((90, 60))]}
    data = encoded(kind, photographs()[1].resize((90, 60)), **options)
    if kind in ("JPEG", "MPO"):
        iptc = b"Photoshop 3.0\x00SECRET"
        data = data[:2] + b"\xff\xed" + struct.pack(">H", 2 + len(iptc)) + iptc + data[2:] + b"SECRET"
    assert b"SECRET" in data
    return data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
def test_nothing_but_the_picture_is_left_when_exif_is_dropped_and_it_is_seen_the_same(
    kind: str, orientation: int
) -> None:
    data = with_secrets(kind, orientation)
    photo = examine(data, Rules(drop_exif=True))
    assert b"SECRET" not in photo.data
    assert b"xmp" not in photo.data.lower()
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(photo.data)) as after:
        left = {tag: value for tag, value in after.getexif().items() if value != 1}
        assert left == ({} if orientation == 1 or kind == "TIFF" else {0x0112: orientation})
        assert not after.getexif().get_ifd(0x8825)
        seen, expected = (np.asarray(ImageOps.exif_transpose(image).convert("RGB")) for image in (after, before))
        assert (photo.width, photo.height) == seen.shape[1::-1]
        assert np.array_equal(seen, expected)
    assert examine(data, Rules(drop_exif=True)).data == photo.data
    assert examine(photo.data, Rules(drop_exif=True)).data == photo.data


def block(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """EXIF with an orientation alone, of a type."""
    value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    return struct.pack(f"{order}2sHIH", b"MM" if order == ">" else b"II", 42, 8, 1) + entry + bytes(4)


def jpeg_with(*blocks: bytes) -> bytes:
    data = encoded("JPEG", small_photo())
    segments = (b"\xff\xe1" + struct.pack(">H", 8 + len(one)) + b"Exif\0\0" + one for one in blocks)
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_with_exif_behind_its_scan() -> bytes:
    data, one = encoded("JPEG", small_photo()), block(6)
    return data[:-2] + b"\xff\xe1" + struct.pack(">H", 8 + len(one)) + b"Exif\0\0" + one + data[-2:]


def block_with_a_make(orientation: int, at: int) -> bytes:
    """EXIF of which the maker's name lies at a place of it."""
    make = struct.pack(">HHIHH", 0x010F, 2, 8, 0, at)
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return struct.pack(">2sHIH", b"MM", 42, 8, 2) + make + turned + bytes(4) + b"Makers\0\0"


def twice(orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return struct.pack(">2sHIH", b"MM", 42, 8, 2) + entry * 2 + bytes(4)


def webp_with(exif: bytes | None, says: bool, odd: bool) -> bytes:
    """With EXIF, or a word that there is some, behind a chunk of odd length or an even one."""
    data = encoded("WEBP", small_photo(), exif=block(1), icc_profile=bytes(131 if odd else 130))
    head, chunks = bytearray(data[12:30]), data[30 : data.index(b"EXIF")]
    head[8] = head[8] & ~0x08 | (0x08 if says else 0)
    body = b"WEBP" + head + chunks + (b"" if exif is None else b"EXIF" + struct.pack("<I", len(exif)) + exif)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def png_with(block: bytes, before: bytes) -> bytes:
    data = encoded("PNG", small_photo())
    at = data.index(before) - 4
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block
    return data[:at] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + data[at:]


# and how the picture is turned then: as the first block says, unless that is broken
UNUSUAL_EXIF: list[tuple[str, Callable[[], bytes], int, bool]] = [
    ("one block", lambda: jpeg_with(block(6)), 6, False),
    ("one block of the other order", lambda: jpeg_with(block(6, "<")), 6, False),
    ("two blocks", lambda: jpeg_with(block(6), block(3)), 6, True),
    ("two blocks the other way", lambda: jpeg_with(block(3), block(6)), 3, True),
    ("a block that does not turn before one that does", lambda: jpeg_with(block(1), block(6)), 1, True),
    ("an orientation beyond 8", lambda: jpeg_with(block(9)), 1, False),
    ("a type that DALI does not take", lambda: jpeg_with(block(6, "<", 4)), 6, True),
    ("a directory beyond its end", lambda: jpeg_with(b"MM\0*\0\0\xff\xff"), 1, True),
    ("fewer entries than it says", lambda: jpeg_with(block(6).replace(b"\0\1\1\x12", b"\0\x6d\1\x12")), 1, True),
    ("no TIFF at all", lambda: jpeg_with(b"junk, junk"), 1, True),
    ("PNG, before the pixels", lambda: png_with(block(6), b"IDAT"), 6, False),
    ("PNG, behind the pixels", lambda: png_with(block(6), b"IEND"), 6, False),
    ("WebP", lambda: encoded("WEBP", small_photo(), exif=block(6)), 6, False),
    ("a maker's name", lambda: jpeg_with(block_with_a_make(6, at=38)), 6, False),
    ("a maker's name beyond its end", lambda: jpeg_with(block_with_a_make(6, at=39)), 6, True),
    ("two orientations", lambda: jpeg_with(twice(6)), 6, True),
    ("behind the scan", jpeg_with_exif_behind_its_scan, 1, False),
    ("WebP, behind an even chunk", lambda: webp_with(block(6), says=True, odd=False), 6, False),
    ("WebP, behind an odd chunk", lambda: webp_with(block(6), says=True, odd=True), 6, True),
    ("WebP that says nothing of it", lambda: webp_with(block(6), says=False, odd=False), 1, False),
    ("WebP that says there is some", lambda: webp_with(None, says=True, odd=False), 1, True),
]


@pytest.mark.parametrize(
    ("make", "orientation", "mended"), [one[1:] for one in UNUSUAL_EXIF], ids=[one[0] for one in UNUSUAL_EXIF]
)
@pytest.mark.parametrize("decode", ["full", "header"])
def test_exif_that_decoders_read_differently_is_made_plain(
    make: Callable[[], bytes], orientation: int, mended: bool, decode: str
) -> None:
    photo = examine(make(), Rules(decode=decode))
    assert (photo.width, photo.height) == ((64, 40) if orientation < 5 else (40, 64))
    assert photo.converted == mended
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[photo.extension]
    assert exif_orientation(photo.data, kind) == (orientation, True)


@pytest.mark.slow
def test_dali_shows_what_pillow_shows_with_and_without_exif() -> None:
    dali = pytest.importorskip("nvidia.dali")
    kinds = [(kind, orientation) for kind in ("JPEG", "PNG", "WEBP") for orientation in range(1, 9)]
    files = [with_secrets(kind, orientation) for kind, orientation in kinds]
    files += [make() for _, make, _, _ in UNUSUAL_EXIF]  # some of which let DALI crash as they are
    kinds += [(name, orientation) for name, _, orientation, _ in UNUSUAL_EXIF]
    stored = [examine(data, Rules(drop_exif=drop)).data for drop in (False, True) for data in files]

    @dali.pipeline_def(batch_size=len(stored), num_threads=1, device_id=None)
    def decode() -> Any:
        data = dali.fn.external_source(source=lambda: [np.frombuffer(data, np.uint8) for data in stored])
        return dali.fn.decoders.image(data)

    pipeline = decode()
    pipeline.build()
    (decoded,) = pipeline.run()
    for number, data in enumerate(stored):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            image.info.pop("xmp", None)  # whose orientation is EXIF's in some of them, and 6 in the others
            image.info.pop("XML:com.adobe.xmp", None)
            seen = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(np.asarray(decoded.at(number)), seen), kinds[number % len(kinds)]
