import io
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import logs as showing
from jobs.daemons import Process
from jobs.logs import logs, sentence, show, what_failed
from jobs.runs import Job
from jobs.slurm import SlurmError
from jobs.stamps import Stamped, parse, stamp_output
from jobs.start import Start


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "first" / "logs").mkdir(parents=True)
    job = Job("first", tmp_path / "first", f"file://{tmp_path}/store/first", "42")
    job.save()
    return job


def rank(job: Job, number: int, text: str, start: int = 0) -> Path:
    path = job.run_dir / "logs" / f"{start}_{number}_log.out"
    path.write_text(text)
    Start(job.run_dir, "42", start).begin(number, str(path))
    return path


def shown(job: Job, lines: int = 100) -> list[str]:
    out = io.StringIO()
    show(job, lines, follow=False, out=out)
    return out.getvalue().splitlines()


def test_a_line_is_stamped_once_however_it_is_written_and_read_back_with_its_time(monkeypatch):
    out = io.StringIO()
    stream = Stamped(out)
    print("one", "two", file=stream)
    stream.write("three\nfo")
    stream.write("ur\n")
    found = [parse(line) for line in out.getvalue().splitlines()]
    assert [text for _, text in found] == ["one two", "three", "four"]
    times = [at for at, _ in found if at is not None]
    assert len(times) == 3
    assert times == sorted(times)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    stamp_output()
    assert isinstance(sys.stdout, Stamped)


class Interrupted(io.StringIO):
    """A stream in the midst of whose first write something else of the same thread writes, such as a destructor."""

    stamped: Stamped | None = None

    def write(self, text: str) -> int:
        stamped, self.stamped = self.stamped, None
        if stamped is not None:
            stamped.write("by the way\n")
        return super().write(text)


def test_what_is_written_in_the_midst_of_a_line_does_not_wait_for_its_end():
    out = Interrupted()
    out.stamped = stream = Stamped(out)
    writing = threading.Thread(target=stream.write, args=("a line\n",), daemon=True)
    writing.start()
    writing.join(20)
    assert sorted(parse(line)[1] for line in out.getvalue().splitlines()) == ["a line", "by the way"]


def test_the_lines_of_all_ranks_are_merged_by_time_and_those_without_one_stay_behind_theirs(job):
    at = "2026-11-23T20:15:0{}.000Z {}"
    rank(job, 0, "\n".join([at.format(1, "a"), "  of C", at.format(4, "d")]) + "\n")
    rank(job, 1, "\n".join([at.format(2, "b"), at.format(3, "c")]) + "\n")
    assert [line[9:] for line in shown(job)] == ["0| a", "0|   of C", "1| b", "1| c", "0| d"]
    assert [line[9:] for line in shown(job, lines=2)] == ["1| c", "0| d"]


def test_submitits_own_lines_have_their_place_among_the_others():
    at, text = parse("submitit INFO (2026-11-23 20:15:04,500) - Starting")
    assert at is not None
    assert at % 1 == 0.5
    assert text.endswith("Starting")


def test_only_the_newest_start_is_shown(job):
    rank(job, 0, "old\n", start=0)
    rank(job, 0, "new\n", start=1)
    assert [path.name for path in logs(job)] == ["1_0_log.out"]
    assert shown(job) == ["0| new"]


def test_before_its_ranks_have_begun_the_batch_scripts_log_is_shown(job):
    (job.run_dir / "logs" / "42_0_log.out").write_text("farseer: no\n")
    assert shown(job) == ["0| farseer: no"]


def test_of_a_long_log_only_the_end_is_read_and_no_line_is_cut(job, monkeypatch):
    monkeypatch.setattr(showing, "TAIL_BYTES", 100)
    rank(job, 0, "".join(f"line {number:04d}\n" for number in range(1000)))
    assert shown(job) == [f"0| line {number:04d}" for number in range(991, 1000)]


def test_following_shows_each_line_once_and_whole_until_the_job_is_over(job, monkeypatch):
    path = job.run_dir / "logs" / "42_0_log.out"
    path.write_text("one\ntw")
    states = iter(["RUNNING", "RUNNING", None])

    def state(_):
        word = next(states)
        if word is None:
            path.write_text("one\ntwo\nthree\n")
        return word

    monkeypatch.setattr(showing, "state", state)
    monkeypatch.setattr(showing, "FOLLOW_S", 0)
    monkeypatch.setattr(showing, "ASK_S", 0)
    out = io.StringIO()
    show(job, 10, follow=True, out=out)
    assert out.getvalue() == "0| one\n0| two\n0| three\n"


