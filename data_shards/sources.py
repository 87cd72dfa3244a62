"""What is to be packed: the images of a folder, of archives or of a list, one after another, with their labels.

A listing streams, in an order that depends on names alone, and holds no more than one folder's names or one archive's
at a time. Nothing of an image is read for it. Names of sources are for people: none is ever used as a path.
"""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import pyarrow as pa
from braceexpand import braceexpand

from data_shards.archives import IMAGES, archive_kind, images, inflated
from data_shards.errors import UserError
from data_shards.files import is_remote, opened, read_range, read_whole, store_of
from data_shards.images import Refused, check_bytes
from data_shards.lists import Row, parquet_rows, parquet_schema, text_rows
from data_shards.section import Section
from data_shards.store import Denied, Unavailable

_ARCHIVE = re.compile(r"\.(tar|zip|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)
_PATTERN = re.compile(r"[*?\[{]")  # where one begins


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
    src: str,
    options: SourceOptions | None = None,
    ignored: Counter[str] | None = None,
    dst: str | None = None,
) -> Iterator[Source]:
    """The sources of a folder (here or in a store), of archives, of WebDataset shards, or of a list.

    src: also several by `*`, `?` or `{000..099}`; images as well, then. Archives within a folder are opened, too.
    ignored: counts members of archives that are no images, by extension, and links to folders.
    dst: url of the set that is made of them; where its folder lies within `src`, it is passed over.
    Raises UserError when `src` is not there, is empty, cannot be read as what it is, or is `dst` itself.
    """
    options = options or SourceOptions()
    ignored = Counter() if ignored is None else ignored
    source = None
    for source in _listed(src, options, ignored, _own(src, dst) if dst else ""):
        yield source
    if source is None:
        besides = f" (left out: {tally(ignored)})" if ignored else ""
        raise UserError(f"{src}: there is no file in it{besides}; make shards SRC=/folder/of/images DST=...")


def tally(ignored: Mapping[str, int]) -> str:
    """What a listing has left out, in words."""
    return ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())


def one_spelling(src: str) -> str:
    """The same text for a source however it is typed, from whatever folder; a set knows by it what it was made of."""
    return src.rstrip("/") if is_remote(src) else _local(src)


def base_of(src: str) -> str:
    """From where the names in a source are counted, so that a pattern which has grown is known for the same source.

    Of archives or images by a pattern that is the folder before it, as of all that lies in the folder; lists, which
    name files from their own folders, are what they are.
    """
    special = _PATTERN.search(src)
    if not special or not (_ARCHIVE.search(src) or _is_image(src, src)) or (src[:1] == "/" and Path(src).exists()):
        return src
    return one_spelling(src[: special.start()].rpartition("/")[0])


def list_tars(src: str) -> list[str]:
    """The tars that `src` (a folder, a pattern, or one) stands for, each once. Raises UserError when there is none."""
    found = []
    for url, _ in _expanded(src):
        files = _files(url, Counter()) if _is_folder(url) else [(url, ".tar", None)]
        found += [file for file, name, _ in files if name.endswith(".tar")]
    if not found:
        raise UserError(f"{src}: no .tar is there; make shards SRC=s3://bucket/shards IN_PLACE=1 DST=...")
    return list(dict.fromkeys(found))


def metadata_schema(src: str, options: SourceOptions | None = None) -> pa.Schema | None:
    """Names and types of what lists say of each source (`Source.columns`); None when `src` is no list that says any.

    Raises UserError when several lists differ in them.
    """
    schemas = list(_list_schemas(src, options or SourceOptions()))
    for url, schema in schemas:
        if schema != schemas[0][1]:
            raise UserError(f"{url}: other columns, or of other types, than {schemas[0][0]}; pack them apart")
    return schemas[0][1] if schemas else None


def _list_schemas(src: str, options: SourceOptions) -> Iterator[tuple[str, pa.Schema | None]]:
    """Of the Parquet lists that `src` stands for; none when it stands for something else."""
    for url, prefix in _expanded(src):
        if _is_image(url, prefix) or _is_folder(url):
            return
        with opened(url) as file:
            if _kind(file, url) != "parquet":
                return
            yield url, parquet_schema(file, url, options.path_column, _label_column(options))


