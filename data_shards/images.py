"""Is this file one whole image that every decoder reads alike, and one that we want? Files come from outside and are
not trusted.

Limits on bytes and pixels are checked before anything is decoded; then the image is decoded once, in full. What passes
is stored as it came: DALI and Pillow gave equal pixels and sizes, EXIF orientation applied, for each kind that is
accepted so. Others are converted: what is lossy already (AVIF, JPEG 2000) to JPEG, the rest (GIF, BMP, PNM, TIFF of
unusual modes) to PNG. EXIF that decoders read differently is dropped but for the orientation. One that stands in XMP
alone is not applied, as it is not by DALI.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, PositiveFloat, PositiveInt

from data_shards.errors import one_line
from data_shards.exif import jpeg_segments, orientation, without_exif
from data_shards.phash import eight_bits, perceptual_hash
from data_shards.section import Section

# What Pillow calls a format, and the extension that stands for it in a shard. MPO: a JPEG with more pictures behind it.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
CONVERTED = {"GIF": "PNG", "BMP": "PNG", "PPM": "PNG", "AVIF": "JPEG", "JPEG2000": "JPEG"}
JPEG_QUALITY = 90  # of what is encoded here
JPEG_SCANS = 256  # DALI's limit too: each scan of a progressive JPEG costs a pass over all pixels
PILLOW_MAX_PIXELS = 178_956_970  # above, Pillow itself refuses

_PNG_END = b"IEND\xae\x42\x60\x82"
_TIFF_KEPT = {"L", "RGB", "RGBA"}
_TIFF_CONVERTED = {"1", "P", "LA", "PA", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}
_ORIENTATION = 0x0112
_JPEG_CODINGS = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; GPU decoders give zeros for lossless ones


class Rules(Section):
    """Which images are taken, and what is made of them."""

    affects_results: ClassVar[bool] = False

    min_side: PositiveInt = 32  # pixels
    max_aspect: PositiveFloat = 10.0  # of the longer side to the shorter
    max_pixels: PositiveInt = Field(default=100_000_000, le=PILLOW_MAX_PIXELS)
    max_bytes: PositiveInt = 64 * 2**20  # of a file
    decode: Literal["full", "header"] = "full"  # header: damage behind it shows only when training meets it
    longest_side: PositiveInt | None = None  # pixels; larger images are shrunk to it, and stored as JPEG
    drop_exif: bool = False  # and XMP, IPTC and comments: where and by whom a photograph was taken


class Refused(Exception):
    """A file that does not become a sample. `reason` is one of a few rules, `detail` what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Photo:
    """An accepted image: its bytes as they are stored, and its size in pixels as seen.

    converted: whether these are other bytes than the source's. phash: what it shows, when it was decoded in full.
    """

    data: bytes
    extension: str
    converted: bool
    width: int
    height: int
    phash: int | None = None

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.data).digest()


def check_bytes(size: int, max_bytes: int) -> None:
    """Raise Refused for a file that holds nothing, or too much to be read whole; its size is known up to there."""
    if size == 0:
        raise Refused("empty")
    if size > max_bytes:
        raise Refused("too many bytes", f"at least {size} bytes; {max_bytes} is the limit")


