"""Of which kind is this file, and does it end where it says? Asked before parsers that trust it.

Some (in nvimgcodec 0.9) take as much memory as a part claims to be long, and some JPEG 2000 end the process.
"""

from data_shards.exif import png_chunks, webp_chunks

_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",  # is packed no more, and in older shards
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
}


def kind_of(data: bytes) -> str | None:
    """Pillow's name of a file's format, by its first bytes.

    None for one that no shard has, or of which a part reaches beyond its end.
    """
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        whole = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
        return "WEBP" if all(end <= whole + 1 for *_, end in webp_chunks(data[:whole])) else None
    kind = next((kind for start, kind in _STARTS.items() if data.startswith(start)), None)
    return None if kind == "PNG" and any(end > len(data) for *_, end in png_chunks(data)) else kind
