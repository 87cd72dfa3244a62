"""Images in tar and zip archives, by where their bytes lie. Nothing is unpacked, and no name in them becomes a path.

The headers are walked through once; one archive's names are held at a time (for a zip, its whole directory). As in
WebDataset, neighbours of the same name up to its first dot are one sample: beside an image, `.cls` is its label and
`.txt` and `.json` are said of it; other members are no images and left out. In an archive of images alone each stands
for itself.
"""

import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple

from data_shards.errors import UserError
from data_shards.images import Refused

IMAGES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "heic", "heif", "jp2"}
IMAGES |= {"ppm", "pgm", "pnm"}
TEXTS = {"cls", "txt", "json"}
_TEXT_BYTES = 2**20  # longer ones are left out
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
}


class Member(NamedTuple):
    """A file in an archive: `size` bytes from `offset` on, as they are stored there. `texts`: of it, by extension."""

    name: str
    offset: int
    size: int
    deflated: bool
    texts: dict[str, str] | None = None


def archive_kind(file: BinaryIO, url: str) -> str | None:
    """tar, zip, or None. Raises UserError when it is compressed as a whole, which cannot be read by offsets."""
    file.seek(0)
    head = file.read(512)
    file.seek(0)
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            name = url.rpartition("/")[2]
            raise UserError(
                f"{url}: compressed, so its files cannot be read by offset; {program} {name}, then pack that"
            )
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    return "tar" if head[257:262] == b"ustar" or url.endswith(".tar") else None


def inflated(data: bytes, max_bytes: int) -> bytes:
    """What a zip's deflated bytes stand for. Raises Refused."""
    inflater = zlib.decompressobj(-15)
    try:
        whole = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise Refused("damaged", str(error)) from None
    if len(whole) > max_bytes:
        raise Refused("too many bytes", f"more than {max_bytes}, which is the limit")
    if not inflater.eof:
        raise Refused("damaged", "its deflated bytes end too soon")
    return whole


def images(file: BinaryIO, url: str, kind: str, ignored: Counter[str]) -> Iterator[Member]:
    """The images of an archive, in its order, by names that are unique in it; counts in `ignored` what is none.

    Raises UserError when the archive is cut off, damaged, encrypted or stored in a way that is not read here.
    """
    members = _tar(file, url, ignored) if kind == "tar" else _zip(file, url)
    names: set[str] = set()
    for _, group in groupby(members, lambda member: _split(member.name)[0]):
        for member in _sample(file, list(group), ignored):
            unique = member.name if member.name not in names else f"{member.name}#{member.offset}"
            names.add(unique)
            yield member._replace(name=unique)


def _split(name: str) -> tuple[str, str]:
    """Key and extension: what comes before and after the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension.lower()


def _kind(extension: str) -> str:
    """What to count it as: names are from outside, and are shown."""
    last = extension.rpartition(".")[2]
    return last if re.fullmatch("[a-z0-9]{1,10}", last) else "other"


def _sample(file: BinaryIO, group: list[Member], ignored: Counter[str]) -> list[Member]:
    by_extension = [(_split(member.name)[1], member) for member in group]
    found = [m for e, m in by_extension if e in IMAGES]
    if found and len({e.rpartition(".")[2] for e, _ in by_extension}) == 1:  # IMG_1.edited.jpg; but no 1.mask.png
        found = group
    found = found or [m for e, m in by_extension if e.rpartition(".")[2] in IMAGES]  # photo.1.jpg
    found = found or [m for e, m in by_extension if not e]
    texts = {e: _text(file, m) for e, m in by_extension if e in TEXTS and m.size <= _TEXT_BYTES and found}
    read = {extension: text for extension, text in texts.items() if text is not None}
    chosen = set(map(id, found))  # frame.0001.png to frame.9999.png are of one key
    ignored.update(_kind(e) for e, m in by_extension if id(m) not in chosen and e not in read)
    return [member._replace(texts=read or None) for member in found]


def _text(file: BinaryIO, member: Member) -> str | None:
    """None for one that is too long when it is inflated, or damaged."""
    file.seek(member.offset)
    data = file.read(member.size)
    if member.deflated:
        try:
            data = inflated(data, _TEXT_BYTES)
        except Refused:
            return None
    return data.decode("utf-8", "backslashreplace").strip()


def _tar(file: BinaryIO, url: str, ignored: Counter[str]) -> Iterator[Member]:
    end = 0  # of what is understood
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= end:  # it leads back: some Pythons would go round for ever
                    raise ValueError(member.size)
                end = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg() and member.sparse is None:
                    yield Member(member.name, member.offset_data, member.size, False)
                elif not member.isdir():
                    ignored["not a plain file"] += 1
    except (UserError, OSError):
        raise
    except Exception:  # noqa: BLE001, S110  # hostile headers raise anything; named below, by the place
        pass
    size = file.seek(0, 2)
    if size < end + tarfile.BLOCKSIZE:
        raise UserError(f"{url}: cut off at byte {size}: a tar ends with a block of zeros; fetch it again")
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise UserError(f"{url}: no tar header at byte {end}; fetch it again")


def _zip(file: BinaryIO, url: str) -> Iterator[Member]:
    try:
        archive = zipfile.ZipFile(file)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # hostile headers raise anything
        raise UserError(f"{url}: cut off or damaged: {error}; fetch it again") from None
    for info in archive.infolist():
        if info.filename.endswith("/"):
            continue
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = "encrypted" if info.flag_bits & 1 else f"compressed by method {info.compress_type}"
            raise UserError(f"{url}: {info.filename!r} is {how}; unzip it and pack the folder")
        header = b""
        if 0 <= info.header_offset < archive.start_dir:
            file.seek(info.header_offset)
            header = file.read(30)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + names
        if header[:4] != b"PK\3\4" or start + info.compress_size > archive.start_dir:
            raise UserError(f"{url}: damaged at byte {info.header_offset}; fetch it again")
        yield Member(info.filename, start, info.compress_size, info.compress_type == zipfile.ZIP_DEFLATED)
