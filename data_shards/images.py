"""Is this file one whole image that every decoder reads alike, and one that we want? Files come from outside and are
not trusted.

Limits on bytes and pixels are checked before anything is decoded; then the image is decoded once, in full. What passes
is stored as it came; GIF, which DALI does not read, becomes PNG. DALI and Pillow gave equal pixels and sizes, EXIF
orientation applied, for each kind that is accepted here (JPEG, PNG, WebP, BMP, TIFF of 8 bits).
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import Field, PositiveFloat, PositiveInt

from data_shards.phash import perceptual_hash
from data_shards.section import Section

# What Pillow calls a format, and the extension that stands for it in a shard. MPO: a JPEG with more pictures behind it.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "png"}
CONVERTED = {"GIF"}
PILLOW_MAX_PIXELS = 178_956_970  # above, Pillow itself refuses

_PNG_END = b"IEND\xae\x42\x60\x82"
_TIFF_MODES = {"L", "P", "RGB", "RGBA", "CMYK"}
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


def read_photo(path: Path, *, min_side: int, max_pixels: int, max_bytes: int) -> Photo:
    """Read, check and decode a file. Raises Refused."""
    return examine(read_file(path, max_bytes), min_side=min_side, max_pixels=max_pixels)


def read_file(path: Path, max_bytes: int) -> bytes:
    """A regular file's bytes (a pipe or a device would never end). Raises Refused."""
    try:
        if not path.is_file():
            raise Refused("not a file")
        size = path.stat().st_size
        if not size:
            raise Refused("empty")
        if size > max_bytes:
            raise Refused("too many bytes", f"{size} bytes; {max_bytes} is the limit")
        return path.read_bytes()
    except OSError as error:
        raise Refused("cannot be read", error.strerror or type(error).__name__) from error


def examine(data: bytes, rules: Rules | None = None, **changed: Any) -> Photo:
    """Check and decode. `changed`: of the rules. Raises Refused, whatever the bytes are."""
    rules = (rules or Rules()).model_copy(update=changed)
    if len(data) > rules.max_bytes:
        raise Refused("too many bytes", f"{len(data)} bytes; {rules.max_bytes} is the limit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bad metadata, and sizes that have a limit of their own here
        try:
            image = Image.open(io.BytesIO(data), formats=sorted(set(EXTENSIONS) - {"MPO"}))
        except UnidentifiedImageError:
            raise Refused("not an image", data[:16].hex(" ")) from None
        except Image.DecompressionBombError as error:
            raise Refused("too many pixels", _line(error)) from None
        except Exception as error:  # noqa: BLE001  # parsers of hostile bytes raise anything
            raise Refused("damaged", _line(error)) from None
        with image:
            return _decode(image, data, rules)


def convert(data: bytes) -> bytes:
    """PNG of the first frame, in RGB; the same bytes each time."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(out, "PNG")
    return out.getvalue()


def _decode(image: Image.Image, data: bytes, rules: Rules) -> Photo:
    kind = str(image.format)
    _check_header(image, data, kind, rules)
    try:
        image.load()
        # after load(), because TIFF's orientation is applied, and taken out, there
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        stored = convert(data) if kind in CONVERTED else data
        phash = perceptual_hash(image)
    except Exception as error:  # noqa: BLE001
        raise Refused("damaged", _line(error)) from None
    width, height = image.size[::-1] if turned else image.size
    return Photo(stored, EXTENSIONS[kind], kind in CONVERTED, width, height, phash)


def _check_header(image: Image.Image, data: bytes, kind: str, rules: Rules) -> None:
    width, height = image.size
    if min(width, height) < rules.min_side:
        raise Refused("too small", f"{width} x {height} pixels; {rules.min_side} a side is the limit")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise Refused("too elongated", f"{width} x {height} pixels; {rules.max_aspect:g} to 1 is the limit")
    if width * height > rules.max_pixels:
        raise Refused("too many pixels", f"{width} x {height}; {rules.max_pixels} in all is the limit")
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # noqa: BLE001
        raise Refused("damaged", _line(error)) from None
    if frames > 1 and kind != "MPO":
        raise Refused("several frames", f"{frames} frames or pages")
    if kind == "TIFF" and image.mode not in _TIFF_MODES:
        raise Refused("unusual coding", f"TIFF of mode {image.mode}")
    if kind == "PNG" and _PNG_END not in data[-65536:]:
        raise Refused("damaged", "PNG without its end")  # Pillow does not miss it, libpng under DALI does
    if kind in ("JPEG", "MPO") and (coding := _jpeg_coding(data)) is not None:
        raise Refused("unusual coding", f"JPEG {coding}")


def _jpeg_coding(data: bytes) -> str | None:
    """What is unusual about a JPEG's frame, by its header; None when nothing is."""
    at = 2
    while at + 4 < len(data):
        if data[at] != 0xFF:
            return "without a frame header"
        marker = data[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # filling, and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            usual = marker in _JPEG_CODINGS and data[at + 4] == 8
            return None if usual else f"of type SOF{marker - 0xC0} with {data[at + 4]} bits"
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return "without a frame header"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
