import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.daemons import wait_until
from pipeline import watchdog
from pipeline.watchdog import Hang, Overdue, Watchdog, WatchdogSettings

QUICK = WatchdogSettings(floor_s=0.6, start_s=0.6, beat_s=0.3)  # slow beats: a busy machine keeps up
DEADLINE_S = 20.0


class Watched:
    """Watchdogs of ranks in one process; a rank is silenced by closing its watchdog."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hangs: dict[int, Hang] = {}
        self.dogs: list[Watchdog] = []

    def start(self, world_size: int, settings: WatchdogSettings = QUICK, patience: float = 1000.0) -> list[Watchdog]:
        return [self.start_one(rank, world_size, settings, patience) for rank in range(world_size)]

    def start_one(
        self, rank: int, world_size: int, settings: WatchdogSettings = QUICK, patience: float = 1000.0
    ) -> Watchdog:
        def note(hang: Exception) -> None:
            assert isinstance(hang, Hang)
            self.hangs.setdefault(rank, hang)

        dog = Watchdog(self.folder, rank, world_size, f"host{rank}", settings, {"data": patience}, note)
        self.dogs.append(dog)
        return dog

    def beats(self) -> int:
        path = self.folder / "beat-0000.json"
        return int(json.loads(path.read_text())["number"]) if path.exists() else 0

    def wait(self, rank: int) -> Hang:
        assert wait_until(lambda: rank in self.hangs, DEADLINE_S)
        return self.hangs[rank]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path / "a01")
    yield watched
    for dog in watched.dogs:
        dog.close()


@pytest.mark.slow
def test_a_silent_rank_is_named_and_the_stacks_of_the_others_are_saved(watched: Watched) -> None:
    first, second = watched.start(2)
    for dog in (first, second):
        dog.step(7)
    assert wait_until((watched.folder / "beat-0001.json").exists, DEADLINE_S)
    second.close()  # as a process that was stopped: it does not beat
    hang = watched.wait(0)
    assert "after step 7; silent: rank 1 on " in str(hang)
    assert len(hang.hosts) == 1
    assert "test_watchdog.py" in (watched.folder / "stacks-0000.txt").read_text()


def test_the_first_step_is_part_of_the_start_whatever_is_looked_at_before_it(watched: Watched) -> None:
    """As a profile that nobody has asked for, of which rank 0 makes sure."""
    (dog,) = watched.start(1, WatchdogSettings(floor_s=0.6, start_s=600.0, beat_s=0.1))
    for at in ("data", "profile", "step"):
        dog.now(at)
    assert dog._at == "start"
    dog.step(1)
    dog.now("profile")
    assert dog._at == "profile"


# A store is forgotten, and collected the later the larger `after` is, while stacks are saved and threads come and go.
GARBAGE = """
import faulthandler, gc, sys, threading
from pathlib import Path
from data_shards.store import Store
from pipeline.watchdog import Watchdog, WatchdogSettings

class Cycle:
    def __init__(self):
        self.itself, self.store = self, Store("memory://forgotten")
        self.store.put("a", b"1")

def come_and_go():
    while True:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()

faulthandler.dump_traceback_later(30, exit=True)
dog = Watchdog(Path(sys.argv[1]), 0, 1, "host", WatchdogSettings(), {}, print)
threading.Thread(target=come_and_go, daemon=True).start()
gc.disable()
for after in range(1, 31):
    stay = threading.Event()
    for _ in range(20):
        threading.Thread(target=stay.wait, daemon=True).start()
    gc.collect()
    Cycle()
    gc.set_threshold(gc.get_count()[0] + after)
    gc.enable()
    dog._save_stacks()
    gc.disable()
    stay.set()
