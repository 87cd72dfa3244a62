"""What a rank does when it is signalled before it trains, as a process of its own with the real handlers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.daemons import wait_until
from jobs.rank import requeue
from jobs.start import Outcome, Start, cancel_marker, events

RANK = """
import signal, sys
from jobs.rank import _handle_early_signals
from jobs.start import Start

_handle_early_signals(Start.here(), int(sys.argv[1]), float(sys.argv[2]))
print("ready", flush=True)
signal.pause()
"""
IN_A_WRITE = """
import io, os, signal, sys
from jobs.rank import _handle_early_signals
from jobs.start import Start

class Signalling(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        os.kill(os.getpid(), signal.SIGUSR2)
        return len(data)

_handle_early_signals(Start.here(), int(sys.argv[1]), float(sys.argv[2]))
sys.stdout = io.TextIOWrapper(io.BufferedWriter(Signalling()))
print("a line", flush=True)
"""
STUCK = """
import resource, sys, threading, time
from jobs.rank import _fail
from jobs.start import Start

resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file takes a byte
threading.Thread(target=_fail, args=(Start.here(), int(sys.argv[1]), RuntimeError("stood still"))).start()
time.sleep(float(sys.argv[2]))
"""
TRAINING = """
import sys
from jobs.rank import run

run({}, "file:///nowhere", 60, 0, 60)
"""
OVERDUE = """
import sys
from jobs.rank import _handle_early_signals, _hung
from jobs.start import Start
from pipeline.watchdog import Overdue

start, rank = Start.here(), int(sys.argv[1])
leave_early = _handle_early_signals(start, rank, float(sys.argv[2]))
_hung(start, rank, Overdue("asked to stop, and not done in time", early=True), leave_early)
"""
OVER = """
import atexit, sys, time
from jobs import rank
from jobs.start import Start

rank.END_S = 1.0
atexit.register(time.sleep, 600)  # as W&B's client waits for its service
rank._over(Start.here(), int(sys.argv[1]), "finished")
"""
NO_DISK = """
import sys, time
from jobs import rank
from jobs.start import Start

rank.TELL_S = 1.0
Start.fail = lambda *_: time.sleep(600)
rank._fail(Start.here(), int(sys.argv[1]), RuntimeError("an error"))
"""
LONG_S, SHORT_S = 3600.0, 60.0  # of a job whose time limit is far away, and of one whose signal is that of its limit


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path, "local-1", 0)


def launched(start: Start, code: str, rank: int, time_s: float) -> dict[str, Any]:
    """A rank as arguments of subprocess."""
    variables = {**os.environ, "FARSEER_RUN_DIR": str(start.run_dir), "FARSEER_JOB": start.job}
    return {"args": [sys.executable, "-c", code, str(rank), str(time_s)], "env": variables}


def signalled(start: Start, rank: int, time_s: float) -> int:
    """The exit code of a rank that gets USR2 as soon as it listens."""
    process = subprocess.Popen(**launched(start, RANK, rank, time_s), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert wait_until(lambda: process.poll() is not None, 30)
    process.stdout.close()
    return process.returncode


def test_a_preemption_before_the_first_step_is_no_failure_however_often_it_comes(start: Start) -> None:
    assert signalled(start, 0, LONG_S) == 1
    outcome = start.outcome()
    assert outcome is not None
    assert (outcome.outcome, outcome.requeued, start.failures()) == ("preempted", False, [])
    assert [event["reason"] for event in events(start.run_dir)] == ["preempted before the first step"]


@pytest.mark.parametrize("time_s", [LONG_S, SHORT_S])
def test_a_preemption_to_which_the_first_step_does_not_come_in_time_is_no_failure_but_a_time_limit_is(
    start: Start, time_s: float
) -> None:
    subprocess.run(**launched(start, OVERDUE, 0, time_s), timeout=60, check=False)
    outcome, failures = start.outcome(), start.failures()
    if time_s == LONG_S:
        assert outcome == Outcome("preempted")
        assert failures == []
    else:
        assert outcome is None
        assert "the time limit came" in failures[0].message


def test_a_preempted_rank_in_an_image_without_slurm_leaves_the_requeue_to_the_batch_script(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue(start)
    assert start.outcome() == Outcome("preempted")


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["preempted", "cancelled"])
def test_a_rank_that_leaves_early_ends_those_that_wait_for_it_and_speaks_for_a_rank_0_among_them(
    start: Start, outcome: str
) -> None:
    if outcome == "cancelled":
        cancel_marker(start.run_dir).touch()
    assert signalled(start, 1, LONG_S) == 1  # not 0, so that SLURM ends the others
    assert start.outcome() == Outcome(outcome)
    start.end("preempted", requeued=True)
    assert signalled(start, 1, LONG_S) == 1
    assert start.outcome() == Outcome("preempted", requeued=True)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_training_is_over_the_process_ends_whatever_it_still_waits_for(start: Start, rank: int) -> None:
    ended = subprocess.run(**launched(start, OVER, rank, 0), check=False, timeout=60)
    assert ended.returncode == 0
    assert start.outcome() == (Outcome("finished") if rank == 0 else None)


@pytest.mark.slow
def test_a_disk_that_does_not_answer_does_not_keep_a_rank_that_failed(start: Start) -> None:
    ended = subprocess.run(**launched(start, NO_DISK, 1, 0), check=False, timeout=60)
    assert ended.returncode == 1


def test_a_time_limit_that_is_too_short_to_begin_is_a_failure_of_which_the_supervisor_bears_only_some(
    start: Start,
) -> None:
    assert signalled(start, 1, SHORT_S) == 2
    (failure,) = start.failures()
    assert (failure.rank, failure.exit_code, start.outcome()) == (1, None, None)
    assert "before the first step; set the site's time_limit_min higher" in failure.message
    assert json.loads((start.folder / "failure-0001.json").read_text())["trace"] == ""


def test_a_full_disk_does_not_keep_a_rank_that_hangs_in_its_place(start: Start, tmp_path: Path) -> None:
    begun = time.monotonic()
    with (tmp_path / "out").open("w") as full:  # the log is on that disk too
        stuck = launched(start, STUCK, 1, 30)
        ended = subprocess.run(**stuck, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, time.monotonic() - begun < 25) == (1, True)
    assert "RuntimeError: stood still" in ended.stderr


def trained(start: Start, number: int) -> int:
    """The exit code of a rank that is to train, with a config that is none."""
    rank = launched(start, TRAINING, number, 0)
    rank["env"] |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_FOLDER": str(start.run_dir)}
    rank["env"] |= {f"SUBMITIT_LOCAL_{name}ID": str(number) for name in ("GLOBAL", "LOCAL")}
    rank["env"] |= {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.run(**rank, stderr=subprocess.PIPE, check=False).returncode


def test_a_rank_that_cannot_say_who_it_is_says_why_it_leaves(start: Start) -> None:
    (start.folder / "rank-0001.json" / "in the way").mkdir(parents=True)
    assert trained(start, 1) == 1
    (failure,) = start.failures()
    assert "rank-0001.json" in failure.message


def test_a_signal_in_the_middle_of_a_line_of_the_log_is_heeded_all_the_same(start: Start) -> None:
    ended = subprocess.run(**launched(start, IN_A_WRITE, 1, SHORT_S), stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "before the first step" in ended.stderr
    assert "before the first step" in start.failures()[0].message


def test_a_cancel_before_the_first_step_ends_the_job(start: Start) -> None:
    cancel_marker(start.run_dir).touch()
    assert signalled(start, 0, SHORT_S) == 1
    assert start.outcome() == Outcome("cancelled")


def test_a_cancel_that_found_no_rank_to_signal_is_heeded_by_each_as_it_begins(start: Start) -> None:
    cancel_marker(start.run_dir).touch()
    assert trained(start, 0) == 1
    assert (start.outcome(), start.failures()) == (Outcome("cancelled"), [])