def followed(job: Job, monkeypatch: pytest.MonkeyPatch, words: list[str | Exception | None], path: Path) -> list[str]:
    """What is shown of a log that has one more of its lines at each answer to whether the job is over."""
    answers = iter(words)

    def state(_):
        word = next(answers)
        with path.open("a") as file:
            file.write("".join(f"line {number}\n" for number in range(3)))
        if isinstance(word, Exception):
            raise word
        return word

    monkeypatch.setattr(showing, "state", state)
    monkeypatch.setattr(showing, "FOLLOW_S", 0)
    out = io.StringIO()
    show(job, 1, follow=True, out=out)
    return out.getvalue().splitlines()


def test_of_what_comes_while_following_every_line_is_shown(job, monkeypatch):
    monkeypatch.setattr(showing, "ASK_S", -1)
    path = rank(job, 0, "")
    assert followed(job, monkeypatch, ["RUNNING", "RUNNING", None], path) == ["0| line 2"] + 2 * [
        "0| line 0", "0| line 1", "0| line 2",
    ]  # fmt: skip


def test_following_goes_on_while_slurm_is_too_busy_to_say_whether_the_job_is_over(job, monkeypatch):
    monkeypatch.setattr(showing, "ASK_S", -1)
    told = followed(job, monkeypatch, [SlurmError("Socket timed out"), None], rank(job, 0, ""))
    assert len(told) == 4


def test_slurm_is_asked_now_and_then_and_a_process_of_this_machine_at_every_look(job, monkeypatch):
    monkeypatch.setattr(showing, "ASK_S", 0.2)
    monkeypatch.setattr(showing, "FOLLOW_S", 0.001)
    asked: list[float] = []

    def state(_):
        asked.append(time.monotonic())
        return "RUNNING" if len(asked) < 3 else None

    monkeypatch.setattr(showing, "state", state)
    show(job, 1, follow=True, out=io.StringIO())
    assert len(asked) == 3
    assert asked[2] - asked[0] > 0.4
    monkeypatch.setattr(showing, "ASK_S", 60)
    asked.clear()
    show(replace(job, process=Process(1, 1)), 1, follow=True, out=io.StringIO())
    assert len(asked) == 3


def test_before_anything_is_written_there_is_nothing_to_show(job):
    assert shown(job) == []
    (job.run_dir / "logs" / "local.log").write_bytes(b"farseer: \xff\n")
    assert shown(job) == ["job| farseer: \N{REPLACEMENT CHARACTER}"]


def test_the_rank_that_failed_first_is_told_first_with_its_traceback_and_the_others_in_a_line_each(job):
    def fail(number: int, at: float) -> None:
        folder = Start(job.run_dir, "42", 0).folder
        folder.mkdir(parents=True, exist_ok=True)
        values = {"rank": number, "host": "node1", "time": at, "message": f"E{number}", "exit_code": None}
        (folder / f"failure-{number:04d}.json").write_text(json.dumps({**values, "trace": f"Traceback {number}\n"}))

    for number in range(9):
        fail(number, 10.0 - number)
    told = list(what_failed(job))
    assert told[:2] == ["FAILED FIRST  rank 8 on node1: E8", "Traceback 8"]
    assert sum(line.startswith("then") for line in told) == 5
    assert "and 3 ranks more" in told[-2]
    assert not any("Traceback" in line for line in told[2:])


def test_events_read_as_sentences():
    assert sentence({"time": 0.0, "attempt": 2, "event": "requeued", "reason": "rank 1: gloo", "start": 3}).endswith(
        "  requeued: rank 1: gloo (start 3)"
    )
    assert sentence({"time": 0.0, "event": "requeued", "step": 7}).endswith("  requeued at step 7")
    resumed = {"time": 0.0, "attempt": 2, "event": "resumed", "step": 40, "steps": 200, "ranks": 8}
    assert sentence(resumed).endswith("  training goes on from step 40 to 200, on 8 ranks")
    assert sentence({"time": 0.0, "event": "save delayed", "step": 3, "why": None}).endswith("save delayed (step 3)")
    numbers = {"time": 0.0, "event": "odd", "share": 0.123456, "count": 123456}
    assert sentence(numbers).endswith("odd (share 0.123, count 123456)")
    braces = {"time": 0.0, "event": "failed", "reason": "KeyError: '{x}'"}
    assert sentence(braces).endswith("the job has FAILED: KeyError: '{x}'")


def test_a_start_that_leaves_out_other_images_than_before_says_so():
    event = {"time": 0.0, "event": "removed", "step": 40, "count": 3, "hash": "1a2b", "lists": [2]}
    assert sentence(event).endswith("from step 40 on 3 removed images are left out (hash 1a2b, lists [2])")
    changed = event | {"note": "another list than before"}
    assert "from step 40 on 3 removed images are left out, by another list than before (" in sentence(changed)


def test_so_many_lines_are_shown_as_were_asked_for_and_none_of_none(job):
    rank(job, 0, "one\ntwo\nthree\n")
    assert [line.partition("| ")[2] for line in shown(job, 2)] == ["two", "three"]
    assert len(shown(job, 4)) == 3
    assert shown(job, 0) == []