def read_source(source: Source, max_bytes: int, *, skip_unreachable: bool = False) -> bytes:
    """A source's bytes. Raises Refused, or UserError when where it lies does not answer or is no longer what it was."""
    if source.size is not None:
        check_bytes(source.size, max_bytes)
    try:
        if source.offset is None or source.size is None:
            return read_whole(source.url, max_bytes, source.size)
        data = read_range(source.url, source.offset, source.size)
    except (Denied, Unavailable) as error:
        if skip_unreachable:
            raise Refused("cannot be read", str(error)) from error
        raise
    return inflated(data, max_bytes) if source.deflated else data


def _listed(src: str, options: SourceOptions, ignored: Counter[str], own: str) -> Iterator[Source]:
    for url, prefix in _expanded(src):
        if _is_in(url, own):
            continue
        if _is_image(url, prefix):
            name = prefix.rstrip("/")
            yield Source(url, name=name, label=folder_label(name) if _wants_folder(options, url) else None)
            continue
        if not _is_folder(url):
            yield from _contents(url, prefix, options, ignored)
            continue
        for file, name, size in _files(url, ignored):
            if _is_in(file, own):
                continue
            if _ARCHIVE.search(name):
                yield from _contents(file, f"{prefix}{name}/", options, ignored)
            else:
                label = folder_label(name) if _wants_folder(options, url) else None
                yield Source(file, size=size, name=prefix + name, label=label)


def _own(src: str, dst: str) -> str:
    """The folder of a set as the listing of `src` would spell it; a set that the sources lie in is not among them."""
    special = _PATTERN.search(src)
    folder = _spelled(src[: special.start()].rpartition("/")[0] if special else src)
    own = _spelled(dst)
    if not is_remote(folder) and not is_remote(own):  # links
        inside = os.path.relpath(os.path.realpath(own), os.path.realpath(folder))
        own = folder if inside == "." else f"{folder}/{inside}"
    if own == folder and not special:
        raise UserError(f"{dst}: the folder of the sources itself; give the set one of its own: DST={dst}/shards")
    return "" if _is_in(folder, own) else own


def _spelled(place: str) -> str:
    if (found := store_of(place)) is not None:
        return f"{found[0].url}/{found[1]}".rstrip("/")
    return place if is_remote(place) else _local(place)


def _is_in(url: str, folder: str) -> bool:
    """Whether it is the folder or lies below it; nothing lies in one without a name."""
    return bool(folder) and f"{url}/".startswith(f"{folder}/")


def _expanded(src: str) -> Iterator[tuple[str, str]]:
    """Each url that a pattern stands for, and what goes before the names of what is in it. Raises UserError."""
    special = _PATTERN.search(src)
    if not special or (not is_remote(src) and Path(_local(src)).exists()):
        yield (src if is_remote(src) else _local(src)), ""
        return
    fixed = src[: special.start()].rpartition("/")[0]
    try:
        patterns = [*braceexpand(src)] if "{" in src else [src]
    except ValueError:  # unbalanced
        raise UserError(f"{src}: its braces do not match; several are written as in {{000..099}}") from None
    for pattern in patterns:
        for url in _matches(pattern):
            yield url, f"{url[len(fixed if is_remote(src) else _local(fixed)) :].lstrip('/')}/"


def _local(src: str) -> str:
    """An absolute path without `..`, which behind a link leads out of what that points to, as the system takes it."""
    path = Path("/")
    for part in Path(src.removeprefix("file://")).expanduser().absolute().parts[1:]:
        if part == "..":
            path = (Path(os.path.realpath(path)) if os.path.islink(path) else path).parent  # noqa: PTH114  never raises
        else:
            path /= part
    return str(path)


def _matches(pattern: str) -> list[str]:
    special = re.search(r"[*?\[]", pattern)
    if not special:
        return [pattern if is_remote(pattern) else _local(pattern)]
    if not is_remote(pattern):
        found = sorted(glob.glob(_local(pattern), recursive=True), key=os.fsencode)  # noqa: PTH207
    elif (place := store_of(pattern)) is not None:
        store, path = place
        folder = path[: len(path) - len(pattern) + special.start()].rpartition("/")[0]
        depth = None if "**" in path else path.count("/")
        entries = [entry.path for entry in store.list(folder) if depth in (None, entry.path.count("/"))]
        root = pattern.removesuffix(path)  # as it was typed: what goes before a name is cut off by its length
        found = [f"{root}{entry}" for entry in entries if fnmatchcase(entry, path)]
    else:
        raise UserError(f"{pattern}: only folders and s3:// are searched; write the names out, as in {{000..099}}")
    if not found:
        raise UserError(f"{pattern}: nothing has such a name; make shards SRC=/folder/of/images DST=...")
    return found


