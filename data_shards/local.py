"""Stores without a server: a folder (of this machine or of a shared disk), and this process's memory."""

import asyncio
import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec

from data_shards.store import AlreadyExists, Consumer, Counters, Entry, NotFound, StoreError, Truncated, Unavailable
from data_shards.whole import HIDDEN, beside

# What a shared disk says while its server is away or restarts. A start that meets it is followed by another.
_AWAY = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EREMOTEIO}


class _Local:
    """What both kinds do alike: nothing has to be connected to, and a range comes in one piece."""

    def __init__(self) -> None:
        self.counters = Counters()

    async def read(self, key: str, start: int | None, end: int | None) -> bytes:
        raise NotImplementedError

    async def feed(self, key: str, start: int, end: int, begin: Callable[[], Consumer]) -> Consumer:
        consumer = begin()
        consumer(memoryview(await self.read(key, start, end)))
        return consumer

    async def check(self) -> None:
        """Always there: folders are made at the first put."""

    async def keeps_versions(self) -> bool | None:
        return False

    async def close(self) -> None:
        """Nothing is open."""


class Folder(_Local):
    """file:// - a folder of this machine or of a shared disk; keys are absolute paths without the leading slash."""

    async def read(self, key: str, start: int | None, end: int | None) -> bytes:
        self.counters.requests += 1
        data = await asyncio.to_thread(self._read, key, start or 0, end)
        self.counters.bytes_read += len(data)
        return data

    def _read(self, key: str, start: int, end: int | None) -> bytes:
        with _named(key), Path("/", key).open("rb") as file:
            file.seek(start)
            data = file.read() if end is None else file.read(end - start)
            size = os.fstat(file.fileno()).st_size
        if size < (end or start):
            raise Truncated(f"file:///{key}: ends at byte {size}, bytes {start} to {end or ''} were asked for")
        return data

    async def put(self, key: str, data: bytes, create_only: bool) -> None:
        self.counters.requests += 1
        await asyncio.to_thread(self._put, key, lambda aside: aside.write_bytes(data), create_only)
        self.counters.bytes_written += len(data)

    async def upload(self, local: Path, key: str) -> None:
        self.counters.requests += 1
        await asyncio.to_thread(self._put, key, partial(shutil.copyfile, local), False)
        self.counters.bytes_written += local.stat().st_size

    def _put(self, key: str, write: Callable[[Path], object], create_only: bool) -> None:
        path = Path("/", key)
        with _named(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside(path) as temporary:
                write(temporary)
                _sync(temporary)
                if create_only:
                    path.hardlink_to(temporary)  # unlike a rename, fails when the name is taken
                else:
                    temporary.replace(path)
            _sync(path.parent)

    async def download(self, key: str, local: Path) -> None:
        self.counters.requests += 1
        with _named(key):
            await asyncio.to_thread(shutil.copyfile, Path("/", key), local)
        self.counters.bytes_read += local.stat().st_size

    async def size(self, key: str) -> int:
        with _named(key):
            if not Path("/", key).is_file():
                raise FileNotFoundError
            return Path("/", key).stat().st_size

    async def find(self, prefix: str, more: str | None) -> tuple[list[Entry], str | None]:
        found = []
        for path in _files(prefix):
            with contextlib.suppress(NotFound), _named(path.as_posix()[1:]):  # gone meanwhile
                if path.is_file() and not path.name.startswith(HIDDEN):
                    found.append(Entry(path.as_posix()[1:], path.stat().st_size))
        return found, None

    async def folders(self, prefix: str, more: str | None) -> tuple[list[str], str | None]:
        place = Path("/", prefix)
        return [path.name for path in place.iterdir() if path.is_dir()] if place.is_dir() else [], None

    async def delete(self, keys: list[str]) -> None:
        for key in keys:
            with _named(key):
                Path("/", key).unlink(missing_ok=True)

    async def abandon(self, prefix: str) -> int:
        left = [path for path in _files(prefix) if path.name.startswith(HIDDEN)]
        for path in left:
            with _named(path.as_posix()[1:]):
                path.unlink(missing_ok=True)
        return len(left)


def _files(prefix: str) -> Iterator[Path]:
    """All below a folder. One that cannot be read is an error: a list of removed images may lie in it."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            with _named(str(error.filename).lstrip("/")):
                raise error

    for folder, _, names in os.walk(Path("/", prefix), onerror=unless_gone):
        yield from (Path(folder, name) for name in names)


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"file:///{key}: no such file") from None
    except FileExistsError:
        raise AlreadyExists(f"file:///{key}: is there already") from None
    except OSError as error:
        kind = Unavailable if error.errno in _AWAY else StoreError
        raise kind(f"file:///{key}: {error.strerror}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Memory(_Local):
    """memory:// - gone with the process; the same one for all stores in it, as with fsspec."""

    _lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self._files = fsspec.filesystem("memory")

    async def read(self, key: str, start: int | None, end: int | None) -> bytes:
        size = await self.size(key)
        if size < (end or start or 0):
            raise Truncated(f"memory://{key}: ends at byte {size}, bytes {start or 0} to {end or ''} were asked for")
        self.counters.requests += 1
        data: bytes = self._files.cat_file(f"/{key}", start, end)
        self.counters.bytes_read += len(data)
        return data

    async def put(self, key: str, data: bytes, create_only: bool) -> None:
        self.counters.requests += 1
        with self._lock:
            if create_only and self._files.isfile(f"/{key}"):
                raise AlreadyExists(f"memory://{key}: is there already")
            self._files.pipe_file(f"/{key}", bytes(data))
        self.counters.bytes_written += len(data)

    async def upload(self, local: Path, key: str) -> None:
        await self.put(key, local.read_bytes(), False)

    async def download(self, key: str, local: Path) -> None:
        local.write_bytes(await self.read(key, None, None))

    async def size(self, key: str) -> int:
        if not self._files.isfile(f"/{key}"):
            raise NotFound(f"memory://{key}: no such object")
        return int(self._files.size(f"/{key}"))

    async def find(self, prefix: str, more: str | None) -> tuple[list[Entry], str | None]:
        if not self._files.isdir(f"/{prefix}"):
            return [], None
        found = self._files.find(f"/{prefix}", detail=True)
        return [Entry(name.lstrip("/"), info["size"]) for name, info in found.items()], None

    async def folders(self, prefix: str, more: str | None) -> tuple[list[str], str | None]:
        found = (entry.path.removeprefix(prefix) for entry in (await self.find(prefix, None))[0])
        return [name for name, deeper, _ in (path.partition("/") for path in found) if deeper], None

    async def delete(self, keys: list[str]) -> None:
        for key in keys:
            if self._files.isfile(f"/{key}"):
                self._files.rm_file(f"/{key}")

    async def abandon(self, prefix: str) -> int:
        return 0  # nothing is put in parts
