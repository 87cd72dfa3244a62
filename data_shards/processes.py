"""Work over processes: spawned (a store has threads), a few items ahead, and none of them outlives its parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from data_shards.errors import UserError
from data_shards.store import Store

T = TypeVar("T")
R = TypeVar("R")

MEANWHILE_S = 0.2


def unordered(
    call: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    meanwhile: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
) -> Iterator[R]:
    """`call` of each item, as it is done; with one worker in this process, without any other.

    meanwhile: called a few times a second while processes work. stop: makes all calls end, of which each then ends what
    it has begun; without it, Ctrl-C ends the processes at once. Raises UserError when a process dies.
    """
    if workers <= 1:
        yield from map(call, items)
        return
    context, rest = multiprocessing.get_context("spawn"), iter(items)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(call, stop is not None))
    try:
        running = {pool.submit(_call, item) for item in islice(rest, 2 * workers)}
        while running:
            done, running = wait(running, MEANWHILE_S, FIRST_COMPLETED)
            if meanwhile:
                meanwhile()
            yield from (one.result() for one in done)
            running |= {pool.submit(_call, item) for item in islice(rest, len(done))}
    except BrokenProcessPool as error:
        raise UserError(
            "a process died, probably for want of memory; the same command goes on, with fewer WORKERS= or a smaller "
            "max_pixels"
        ) from error
    finally:
        if stop:
            stop()
        pool.shutdown(cancel_futures=True)


def worker_count(wanted: int | None, worth: int, store: Store) -> int:
    """As many as are wanted, else one a core, but no more than are worth the second that it takes to start one."""
    if store.url.startswith("memory:"):
        return 1  # other processes have other memory
    return wanted or max(1, min(len(os.sched_getaffinity(0)), worth))


_called: list[Callable[[Any], Any]] = []  # of a process of the pool


def _begin(call: Callable[[Any], Any], is_stopped: bool) -> None:
    """The end of the parent ends it, also by kill -9, which tells nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN if is_stopped else signal.SIG_DFL)
    _called[:] = [call]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _called[0](item)
