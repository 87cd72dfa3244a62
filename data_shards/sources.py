"""What is to be packed: the images of a folder, of archives or of a list, one after another, with their labels.

A listing streams, in an order that depends on names alone, and holds no more than one folder's names or one archive's
at a time. Nothing of an image is read for it. Names of sources are for people: none is ever used as a path.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from data_shards.errors import UserError
from data_shards.files import read_range, read_whole
from data_shards.images import Refused
from data_shards.section import Section
from data_shards.store import Denied, Unavailable


class Source(NamedTuple):
    """An image that may become a sample. Paths and names need not be text (os.fsencode gives their bytes)."""

    url: str  # of the file, or of the archive that holds it: an absolute path or an fsspec url
    offset: int | None = None  # bytes, within an archive
    size: int | None = None  # bytes; within an archive those stored there; None where nobody knows yet
    name: str = ""  # unique within its folder or archive; a list may hold one twice
    label: str | None = None
    columns: dict[str, Any] | None = None  # what a list or an archive says of it besides
    deflated: bool = False  # a zip's way to store `size` bytes


class SourceOptions(Section):
    """How a source is read."""

    affects_results: ClassVar[bool] = False

    label: str = "auto"  # folder, none, or a list's column; auto: an archive's .cls, else the folder; of a list none
    path_column: str | None = None  # of a Parquet list; by default `path`, else `url`
    skip_unreachable: bool = False  # refuse what does not answer or lets nobody in, where that would stop the packing


def list_sources(
    src: str, options: SourceOptions | None = None, ignored: Counter[str] | None = None
) -> Iterator[Source]:
    """The sources of a folder (here or in a store), of archives, or of a list.

    ignored: counts members of archives that are no images, by extension. Raises UserError when `src` is not there, is
    empty, or cannot be read as what it is.
    """
    options = options or SourceOptions()
    source = None
    for source in _listed(src, options, Counter() if ignored is None else ignored):
        yield source
    if source is None:
        raise UserError(f"{src}: there is no file in it; make shards SRC=/folder/of/images DST=...")


def read_source(source: Source, max_bytes: int, *, skip_unreachable: bool = False) -> bytes:
    """A source's bytes. Raises Refused, or UserError when where it lies does not answer or is no longer what it was."""
    try:
        if source.offset is None:
            if source.size is not None and source.size > max_bytes:
                raise Refused("too many bytes", f"{source.size} bytes; {max_bytes} is the limit")
            return read_whole(source.url, max_bytes)
        return _member(source, source.offset, source.size or 0, max_bytes)
    except (Denied, Unavailable) as error:
        if skip_unreachable:
            raise Refused("cannot be read", str(error)) from error
        raise


def metadata_schema(src: str, options: SourceOptions | None = None) -> pa.Schema | None:
    """Names and types of `Source.columns`; None when there are none."""
    return None


def _member(source: Source, offset: int, size: int, max_bytes: int) -> bytes:
    if not size:
        raise Refused("empty")
    if size > max_bytes:
        raise Refused("too many bytes", f"{size} bytes; {max_bytes} is the limit")
    return read_range(source.url, offset, size)


def _listed(src: str, options: SourceOptions, ignored: Counter[str]) -> Iterator[Source]:
    folder = Path(src.removeprefix("file://")).expanduser()
    if not folder.is_dir():
        raise UserError(f"{src}: no such file or folder; make shards SRC=/folder/of/images DST=...")
    for path, name in _files(str(folder.absolute()), ""):
        yield Source(path, name=name, label=_folder_of(name) if options.label in ("auto", "folder") else None)


def _files(folder: str, name: str) -> Iterator[tuple[str, str]]:
    """All files below a folder and their names from there, sorted as whole names are; links to folders are left out."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((os.fsencode(e.name) + b"/" * e.is_dir(follow_symlinks=False), e.is_dir()) for e in found)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; it cannot be packed as it is") from error
    for entry, is_folder in entries:
        child = os.fsdecode(entry)
        if entry.endswith(b"/"):
            yield from _files(f"{folder}/{child[:-1]}", name + child)
        elif not is_folder:
            yield f"{folder}/{child}", name + child


def _folder_of(name: str) -> str | None:
    return name.rpartition("/")[0] or None
