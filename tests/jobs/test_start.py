import os
from pathlib import Path

import pytest

from data_shards.errors import BadHost, UserError
from jobs.daemons import Process
from jobs.start import Start, append_lines, attempt_files, events, newest_start, note, this_host

LACKED = "libcuda.so.1: cannot open shared object file"  # by this host: no error of the code


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path / "run", "7", 2)


def test_a_start_is_the_one_that_the_jobs_script_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSEER_RUN_DIR", "/shared/first")
    monkeypatch.setenv("FARSEER_JOB", "7")
    monkeypatch.setenv("FARSEER_START", "2")
    assert Start.here() == Start(Path("/shared/first"), "7", 2)
    assert Start.here().folder == Path("/shared/first/starts/7-2")
    monkeypatch.delenv("FARSEER_START")
    assert Start.here().number == 0


def test_a_rank_that_begins_is_known_by_its_host_process_and_log(start: Start) -> None:
    for rank in (10, 9):
        start.begin(rank, f"/logs/{rank}")
    first, last = start.ranks()
    assert (first.rank, first.host, first.log) == (9, this_host(), "/logs/9")
    assert last.process == Process.of(os.getpid())


def test_a_host_has_the_name_by_which_slurm_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert this_host() == "node7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert this_host() == os.uname().nodename


def test_failures_are_told_in_the_order_in_which_they_came(start: Start) -> None:
    for rank in (3, 0, 2):
        start.fail(rank, RuntimeError("gloo"))
    assert [failure.rank for failure in start.failures()] == [3, 0, 2]


@pytest.mark.parametrize(
    ("error", "message", "exit_code", "suspects"),
    [
        (RuntimeError("gloo"), "RuntimeError: gloo", None, ()),
        (AttributeError("no x"), "AttributeError: no x", 1, ()),
        (ImportError("cannot import name 'Swav'"), "ImportError: cannot import name 'Swav'", 1, ()),
        (ImportError(f"{LACKED}: No such file"), f"ImportError: {LACKED}: No such file", None, (this_host(),)),
        (UserError("s3://photos: no such bucket"), "s3://photos: no such bucket", 2, ()),
        (BadHost("node3", "its clock is off"), "bad host node3: its clock is off", None, ("node3",)),
    ],
)
def test_a_failure_says_what_went_wrong_whose_fault_it_is_and_whether_it_would_come_again(
    start: Start, error: Exception, message: str, exit_code: int | None, suspects: tuple[str, ...]
) -> None:
    start.fail(1, error)
    (failure,) = start.failures()
    assert (failure.message, failure.exit_code, tuple(failure.suspects)) == (message, exit_code, suspects)
    assert failure.host == this_host()
    assert bool(failure.trace) == (not isinstance(error, UserError))


def test_the_long_words_of_a_library_are_cut_and_those_that_say_what_to_mend_are_not(start: Start) -> None:
    start.fail(0, RuntimeError("word " * 99))
    start.fail(1, UserError("word " * 99))
    library, ours = map(str, start.failures())
    assert library.endswith(" word ...")
    assert 150 < len(library.partition(": ")[2]) <= 160
    assert ours == f"rank 1 on {this_host()}: {'word ' * 99}"


def test_an_outcome_is_there_once_a_start_has_ended_well(start: Start) -> None:
    assert start.outcome() is None
    start.end("preempted", requeued=True)
    outcome = start.outcome()
    assert outcome is not None
    assert (outcome.outcome, outcome.requeued) == ("preempted", True)


def test_the_newest_start_of_a_job_is_that_of_the_highest_number(start: Start) -> None:
    assert newest_start(start.run_dir, "7") == Start(start.run_dir, "7", 0)
    for job, number in (("7", 2), ("7", 10), ("71", 11), ("8", 12)):
        Start(start.run_dir, job, number).begin(0, "")
    assert newest_start(start.run_dir, "7") == Start(start.run_dir, "7", 10)


def test_what_happens_to_a_start_is_noted_with_its_job_and_the_attempt_that_was_the_newest(start: Start) -> None:
    for number in (9, 10):
        (start.run_dir / f"a{number:02d}").mkdir(parents=True)
    (start.run_dir / "a10" / "metrics.jsonl").touch()
    start.note("requeued", reason="gloo")
    note(start.run_dir, "submitted")
    first, second = events(start.run_dir)
    assert {**first, "time": 0} == {
        "time": 0, "attempt": 10, "event": "requeued", "job": "7", "start": 2, "reason": "gloo",
    }  # fmt: skip
    assert second["event"] == "submitted"
    assert attempt_files(start.run_dir, "metrics.jsonl") == [start.run_dir / "a10" / "metrics.jsonl"]


def test_a_line_that_a_full_disk_has_cut_takes_no_other_with_it(tmp_path):
    path = tmp_path / "jobs.jsonl"
    append_lines(path, [{"event": "submitted"}])
    with path.open("a") as file:
        file.write('{"event": "requ')
    append_lines(path, [{"event": "submitted", "job": "8"}, {"event": "failed"}])
    assert [event["event"] for event in events(tmp_path)] == ["submitted", "submitted", "failed"]