def examine(data: bytes, rules: Rules) -> Photo:
    """Check and decode a file. Raises Refused, whatever the bytes are."""
    check_bytes(len(data), rules.max_bytes)
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        raise Refused("unusual coding", "HEIC; convert it to JPEG first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bad metadata, and sizes that have a limit of their own here
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
        except UnidentifiedImageError:
            raise Refused("not an image", data[:16].hex(" ")) from None
        except Image.DecompressionBombError as error:
            raise Refused("too many pixels", one_line(error)[:200]) from None
        except Exception as error:  # noqa: BLE001  # parsers of hostile bytes raise anything
            raise Refused("damaged", one_line(error)[:200]) from None
        with image:
            _check_size(*image.size, rules)
            try:
                _check_coding(image, data)
                return _accepted(image, data, rules)
            except Refused:
                raise
            except Exception as error:  # noqa: BLE001
                raise Refused("damaged", one_line(error)[:200]) from None


@cache
def _formats() -> list[str]:
    Image.init()
    return sorted((KEPT | CONVERTED).keys() & Image.OPEN.keys() - {"MPO"})  # which Pillow finds behind JPEG


def _accepted(image: Image.Image, data: bytes, rules: Rules) -> Photo:
    kind, target = str(image.format), _target(image, rules)
    turned, agreed = orientation(data, kind) if kind in KEPT else (image.getexif().get(_ORIENTATION, 1), True)
    phash = None
    if rules.decode == "full" or target:
        image.load()
        if kind != "TIFF":  # which Pillow gives as it is to be seen
            image.getexif()[_ORIENTATION] = turned
        phash = perceptual_hash(image)
    if target:
        upright = ImageOps.exif_transpose(image)
        if rules.longest_side:
            upright.thumbnail((rules.longest_side, rules.longest_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return Photo(_encoded(upright, target), KEPT[target], True, *upright.size, phash)
    stored = without_exif(data, kind, turned) if rules.drop_exif or not agreed else data
    width, height = image.size[::-1] if turned >= 5 else image.size
    return Photo(stored, KEPT[kind], stored != data, width, height, phash)


def _target(image: Image.Image, rules: Rules) -> str | None:
    """The format to convert it to; None when the file is stored as it came."""
    kind = str(image.format)
    if rules.longest_side and max(image.size) > rules.longest_side:
        return "JPEG"
    if kind == "TIFF" and (rules.drop_exif or image.mode not in _TIFF_KEPT):
        return "PNG"
    if kind == "JPEG" and image.mode == "CMYK" and "adobe_transform" not in image.info:
        return "JPEG"  # without Adobe's mark decoders do not agree on which end of a channel is ink
    return CONVERTED.get(kind)


def _encoded(image: Image.Image, kind: str) -> bytes:
    """Without any metadata; the same bytes each time with one version of Pillow."""
    out = io.BytesIO()
    clean = eight_bits(image).convert("RGB")
    clean.info = {}
    clean.save(out, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return out.getvalue()


def _check_size(width: int, height: int, rules: Rules) -> None:
    if min(width, height) < rules.min_side:
        raise Refused("too small", f"{width} x {height} pixels; {rules.min_side} a side is the limit")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise Refused("too elongated", f"{width} x {height} pixels; {rules.max_aspect:g} to 1 is the limit")
    if width * height > rules.max_pixels:
        raise Refused("too many pixels", f"{width} x {height}; {rules.max_pixels} in all is the limit")


def _check_coding(image: Image.Image, data: bytes) -> None:
    kind = str(image.format)
    if kind != "MPO" and getattr(image, "is_animated", False):  # to count a TIFF's pages takes their number squared
        raise Refused("several frames", "more than one frame or page")
    if kind == "TIFF" and image.mode not in _TIFF_KEPT | _TIFF_CONVERTED:
        raise Refused("unusual coding", f"TIFF of mode {image.mode}")
    if kind == "PNG" and _PNG_END not in data[-65536:]:
        raise Refused("damaged", "PNG without its end")  # Pillow does not miss it, libpng under DALI does
    if kind in ("JPEG", "MPO") and (coding := _jpeg_coding(data)) is not None:
        raise Refused("unusual coding", f"JPEG {coding}")


def _jpeg_coding(data: bytes) -> str | None:
    """What is unusual about a JPEG's frame, by its headers; None when nothing is."""
    frame, scans, marker = "without a frame header", 0, 0
    for marker, start, _ in jpeg_segments(data):
        scans += marker == 0xDA
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits = data[start + 4]
            frame = "" if marker in _JPEG_CODINGS and bits == 8 else f"of type SOF{marker - 0xC0} with {bits} bits"
            if frame:
                return frame
    if not frame and marker not in (0xD9, 0xDA):  # Pillow looks for the next segment, DALI gives up
        return "with bytes between its segments"
    return frame or (f"of {scans} scans; {JPEG_SCANS} is the limit" if scans > JPEG_SCANS else None)
