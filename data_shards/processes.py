"""Work over processes: spawned (a store has threads), a few items ahead, and none of them outlives its parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_shards.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def unordered(call: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`call` of each item, as it is done; with one worker in this process, without any other.

    Raises UserError when a process dies.
    """
    if workers <= 1:
        yield from map(call, items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin)
    running: set[Future[R]] = set()
    try:
        for item in items:
            running.add(pool.submit(call, item))
            if len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (one.result() for one in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in done)
    except BrokenProcessPool as error:
        raise UserError("a working process died, probably for want of memory; go on with fewer WORKERS=") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Ctrl-C ends it at once; so does the end of the parent, also by kill -9, which tells nobody."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
