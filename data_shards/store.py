"""Objects in a store: s3://bucket/folder, file:///folder or memory://folder, by one interface.

Reads are checked for length. A store that does not answer is asked again, with growing pauses, until `retry_seconds`
are over; what asking again cannot mend (no such bucket, a wrong key) is said at once, in one line. Nothing is cached
and nothing is listed unless asked for. Puts are whole or not there. Keys and endpoint come from the AWS chain only:
AWS_PROFILE and the files that it names, or AWS_ENDPOINT_URL.
"""

import asyncio
import atexit
import contextlib
import os
import selectors
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from data_shards.errors import UserError
from data_shards.whole import beside

if TYPE_CHECKING:
    from data_shards.local import Folder, Memory
    from data_shards.s3 import S3

T = TypeVar("T")
Consumer = TypeVar("Consumer", bound=Callable[[memoryview], object])
Backend: TypeAlias = "S3 | Folder | Memory"
Root = tuple[str, str]  # scheme and bucket: what is connected to
Listing = Callable[[str, str | None], Coroutine[Any, Any, tuple[list[T], str | None]]]  # a page and the next's token
END_S = 2.0  # that closing may take


class StoreError(UserError):
    """Something about the store that asking again does not mend."""


class NotFound(StoreError):
    """There is no such object."""


class AlreadyExists(StoreError):
    """A put with `create_only` came second."""


class Denied(StoreError):
    """The store refuses the key, or what it may do. `expired`: a key that has been good; a newer one would do."""

    expired = False


class Truncated(StoreError):
    """The object ends before the range that was asked for."""


class Unavailable(StoreError):
    """The store did not answer within `retry_seconds`."""

    passing = True


class Entry(NamedTuple):
    """An object in a listing; `path` is relative to the store's url, `size` in bytes."""

    path: str
    size: int


@dataclass
class Counters:
    """What went over the wire."""

    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0


class Store:
    """A folder in a store. Connects at the first use; may be shared by threads, and used again after a fork.

    Its coroutines run on one event loop in a thread of its own; the blocking methods may be called from any other.
    """

    def __init__(self, url: str, *, retry_seconds: float = 60.0, connections: int = 16) -> None:
        scheme, separator, rest = url.partition("://")
        usable = {"s3": rest[:1] not in ("", "/"), "file": rest.startswith("/"), "memory": True}
        if not separator or not usable.get(scheme):
            valid = f"file://{url}" if url.startswith("/") else "s3://bucket/folder or file:///folder"
            raise StoreError(f"{url}: not the url of a store; {valid} is")
        self._options: dict[str, Any] = {"retry_seconds": retry_seconds, "connections": connections}
        root, self._folder = rest.partition("/")[::2] if scheme == "s3" else ("", rest)
        self._folder = _clean(self._folder, url)
        self.url = f"{scheme}://{'/' if scheme == 'file' else ''}{'/'.join(filter(None, (root, self._folder)))}"
        self._root = (scheme, root)
        self._thread = _Thread(partial(_backend, **self._options))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(_reopened, **self._options), (self.url,)

    @property
    def counters(self) -> Counters:
        """Shared with the stores that `at` gave."""
        return self._backend.counters

    @property
    def _backend(self) -> Backend:
        return self._thread.backend(self._root)

    def at(self, path: str) -> "Store":
        """The folder `path` of this one, over the same connections."""
        return self.beside(f"{self.url}/{path}")

    def beside(self, url: str) -> "Store":
        """The store at another url, on this one's event loop, so that coroutines of both can wait for each other."""
        other = Store(url, **self._options)
        other._thread = self._thread
        return other

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine on the store's event loop."""
        return self._thread.submit(coroutine)

    async def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (exclusive) of an object, or all of it. To be awaited on the store's loop (`submit`).

        Raises NotFound, Truncated, Denied, Unavailable. Never gives fewer bytes than were asked for.
        """
        if end is not None and end <= (start or 0):
            return b""
        return await self._backend.read(self._key(path), start, end)

    async def feed(self, path: str, start: int, end: int, begin: Callable[[], Consumer]) -> Consumer:
        """Give bytes `start` to `end` (exclusive) to a consumer piece by piece, as they come; returns the fed consumer.

        For much that is read: no memory holds all of it. A piece is good only until the consumer returns. An attempt
        that breaks off is followed by one with a new consumer, which `begin` gives. Raises as `read`.
        """
        if end <= start:
            return begin()
        return await self._backend.feed(self._key(path), start, end, begin)

    def get(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """`read`, blocking."""
        return self._wait(self.read(path, start, end))

    def put(self, path: str, data: bytes, *, create_only: bool = False) -> None:
        """Write an object whole. With `create_only` the first of several writers wins, the others get AlreadyExists."""
        self._wait(self._backend.put(self._key(path), data, create_only))

    def upload(self, local: Path, path: str) -> None:
        """Put a file of any size: in parts, each of them asked for again on its own."""
        self._wait(self._backend.upload(local, self._key(path)))

    def download(self, path: str, local: Path) -> None:
        """Bring an object to a file, which appears only when it is complete."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with beside(local) as temporary:
            self._wait(self._backend.download(self._key(path), temporary))
            temporary.replace(local)

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except NotFound:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return self._wait(self._backend.size(self._key(path)))

    def list(self, prefix: str = "") -> list[Entry]:
        """All objects below the folder `prefix`, at any depth, sorted by path; empty when there are none."""
        return sorted(self.walk(prefix))

    def walk(self, prefix: str = "") -> Iterator[Entry]:
        """The same one by one, as S3 gives them (by their paths' bytes): only a page of a listing is held."""
        cut = len(self._prefix(""))
        return (Entry(entry.path[cut:], entry.size) for entry in self._pages(self._backend.find, prefix))

    def folders(self, prefix: str = "") -> tuple[str, ...]:
        """Names of the folders right below the folder `prefix`, sorted; what they hold is not listed."""
        return tuple(sorted({*self._pages(self._backend.folders, prefix)}))

    def delete(self, paths: Iterable[str]) -> None:
        """Remove objects; what is not there already is no error."""
        self._wait(self._backend.delete([self._key(path) for path in paths]))

    def abandon(self, prefix: str) -> int:
        """Give up what unfinished uploads have left below a folder: their writers died, and they take room.

        Returns how many there were. Those that go on would fail: call it when nobody else may write there.
        """
        return self._wait(self._backend.abandon(self._prefix(prefix)))

    def check(self) -> None:
        """Raise the one line that says what is wrong with host, key or bucket; soon, whatever `retry_seconds` is."""
        self._wait(self._backend.check())

    def keeps_versions(self) -> bool | None:
        """Whether objects that are written over or deleted stay as old versions; None when the store does not say."""
        return self._wait(self._backend.keeps_versions())

    def close(self) -> None:
        """Close the connections, also those of `at`; the next use opens new ones."""
        self._thread.close()

    def _key(self, path: str) -> str:
        """Of an object. In S3 it is a name and no path: "a//b" and "a/../b" are others than "a/b" and "b"."""
        return "/".join(filter(None, (self._folder, path if self._root[0] == "s3" else _clean(path, self.url))))

    def _prefix(self, path: str) -> str:
        """What the keys of all objects in a folder begin with."""
        return f"{folder}/" if (folder := self._key(path.rstrip("/"))) else ""

    def _pages(self, ask: Listing[T], folder: str) -> Iterator[T]:
        more = None
        while True:
            found, more = self._wait(ask(self._prefix(folder), more))
            yield from found
            if more is None:
                return

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits for it any longer
            raise


