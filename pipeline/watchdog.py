"""Notices that training stands still, names the ranks that are silent, saves stacks, and ends the process.

A rank that hangs makes all others wait for it in a collective, for ever. So each rank has a thread that writes a *beat*
(a number that grows, the step, what the rank is at) to the run's folder on the shared disk, also while its trainer
waits. When no step has ended for too long, the thread saves the Python stacks of its process and the collectives that
it is in, and looks at the beats of the others twice: a process that was stopped, or whose node is gone, does not beat.
No clock is compared between hosts.

What has a deadline of its own (reading data, saving, starting) is no hang as long as the rank that is at it beats.
But a rank that was asked to stop leaves in time, whatever it is at: after the time limit nothing would start it again.
"""

import faulthandler
import gc
import json
import math
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import ClassVar

from pydantic import PositiveFloat

from data_shards.section import Section
from data_shards.whole import write_whole
from pipeline.collectives import late, record

MEDIANS = 20  # a step that takes so many times the median is none any more
SILENT_BEATS = 3  # without a new one in this time a rank is silent
CLOSE_S = 5.0  # for what is just being written; a disk that does not answer holds up no end
LEAVE_S = 4 * CLOSE_S  # then a process goes that nothing else can end
LATE_S = 3.0  # after the deadline of a stop: the thread that trains says better why it is not done


class WatchdogSettings(Section):
    """When training counts as hanging. Nothing here changes what is learned."""

    affects_results: ClassVar[bool] = False
    floor_s: PositiveFloat = 60.0  # a step may take so long, or 20 times the median step if that is longer
    start_s: PositiveFloat = 1800.0  # from the first sign of life to the end of the first step
    beat_s: PositiveFloat = 5.0  # between two signs of life


@dataclass(frozen=True)
class Beat:
    """A sign of life. `at`: "step", or what else the rank is at; `patience_s`: how long that may take by itself."""

    number: int
    host: str
    step: int
    at: str
    patience_s: float


class Hang(Exception):
    """Training stands still. `hosts` are those of the silent ranks, none when all of them beat."""

    def __init__(self, message: str, hosts: tuple[str, ...]) -> None:
        super().__init__(message)
        self.hosts = hosts


class Overdue(Exception):
    """This rank was asked to stop and has not come to it. early: its first step was yet to end."""

    def __init__(self, message: str, early: bool) -> None:
        super().__init__(message)
        self.early = early


