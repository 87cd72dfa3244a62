import json
import os
import time
from pathlib import Path

import pytest

from jobs.blame import START_LINE, blame, blamed, excluded, kind, last_words, log_of, lost, out_of_memory, suspects
from jobs.start import Failure, Start

LOG = f"""{START_LINE} 0 of job 7 on node1,node2
srun: error: node1: task 0: Exited with exit code 1
{START_LINE} 1 of job 7 on node1,node2
srun: error: node2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
srun: error: node1: task 0: Terminated
"""


@pytest.fixture
def start(tmp_path: Path) -> Start:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "7_0_log.out").write_text(LOG)
    return Start(tmp_path / "run", "7", 1)


def said(start: Start, text: str) -> None:
    (start.run_dir / "logs" / "7_0_log.out").write_text(text)


def failure(host: str, *named: str) -> Failure:
    return Failure(0, host, 1.0, "gloo", "", None, named)


def test_the_rank_that_left_first_in_the_last_start_is_found_in_the_log(start: Start) -> None:
    assert last_words(log_of(start)) == ("node2", "Killed")
    assert last_words(log_of(Start(start.run_dir, "8", 0))) is None


def test_silent_hosts_are_suspect_then_the_one_that_left_without_a_word(start: Start) -> None:
    assert list(suspects(log_of(start), [failure("node1", "node3")])) == ["node3"]
    assert suspects(log_of(start), [failure("node1")]) == {
        "node2": "a rank on node2 left first, without a word (Killed)"
    }
    assert suspects(log_of(start), [failure("node2")]) == {}  # it could say what went wrong


@pytest.mark.parametrize(
    "words",
    [
        "_server_write write failed: Bad file descriptor\nsrun: error: Aborting, io error and missing step on node 1",
        "step_launch_notify_io_failure: aborting, io error with slurmstepd on node 1",
        "Cannot communicate with node 1.  Aborting job.",
    ],
)
def test_a_host_that_srun_has_lost_is_suspect_and_not_the_one_that_srun_ended_for_it(start: Start, words: str) -> None:
    said(start, f"{START_LINE} 1 of job 7 on node1,node2\nsrun: error: {words}\nsrun: error: node1: task 0: Killed\n")
    assert suspects(log_of(start), []) == {"node2": "srun has lost node2: its step's daemon is gone"}
    assert list(suspects(log_of(start), [failure("node1")])) == ["node2"]
    assert list(suspects(log_of(start), [failure("node1", "node3")])) == ["node3"]
    assert suspects(log_of(start), [failure("node2")]) == {}


def test_a_node_that_the_step_does_not_have_is_nobody(start: Start) -> None:
    said(
        start, f"{START_LINE} 1 of job 7 on node1,node2\nsrun: error: Cannot communicate with node 2.  Aborting job.\n"
    )
    assert lost(log_of(start)) is None


def test_a_log_that_is_no_text_in_places_is_read_all_the_same(start: Start) -> None:
    with (start.run_dir / "logs" / "7_0_log.out").open("ab") as log:
        log.write(b"\xff\xfe\n")
    assert last_words(log_of(start)) == ("node2", "Killed")


def test_a_job_that_asked_for_too_little_memory_is_no_fault_of_its_host(start: Start) -> None:
    said(
        start,
        f"{START_LINE} 1 of job 7 on node1,node2\nsrun: error: node1: task 0: Killed\n"
        "srun: error: node2: task 1: Out Of Memory\n",
    )
    assert suspects(log_of(start), []) == {}


def test_what_srun_says_of_memory_is_found_wherever_it_says_it(start: Start) -> None:
    assert out_of_memory(log_of(start)) is None
    said(start, LOG + "srun: error: node2: tasks 1,3-4: Out Of Memory\n")
    assert out_of_memory(log_of(start)) == "srun: node2: tasks 1,3-4: Out Of Memory"
    assert kind(str(out_of_memory(log_of(start)))) == "out of memory"


@pytest.mark.parametrize("next_start", [Start(Path(), "7", 2), Start(Path(), "7", 11), Start(Path(), "71", 1)])
def test_a_start_that_did_not_come_to_its_ranks_blames_nobody_out_of_an_earlier_ones_log(
    start: Start, next_start: Start
) -> None:
    with (start.run_dir / "logs" / "7_0_log.out").open("a") as log:
        log.write("module: command not found\n")
    later = Start(start.run_dir, next_start.job, next_start.number)
    (start.run_dir / "logs" / f"{later.job}_0_log.out").write_text(LOG)
    assert (last_words(log_of(later)), lost(log_of(later)), suspects(log_of(later), [])) == (None, None, {})