def _is_folder(url: str) -> bool:
    """In a store, what is no object is a folder. Raises UserError when there is neither."""
    if is_remote(url):
        if (place := store_of(url)) is None:
            return False
        store, path = place
        return not path or path.endswith("/") or not store.exists(path)
    try:
        return stat.S_ISDIR(Path(url).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{url}: no such file, and no such folder; make shards SRC=/folder/of/images DST=...") from None
    except OSError as error:
        raise UserError(f"{url}: {error.strerror}") from error


def _is_image(url: str, prefix: str) -> bool:
    """Whether it is an image, by its name, that a pattern stands for: only such a one has a prefix."""
    named = bool(prefix) and url.rpartition(".")[2].lower() in IMAGES
    return named and (is_remote(url) or not Path(url).is_dir())


def _files(folder: str, ignored: Counter[str]) -> Iterator[tuple[str, str, int | None]]:
    """All files below a folder: url, name from there, bytes (in a store)."""
    if (place := store_of(folder)) is None:
        yield from ((path, name, None) for path, name in _walk(folder, "", ignored))
        return
    store, path = place
    cut = len(path.rstrip("/")) + 1 if path.rstrip("/") else 0
    for entry in store.walk(path):
        yield f"{store.url}/{entry.path}", entry.path[cut:], entry.size


def _walk(folder: str, name: str, ignored: Counter[str]) -> Iterator[tuple[str, str]]:
    """Files and their names from there on, sorted as whole names are; links to folders are only counted."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((os.fsencode(e.name) + b"/" * e.is_dir(follow_symlinks=False), e.is_dir()) for e in found)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; it cannot be packed as it is") from error
    for entry, is_folder in entries:
        child = os.fsdecode(entry)
        if entry.endswith(b"/"):
            yield from _walk(f"{folder}/{child[:-1]}", name + child, ignored)
        elif is_folder:
            ignored["links to folders"] += 1
        else:
            yield f"{folder}/{child}", name + child


def _contents(url: str, prefix: str, options: SourceOptions, ignored: Counter[str]) -> Iterator[Source]:
    """What an archive or a list holds."""
    with opened(url) as file:
        kind = _kind(file, url)
        if kind == "parquet":
            yield from _rows(parquet_rows(file, url, options.path_column, _label_column(options)), url, options)
        elif kind == "text":
            _wants_folder(options, url)
            yield from _rows(text_rows(file), url, options)
        else:
            for member in images(file, url, kind, ignored):
                texts = dict(member.texts or {})
                label = _member_label(member.name, texts, options, url)
                yield Source(
                    url, member.offset, member.size, prefix + member.name, label, texts or None, member.deflated
                )


def _kind(file: BinaryIO, url: str) -> str:
    if found := archive_kind(file, url):
        return found
    head = file.read(512)
    file.seek(0)
    if head.startswith(b"PAR1"):
        return "parquet"
    if b"\0" in head or _ARCHIVE.search(url):
        raise UserError(f"{url}: neither a tar, a zip nor a list of files; make shards SRC=/folder/of/images DST=...")
    return "text"


def _rows(rows: Iterator[Row], url: str, options: SourceOptions) -> Iterator[Source]:
    folder = url.rpartition("/")[0]
    for row in rows:
        there = row.path.removeprefix("./")  # `find` writes it, and in S3 it would be part of a name
        place = there if "://" in there or there.startswith("/") else f"{folder}/{there}"
        label = place.split("/")[-2] if options.label == "folder" else row.label
        yield Source(place, name=row.path, label=label, columns=row.columns)


def _label_column(options: SourceOptions) -> str | None:
    return None if options.label in ("auto", "folder", "none") else options.label


def _wants_folder(options: SourceOptions, url: str) -> bool:
    if _label_column(options):
        raise UserError(f"{url}: has no columns, so no {options.label}; SET=label=folder, or none")
    return options.label != "none"


def _member_label(name: str, texts: dict[str, str], options: SourceOptions, url: str) -> str | None:
    """Takes its text out of `texts`."""
    if options.label == "auto" and "cls" in texts:
        return texts.pop("cls")
    if options.label in texts:
        return texts.pop(options.label)
    if _label_column(options):
        raise UserError(f"{url}: {name!r} has no .{options.label}; SET=label=folder, or none")
    return None if options.label == "none" else folder_label(name)


def folder_label(name: str) -> str | None:
    """The folder of a file or of a member of an archive; `./cat/1.jpg`, as `tar -C photos .` has it, is of `cat`."""
    return name.removeprefix("./").rpartition("/")[0] or None
