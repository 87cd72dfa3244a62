"""What files say besides the picture: taken out without decoding, but for the orientation, which decides what is seen.

EXIF holds where and when and by which camera a photograph was taken, and a preview; XMP, IPTC, comments and pictures
appended to a JPEG hold the like. A block of EXIF with the orientation alone stays where it is not the usual one, so
that Pillow and DALI show the same as before.
"""

import re
import struct
import zlib
from collections.abc import Iterator

_EOI, _SOS = 0xD9, 0xDA
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in coded data, which escapes its own 0xFF by 0x00
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"sBIT", b"pHYs", b"IDAT", b"IEND"}
_WEBP_KEPT = {b"VP8X", b"ICCP", b"ALPH", b"VP8 ", b"VP8L"}
_WEBP_HAS_EXIF, _WEBP_HAS_XMP = 0x08, 0x04


def without_exif(data: bytes, kind: str, orientation: int) -> bytes:
    """The same picture and nothing besides. kind: Pillow's name of the format. Raises ValueError when it is broken."""
    kept = b"" if orientation == 1 else _only_orientation(orientation)
    if kind in ("JPEG", "MPO"):
        return b"".join(_jpeg(data, kept))
    if kind == "PNG":
        return data[:8] + b"".join(_png(data, kept))
    if kind == "WEBP":
        body = b"WEBP" + b"".join(_webp(data, kept))
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return data  # BMP has nothing of the kind


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment after the first two bytes; a scan's coded data belong to it.

    Ends with the end of the (first) picture, or where the file is broken.
    """
    at = 2
    while at + 2 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # filling, and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + (0 if marker == _EOI else int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker == _SOS:
            found = _NEXT_MARKER.search(data, end)
            end = found.start() if found else len(data)
        yield marker, at, end
        if marker == _EOI:
            return
        at = end


def _only_orientation(orientation: int) -> bytes:
    """EXIF is a TIFF: its header, and one directory with one entry."""
    return struct.pack(">2sHI HHHIHH I", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes, exif: bytes) -> Iterator[bytes]:
    yield data[:2]
    marker = None
    for marker, start, end in jpeg_segments(data):
        if exif and marker != 0xE0:  # JFIF's own wants to be first
            block = b"Exif\0\0" + exif
            yield b"\xff\xe1" + struct.pack(">H", 2 + len(block)) + block
            exif = b""
        is_profile = marker == 0xE2 and data[start + 4 : start + 15] == b"ICC_PROFILE"
        if marker in (0xE0, 0xEE) or is_profile or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield data[start:end]
    if marker != _EOI:
        raise ValueError("JPEG without its end")


def _png(data: bytes, exif: bytes) -> Iterator[bytes]:
    at, kind = 8, b""
    while at + 12 <= len(data) and kind != b"IEND":
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind in _PNG_KEPT:
            yield data[at : at + 12 + size]
        if kind == b"IHDR" and exif:
            yield struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        at += 12 + size
    if kind != b"IEND":
        raise ValueError("PNG without its end")


def _webp(data: bytes, exif: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack("<4sI", data[at : at + 8])
        end = at + 8 + size + size % 2
        if kind == b"VP8X":
            flags = data[at + 8] & ~(_WEBP_HAS_EXIF | _WEBP_HAS_XMP) | (_WEBP_HAS_EXIF if exif else 0)
            yield data[at : at + 8] + bytes([flags]) + data[at + 9 : end]
        elif kind in _WEBP_KEPT:
            yield data[at:end]
        at = end
    if exif:
        yield b"EXIF" + struct.pack("<I", len(exif)) + exif