class Watchdog:
    """Watches over this rank until `close`. `leave` is called in a thread with a Hang or Overdue; it ends the process.

    folder: of this attempt, on the disk that all ranks share. host: by which this rank's machine is named to others.
    patience: what a rank may be at besides "step", and for how many seconds; `now` takes these names. stop_by: when a
    stop that was asked for must be done (monotonic), None while there is none.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        host: str,
        settings: WatchdogSettings,
        patience: dict[str, float],
        leave: Callable[[Exception], None],
        stop_by: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._folder, self._rank, self._world_size, self._settings = folder, rank, world_size, settings
        self._host, self._stop_by = host, stop_by
        self._patience, self._leave = {**patience, "start": settings.start_s}, leave
        self._step, self._at = 0, "start"
        self._moved = self._excused = time.monotonic()
        self._ended: float | None = None  # when the last step has
        self._seconds: deque[float] = deque(maxlen=100)
        self._number = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step(self, number: int) -> None:
        """A step has ended; the rank is at the next one."""
        now = time.monotonic()
        if self._ended is not None:
            self._seconds.append(now - self._ended)
        self._step, self._at, self._moved, self._ended = number, "step", now, now

    def now(self, at: str) -> None:
        """From here on the rank is at something that takes its own time, until it is at something else.

        The first step, with its data, is part of the start.
        """
        if self._at != "start" or at not in ("step", "data", "profile"):
            self._at, self._moved = at, time.monotonic()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(CLOSE_S)

    def _watch(self) -> None:
        while not self._closed.wait(min(self._settings.beat_s, max(0.1, self._late_in()))):
            self._beat()
            if self._late_in() <= 0:
                told = f"asked to stop, and not done in time: at {self._at} after step {self._step}"
                self._leave(Overdue(told, early=self._ended is None))
            if time.monotonic() - self._moved > self._limit(self._at):
                self._suspect()

    def _late_in(self) -> float:
        """Seconds until a stop that was asked for is overdue."""
        deadline = self._stop_by()
        return math.inf if deadline is None else deadline + LATE_S - time.monotonic()

    def _limit(self, at: str) -> float:
        """Seconds without a step after which something is wrong."""
        own = self._patience.get(at, 0.0)
        median = statistics.median(self._seconds) if self._seconds else 0.0
        return own + max(self._settings.floor_s, MEDIANS * median)

    def _suspect(self) -> None:
        """Look at the others; leave if nobody among them is at something that takes its own time, or just was."""
        moved, stood = self._moved, time.monotonic() - self._moved
        before = self._beats()
        if self._closed_within(SILENT_BEATS):
            return
        after = self._beats()
        silent = [rank for rank in range(self._world_size) if rank != self._rank and before[rank] == after[rank]]
        lively = [rank for rank in range(self._world_size) if rank not in silent]
        patient = max((max(before[rank].patience_s, after[rank].patience_s) for rank in lively), default=0.0)
        if patient:
            self._excused = time.monotonic()  # when that is over, the step still has all its time
        stuck = stood - patient if patient else time.monotonic() - self._excused
        if self._moved != moved or stuck < self._limit("step"):
            return
        stacks = self._save_stacks()
        # the first to leave takes all along: they have stacks to save too
        if not self._closed_within(2) and self._moved == moved:
            self._leave(_describe(self._step, stood, [(rank, after[rank]) for rank in silent], after, stacks))

    def _closed_within(self, beats: int) -> bool:
        """Wait so many beats, or until this is closed; goes on beating, since the others may look at this rank now."""
        for _ in range(beats):
            if self._closed.wait(self._settings.beat_s):
                return True
            self._beat()
        return False

    def _beat(self) -> None:
        self._number += 1
        patience = self._patience.get(self._at, 0.0)
        beat = Beat(self._number, self._host, self._step, self._at, patience)
        with suppress(OSError):  # a full disk ends nothing; others may then call this rank silent if training hangs
            write_whole(self._path(self._rank), json.dumps(asdict(beat)))

    def _beats(self) -> list[Beat]:
        return [_read(self._path(rank)) for rank in range(self._world_size)]

    def _path(self, rank: int) -> Path:
        return self._folder / f"beat-{rank:04d}.json"

    def _save_stacks(self) -> Path:
        path = self._folder / f"stacks-{self._rank:04d}.txt"
        with suppress(OSError), path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            trainer = "".join(traceback.format_stack(_frame_of_the_main_thread()))
            file.write(f"the thread that trains:\n{trainer}\nall threads:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)  # a hundred of them at most
        # torch's own lock may be what hangs; should it keep Python's too, this process ends without another word
        faulthandler.dump_traceback_later(LEAVE_S, exit=True)
        recording = threading.Thread(target=record, args=(_collectives(self._folder, self._rank),), daemon=True)
        recording.start()
        recording.join(CLOSE_S)
        faulthandler.cancel_dump_traceback_later()
        return path


def _collectives(folder: Path, rank: int) -> Path:
    return folder / f"collectives-{rank:04d}.json"


def _frame_of_the_main_thread() -> FrameType | None:
    """Without a collection of garbage on the way: up to Python 3.11 it runs under the lock of the list of threads, and
    for ever when it lets another thread run that begins a third."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(threading.main_thread().ident or 0)
    finally:
        if collects:
            gc.enable()


def _read(path: Path) -> Beat:
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Beat(0, "unknown", -1, "start", 0.0)


def _describe(step: int, stood: float, silent: list[tuple[int, Beat]], beats: list[Beat], stacks: Path) -> Hang:
    hosts = tuple(sorted({beat.host for _, beat in silent} - {"unknown"}))
    if silent:
        who = "silent: " + ", ".join(f"rank {rank} on {beat.host}" for rank, beat in silent)
    else:
        last = min(beat.step for beat in beats)
        behind = [f"rank {rank} on {beat.host}" for rank, beat in enumerate(beats) if beat.step == last]
        all_alike = len(behind) == len(beats)
        who = "all ranks beat" + ("" if all_alike else f", behind: {', '.join(behind[:4])} (step {last})")
        if (found := late({rank: _collectives(stacks.parent, rank) for rank in range(len(beats))})) is not None:
            who += f"; {found} (rank {found.ranks[0]} is on {beats[found.ranks[0]].host})"
    return Hang(f"training stood still for {stood:.0f} s after step {step}; {who}; stacks: {stacks}", hosts)
