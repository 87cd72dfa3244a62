"""Files of others, by url: an absolute path or file://, s3:// through the store, anything else through fsspec.

A file that is missing or no file is Refused: it is one of many. A place that does not answer, or lets nobody in, raises
a StoreError: the next million of files would fare no better. Limits on bytes are kept while reading.
"""

import contextlib
import errno
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import aiohttp
import fsspec

from data_shards.errors import UserError, one_line
from data_shards.images import Refused, check_bytes
from data_shards.store import Denied, NotFound, Store, StoreError, Truncated, Unavailable, split

T = TypeVar("T")

READ_AHEAD = 4 * 2**20  # bytes asked of a store at once while an archive's headers are walked through
ATTEMPTS = 5  # of fsspec's places; the store has its own patience
_OF_ONE_FILE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT)
_DENIED = (401, 403, 407)
_TRANSIENT = (408, 425, 429)
_TIMEOUT = aiohttp.ClientTimeout(total=600, sock_connect=10, sock_read=30)


def is_remote(url: str) -> bool:
    """Whether it is a url of anything but this machine's files."""
    return "://" in url and not url.startswith("file://")


def store_of(url: str) -> tuple[Store, str] | None:
    """The store that a url belongs to and the path in it; None when it is none of a store."""
    if not url.startswith(("s3://", "memory://")):
        return None
    root, path = split(url)
    return _store(root), path


@cache
def _store(root: str) -> Store:
    return Store(root)


def read_whole(url: str, max_bytes: int, size: int | None = None) -> bytes:
    """All bytes of a file. size: as listed. Raises Refused, or StoreError when the place cannot be read at all."""
    if not is_remote(url):
        data = _read_local(Path(url.removeprefix("file://")), max_bytes)
    elif (place := store_of(url)) is None:
        data = _patiently(url, lambda: _stream(url, max_bytes))
    else:
        store, path = place
        try:
            check_bytes(store.size(path) if size is None else size, max_bytes)
            data = store.get(path)
        except NotFound:
            raise Refused("cannot be read", "no such object") from None
    check_bytes(len(data), max_bytes)
    return data


def read_range(url: str, start: int, size: int) -> bytes:
    """Bytes of a file that was longer when it was listed. Raises UserError when it is no more."""
    if not is_remote(url):
        with _named(url), Path(url.removeprefix("file://")).open("rb") as file:
            file.seek(start)
            data = file.read(size)
    elif (place := store_of(url)) is not None:
        return place[0].get(place[1], start, start + size)
    else:
        data = _patiently(url, lambda: _filesystem(url)[0].cat_file(_filesystem(url)[1], start, start + size))
    if len(data) != size:
        raise Truncated(
            f"{url}: ends before byte {start + size}, though it was longer when it was listed, and what is begun keeps "
            f"to that; fetch it again, or to pack what it is now, give it a DST of its own"
        )
    return data


@contextlib.contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A file to seek and read in. Raises UserError."""
    with _named(url), contextlib.ExitStack() as ending:
        if not is_remote(url):
            yield ending.enter_context(Path(url.removeprefix("file://")).open("rb"))
        elif (place := store_of(url)) is not None:
            store, path = place
            yield io.BufferedReader(_Ranges(store.size(path), partial(store.get, path)), READ_AHEAD)
        else:
            there = _patiently(url, lambda: _filesystem(url)[0].open(_filesystem(url)[1], "rb"))
            ending.callback(there.close)
            size = _patiently(url, lambda: there.seek(0, os.SEEK_END) or there.tell())
            ranges = _Ranges(size, lambda start, end: _patiently(url, partial(_read_at, there, start, end)))
            yield io.BufferedReader(ranges, READ_AHEAD)


class _Ranges(io.RawIOBase):
    """A file of `size` bytes that is read by ranges."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._read(self._at, end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _read_at(file: Any, start: int, end: int) -> bytes:
    file.seek(start)
    return bytes(file.read(end - start))


def _read_local(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would never end
            raise Refused("not a file")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        if error.errno in _OF_ONE_FILE:
            raise Refused("cannot be read", error.strerror or "") from None
        raise Unavailable(f"{path}: {error.strerror}; pack again when its disk answers") from error


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec keeps one a thread and process."""
    kind = url.partition("://")[0]
    options = {"client_kwargs": {"timeout": _TIMEOUT}} if kind in ("http", "https") else {}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, str(path)


def _stream(url: str, max_bytes: int) -> bytes:
    filesystem, path = _filesystem(url)
    # without asking for the size first, which costs a request and need not be true
    options = {"block_size": 0, "size": 1} if url.startswith("http") else {}
    parts, room = [], max_bytes + 1
    with filesystem.open(path, "rb", **options) as file:
        while room and (part := file.read(min(room, 2**20))):
            parts.append(part)
            room -= len(part)
    return b"".join(parts)


def _patiently(url: str, call: Callable[[], T]) -> T:
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except FileNotFoundError:
            raise Refused("cannot be read", "no such file") from None
        except aiohttp.ClientResponseError as error:
            if error.status in _DENIED:
                raise Denied(f"{url}: access denied ({error.status} {error.message})") from error
            if error.status < 500 and error.status not in _TRANSIENT:
                raise Refused("cannot be read", f"{error.status} {error.message}") from None
            problem = f"{error.status} {error.message}"
        except PermissionError as error:
            raise Denied(f"{url}: access denied ({error})") from error
        except aiohttp.InvalidURL:
            raise Refused("cannot be read", "not a url") from None
        except (ValueError, ImportError) as error:  # no such protocol, or what it needs is not installed
            raise StoreError(f"{url}: {one_line(error)}") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            problem = one_line(error)
        if attempt + 1 < ATTEMPTS:
            time.sleep(random.uniform(0.5, 1.5) * 0.25 * 2**attempt)
    raise Unavailable(f"{url}: not to be had after {ATTEMPTS} tries ({problem}); pack again when it answers")


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        raise UserError(f"{url}: {refused.detail}") from None
    except OSError as error:
        raise UserError(f"{url}: {error.strerror or error}") from error