"""


@pytest.mark.slow
def test_stacks_are_saved_whatever_garbage_is_collected_meanwhile(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GARBAGE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rank_that_is_stuck_but_alive_is_named_by_its_step(watched: Watched) -> None:
    first, second = watched.start(2)
    first.step(8)
    second.step(7)
    hang = watched.wait(0)
    assert "all ranks beat, behind: rank 1 on " in str(hang)
    assert hang.hosts == ()


@pytest.mark.slow
def test_waiting_for_the_store_is_no_hang(watched: Watched) -> None:
    first, second = watched.start(2)
    first.step(3)
    second.step(3)
    second.now("data")  # has a deadline of its own
    assert wait_until(lambda: watched.beats() > 10, DEADLINE_S)  # five times the floor
    assert watched.hangs == {}


@pytest.mark.slow
def test_a_step_has_its_time_also_after_another_rank_had_waited_for_the_store(watched: Watched) -> None:
    first, second = watched.start(2, WatchdogSettings(floor_s=4.0, beat_s=0.2))
    first.step(3)
    second.step(3)
    second.now("data")
    assert wait_until(lambda: watched.beats() > 25, DEADLINE_S)  # the first has stood still for more than the floor
    second.now("step")
    begun = time.monotonic()
    watched.wait(0)
    assert time.monotonic() - begun > 2.7


@pytest.mark.slow
def test_patience_ends(watched: Watched) -> None:
    (only,) = watched.start(1, patience=0.2)
    only.now("data")
    assert "all ranks beat" in str(watched.wait(0))


@pytest.mark.slow
def test_a_run_that_never_takes_its_first_step_hangs(watched: Watched) -> None:
    watched.start(1)
    assert "after step 0" in str(watched.wait(0))


def test_the_first_step_has_the_time_of_a_start_to_its_end(watched: Watched) -> None:
    (only,) = watched.start(1, WatchdogSettings(floor_s=0.1, start_s=20.0, beat_s=0.1))
    for at in ("step", "data", "step"):  # as the trainer says of each step
        only.now(at)
    assert wait_until(lambda: watched.beats() > 15, DEADLINE_S)  # ten times the floor
    assert watched.hangs == {}


@pytest.mark.slow
def test_a_rank_that_looks_at_the_others_for_long_is_not_silent_to_them(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pause, settings = watchdog._read, threading.Event(), QUICK.model_copy(update={"beat_s": 0.4})
    first = watched.start_one(0, 4, settings)

    def slow(path: Path) -> watchdog.Beat:  # what it reads of the shared disk comes late
        if threading.current_thread() is first._thread:
            pause.wait(settings.beat_s / 4)
        return read(path)

    monkeypatch.setattr(watchdog, "_read", slow)
    first.step(7)
    for rank in range(1, 4):
        pause.wait(settings.beat_s / 5)  # they look after it has begun to
        watched.start_one(rank, 4, settings).step(7)
    for rank in range(1, 4):
        assert watched.wait(rank).hosts == ()


def test_steps_keep_it_quiet_and_slow_ones_set_the_measure(watched: Watched) -> None:
    (only,) = watched.start(1, QUICK.model_copy(update={"floor_s": 0.05, "start_s": 20.0}))
    pause = threading.Event()
    for number in range(1, 6):
        pause.wait(0.1)  # the median; twenty of them are two seconds
        only.step(number)
    pause.wait(0.5)  # ten times the floor
    assert watched.hangs == {}


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_does_not_stop_the_watch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watched = Watched(tmp_path / "file" / "a01")
    watched.start(1)
    assert "stood still" in str(watched.wait(0))
    watched.dogs[0].close()


def test_a_disk_that_does_not_answer_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "CLOSE_S", 0.5)
    beat = tmp_path / f"beat-0000.{os.getpid()}"
    os.mkfifo(beat)  # who opens it to write waits for a reader
    dog = Watchdog(tmp_path, 0, 1, "host", QUICK, {}, lambda why: None)
    assert wait_until(lambda: dog._number == 1, DEADLINE_S)  # it is at its first beat
    closing = threading.Thread(target=dog.close)
    closing.start()
    closing.join(DEADLINE_S)
    held_up = closing.is_alive()
    reader = os.open(beat, os.O_RDONLY | os.O_NONBLOCK)
    dog._thread.join()
    os.close(reader)
    assert not held_up


def test_a_rank_that_is_asked_to_stop_leaves_in_time_whatever_it_is_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LATE_S", 0.2)
    deadline: list[float] = []
    left: list[Exception] = []
    patient = WatchdogSettings(floor_s=1000.0, start_s=1000.0, beat_s=0.5)
    dog = Watchdog(
        tmp_path, 0, 1, "host0", patient, {"data": 1000.0}, left.append, lambda: deadline[0] if deadline else None
    )
    dog.step(7)
    dog.now("data")
    assert wait_until((tmp_path / "beat-0000.json").exists, DEADLINE_S)
    assert left == []
    deadline.append(time.monotonic() + 0.3)
    assert wait_until(lambda: bool(left), DEADLINE_S)
    assert time.monotonic() >= deadline[0] + 0.2
    dog.close()
    assert isinstance(left[0], Overdue)
    assert not left[0].early
    assert str(left[0]) == "asked to stop, and not done in time: at data after step 7"