def test_blames_that_the_disk_does_not_take_are_told_and_hold_nothing_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"hosts-{os.getuid()}.jsonl").mkdir()  # as good as another's file: it cannot be written
    blame(tmp_path, "a", {"node2": "x"})
    assert '"node2"' in capsys.readouterr().err


def test_a_list_that_cannot_be_read_or_holds_something_else_takes_nothing_from_the_others(tmp_path: Path) -> None:
    for _ in range(2):
        blame(tmp_path, "a", {"node2": "x"})
    (tmp_path / "hosts-another.jsonl").mkdir()  # as good as a file of mode 600
    (tmp_path / "hosts-1.jsonl").write_text(
        '{"host": "node3"}\n{"time": "now", "host": "node3", "run": "a", "reason": "b"}\n'
        + 2 * f'{{"time": {time.time()}, "host": 3, "run": "a", "reason": "b"}}\n'
    )
    assert excluded(tmp_path, 12) == ["node2"]


def test_others_can_read_a_list_whatever_the_umask_of_its_writer(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        blame(tmp_path, "a", {"node2": "x"})
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_host_that_was_named_and_wakes_up_blames_no_other(start: Start) -> None:
    told = suspects(log_of(start), [failure("node1", "node2"), failure("node2", "node1"), failure("node3", "node2")])
    assert told == {"node2": "rank 0 on node1: gloo"}


def test_all_hosts_that_say_of_themselves_that_they_are_bad_are_suspect_the_first_one_first(start: Start) -> None:
    assert list(suspects(log_of(start), [failure("node3", "node3"), failure("node1", "node1")])) == ["node3", "node1"]


def test_a_host_to_blame_twice_stays_out_until_it_is_forgotten(tmp_path: Path) -> None:
    assert excluded(tmp_path, 12) == []
    for run, hosts in (("a", {"node2": "x"}), ("b", {"node2": "y", "node3": "z"}), ("c", {})):
        blame(tmp_path, run, hosts)
    assert excluded(tmp_path, 12) == ["node2"]
    old = {"time": time.time() - 13 * 3600, "host": "node3", "run": "a", "reason": "x"}
    (tmp_path / "hosts-another.jsonl").write_text(json.dumps(old) + "\n")
    assert excluded(tmp_path, 12) == ["node2"]
    assert sorted(excluded(tmp_path, 14)) == ["node2", "node3"]


def test_the_worst_host_is_excluded_first_and_what_is_told_of_it_is_in_the_order_of_time(tmp_path: Path) -> None:
    now = time.time()
    for user, told in (("1", [(1, "node2"), (3, "node3"), (5, "node3")]), ("2", [(2, "node3"), (4, "node2")])):
        lines = [{"time": now - 9 + at, "host": host, "run": "a", "reason": str(at)} for at, host in told]
        (tmp_path / f"hosts-{user}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert excluded(tmp_path, 12) == ["node3", "node2"]
    assert [line["reason"] for line in blamed(tmp_path, 12)["node3"]] == ["2", "3", "5"]


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory", "out of memory"),
        ("the GPU is full; each of these takes less of it: more ranks: DALI: CUDA allocation failed", "out of memory"),
        ("a rank on node2 left first, without a word (Killed)", "out of memory"),
        ("rank 0 on node1: Hang: training stood still for 61 s", "hang"),
        ("rank 0 on node1: the time limit came 500 s after the start, before the first step", "time"),
        ("rank 0 on node1: Overdue: asked to stop, and not done in time: at data after step 7", "time"),
        ("OSError: [Errno 28] No space left on device", "disk"),
        ("s3://livingroom/x: the store did not answer", "store"),
        ("s3://runs/x: the store did not answer", "store"),
        ("RuntimeError: [gloo] Connection closed by peer", "collective"),
        ("RuntimeError: CUDA error: uncorrectable ECC error", "node"),
        ("srun has lost node2: its step's daemon is gone", "node"),
        ("rank 0 on node1: bad host node1: its clock is +90 s from the store's", "node"),
        ("something else", "unknown"),
    ],
)
def test_trouble_has_a_name(message: str, name: str) -> None:
    assert kind(message) == name
