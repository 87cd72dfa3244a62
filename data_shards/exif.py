"""What files say besides the picture: read for the orientation, which decides what is seen, and taken out on request.

EXIF holds where and when and by which camera a photograph was taken, and a preview; XMP, IPTC, comments and pictures
appended to a JPEG hold the like. A block of EXIF with the orientation alone stays where it is not the usual one, so
that Pillow and DALI show the same as before. Where a file has several blocks, or a broken one, decoders do not agree
(and DALI 2.4 on a CPU may crash: it makes room by one block and turns by another).
"""

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import takewhile

_ORIENTATION, _SHORT = 0x0112, 3
# What DALI's parser looks at besides, texts and numbers (with how many bytes they take): where one of them lies beyond
# the end, it reads nothing at all.
_TEXTS = {0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298}
_NUMBERS = {0x011A: 8, 0x011B: 8, 0x013E: 16, 0x013F: 48, 0x0211: 24, 0x0214: 48}
_EOI, _SOS = 0xD9, 0xDA
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in coded data, which escapes its own 0xFF by 0x00
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"sBIT", b"pHYs", b"IDAT", b"IEND"}
_WEBP_KEPT = {b"VP8X", b"ICCP", b"ALPH", b"VP8 ", b"VP8L"}
_WEBP_HAS_EXIF, _WEBP_HAS_XMP = 0x08, 0x04


def orientation(data: bytes, kind: str) -> tuple[int, bool]:
    """How to turn a picture (1 to 8, as EXIF counts), and whether all decoders read that alike.

    kind: Pillow's name of the format.
    """
    blocks = list(_blocks(data, kind))
    if not blocks:
        return 1, not (kind == "WEBP" and _webp_says_exif(data))
    turned, agreed = turned_by(blocks[0])
    return turned, agreed and len(blocks) == 1 and not (kind == "WEBP" and _is_behind_an_odd_chunk(data))


def without_exif(data: bytes, kind: str, turned: int) -> bytes:
    """The same picture with that orientation and nothing besides. Raises ValueError when the file is broken.

    kind: JPEG, MPO, PNG or WEBP.
    """
    kept = b"" if turned == 1 else _only_orientation(turned)
    if kind in ("JPEG", "MPO"):
        return b"".join(_jpeg(data, kept))
    if kind == "PNG":
        return data[:8] + b"".join(_png(data, kept))
    body = b"WEBP" + b"".join(_webp(data, kept))
    return b"RIFF" + struct.pack("<I", len(body)) + body


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


def _blocks(data: bytes, kind: str) -> Iterator[bytes]:
    """The TIFFs that EXIF consists of."""
    if kind in ("JPEG", "MPO"):
        head = takewhile(lambda segment: segment[0] != _SOS, jpeg_segments(data))  # nobody looks behind a scan
        found = (data[start + 4 : end] for marker, start, end in head if marker == 0xE1)
        yield from (block[6:] for block in found if block.startswith(b"Exif\0\0"))
    elif kind == "PNG":
        yield from (data[start + 8 : end - 4] for name, start, end in png_chunks(data) if name == b"eXIf")
    elif kind == "WEBP" and _webp_says_exif(data):  # else nobody looks for it
        found = (data[start + 8 : end] for name, start, end in webp_chunks(data) if name == b"EXIF")
        yield from (block.removeprefix(b"Exif\0\0") for block in found)


def turned_by(block: bytes) -> tuple[int, bool]:
    """The orientation in a TIFF, as EXIF is one; the usual one where it has none or is broken.

    And whether all decoders read it so, where it is EXIF.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    found, agreed = list[int](), True
    try:
        (at,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, length, value, _ = struct.unpack_from(f"{order}HHIHH", block, entry)
            if tag == _ORIENTATION:
                found.append(value)
                agreed &= kind == _SHORT
            elif tag in _NUMBERS or (tag in _TEXTS and length > 4):
                (place,) = struct.unpack_from(f"{order}I", block, entry + 8)
                agreed &= place + _NUMBERS.get(tag, length) <= len(block)
    except struct.error:  # also when a directory has fewer entries than it says
        return 1, False
    return (found[-1] if found and found[-1] in range(1, 9) else 1), agreed and len(found) < 2


def _webp_says_exif(data: bytes) -> bool:
    return data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & _WEBP_HAS_EXIF)


def _is_behind_an_odd_chunk(data: bytes) -> bool:
    """Whether EXIF in a WebP is: DALI's parser does not pass over the byte that fills such a one up."""
    before = takewhile(lambda chunk: chunk[0] != b"EXIF", webp_chunks(data))
    return any(struct.unpack_from("<I", data, start + 4)[0] % 2 for _, start, _ in before)


def _only_orientation(turned: int) -> bytes:
    """EXIF is a TIFF: its header, and one directory with one entry."""
    return struct.pack(">2sHI HHHIHH I", b"MM", 42, 8, 1, _ORIENTATION, _SHORT, 1, turned, 0, 0)


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
    name = b""
    for name, start, end in png_chunks(data):
        if name in _PNG_KEPT:
            yield data[start:end]
        if name == b"IHDR" and exif:
            yield struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    if name != b"IEND":
        raise ValueError("PNG without its end")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each, also of one whose end lies beyond the file's."""
    at, name = 8, b""
    while at + 8 <= len(data) and name != b"IEND":
        size, name = struct.unpack_from(">I4s", data, at)
        yield name, at, at + 12 + size
        at += 12 + size


def _webp(data: bytes, exif: bytes) -> Iterator[bytes]:
    for name, start, end in webp_chunks(data):
        if name == b"VP8X":
            flags = data[start + 8] & ~(_WEBP_HAS_EXIF | _WEBP_HAS_XMP) | (_WEBP_HAS_EXIF if exif else 0)
            yield data[start : start + 8] + bytes([flags]) + data[start + 9 : end]
            if exif:  # before any chunk of odd length, see above
                yield b"EXIF" + struct.pack("<I", len(exif)) + exif
        elif name in _WEBP_KEPT:
            yield data[start:end]


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The same of a WebP."""
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        yield name, at, at + 8 + size + size % 2
        at += 8 + size + size % 2