def split(url: str) -> tuple[str, str]:
    """The url of the whole store that an object lies in, of which one is enough for all its folders, and its path."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/") if scheme == "s3" else ("/", "", rest.lstrip("/"))
    return f"{scheme}://{bucket}", path


@cache
def _reopened(url: str, **options: Any) -> Store:
    """One store a process, however often it is sent there: connecting costs half a second."""
    return Store(url, **options)


def _clean(path: str, url: str) -> str:
    parts = PurePosixPath(path.strip("/")).parts
    if ".." in parts:
        raise StoreError(f"{url}: {path!r} leads out of the store")
    return "/".join(parts)


def _backend(root: Root, retry_seconds: float, connections: int) -> Backend:
    """What serves a kind of url. Its keys are whole, its errors are StoreErrors that name the url.

    A prefix is empty or ends with a slash. A listing comes in pages, each with a token for the next one.
    Imported here: both need this module, and a folder does not need the half second that s3fs takes.
    """
    scheme, bucket = root
    if scheme == "s3":
        from data_shards.s3 import S3

        return S3(bucket, retry_seconds, connections)
    from data_shards.local import Folder, Memory

    return Folder() if scheme == "file" else Memory()


class _Thread:
    """An event loop in a daemon thread, and the backends that live on it; all are made at first use.

    A forked child gets new ones. The inherited ones share sockets and the kernel's poll set with the parent: they must
    neither be used nor cleaned up there, so they are kept for ever and the child's handle of the poll set is closed.
    """

    def __init__(self, make_backend: Callable[[Root], Backend]) -> None:
        self._make_backend = make_backend
        self._inherited: list[Any] = []
        self._reset()
        _threads.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._selector: selectors.BaseSelector | None = None
        self._backends: dict[Root, Backend] = {}
        self._close: Any = None

    def backend(self, root: Root) -> Backend:
        with self._lock:
            if root not in self._backends:
                self._backends[root] = self._make_backend(root)
            return self._backends[root]

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        with self._lock:
            if self._loop is None:
                self._start()
            loop = self._loop
        assert loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def close(self) -> None:
        if self._close is not None:
            self.end()
            closed = self._backends
            self._reset()
            for root, backend in closed.items():
                self.backend(root).counters = backend.counters

    def end(self) -> None:
        """Close what is open, and wait for it a little."""
        if self._loop is not None and self._close.detach():
            with contextlib.suppress(Exception):
                _end(self._loop, self._backends).result(END_S)

    def after_fork(self) -> None:
        self._inherited.append((self._loop, self._backends))
        if self._selector is not None:
            self._selector.close()
        if self._close is not None:
            self._close.detach()
        self._reset()

    def _start(self) -> None:
        selector = selectors.DefaultSelector()
        loop = asyncio.SelectorEventLoop(selector)
        threading.Thread(target=_run, args=(loop,), name="store", daemon=True).start()  # unless there are too many
        self._selector, self._loop = selector, loop
        self._close = weakref.finalize(self, _end, loop, self._backends)
        self._close.atexit = False


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


_threads: "weakref.WeakSet[_Thread]" = weakref.WeakSet()


def _end(loop: asyncio.AbstractEventLoop, backends: dict[Root, Backend]) -> "Future[None]":
    """Waits for nothing: a store that is forgotten may be collected in the midst of anything, under any lock."""

    async def end() -> None:
        for backend in backends.values():
            with contextlib.suppress(Exception):
                await backend.close()
        loop.call_soon(loop.stop)

    return asyncio.run_coroutine_threadsafe(end(), loop)


@atexit.register
def _end_all() -> None:
    for thread in list(_threads):
        thread.end()


def _after_fork() -> None:
    for thread in list(_threads):
        thread.after_fork()


os.register_at_fork(after_in_child=_after_fork)
