import io
import json
import time
from pathlib import Path

import pytest

from data_shards.errors import UserError
from jobs import runs
from jobs.runs import Job, history, logs, sentence, show, status, stored_checkpoints
from jobs.site import Site
from jobs.slurm import Queued
from jobs.start import Start, note


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "first" / "logs").mkdir(parents=True)
    job = Job("first", tmp_path / "first", f"file://{tmp_path}/store/first", "42")
    job.save()
    return job


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(shared_dir=str(tmp_path))


def lines(path: Path, *values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def queued(state: str, job: str = "42") -> list[Queued]:
    return [Queued("41", "RUNNING", "node9", "None", "x"), Queued(job, state, "node[1-2]", "None", "x")]


def test_a_job_is_remembered_with_its_run(job, site):
    assert Job.of(site, "first") == job


def test_an_unknown_run_is_refused_with_those_that_there_are(job, site):
    with pytest.raises(UserError, match=r"RUN=second: no such run in .*; there are: first"):
        Job.of(site, "second")


def test_a_running_job_shows_its_last_row_and_what_its_events_say(job):
    row = {
        "result": {"step": 70, "loss": 5.5},
        "run": {"time": time.time() - 5, "step_s": 0.5, "wait_s": 0.1, "images_s": 64},
    }
    lines(job.run_dir / "a01" / "metrics.jsonl", {"result": {"step": 99, "loss": 1.0}, "run": {}})
    lines(job.run_dir / "a02" / "metrics.jsonl", {"result": {"step": 69}, "run": {}}, row)
    lines(job.run_dir / "a01" / "events.jsonl", {"time": 1.0, "event": "started", "step": 0, "steps": 200})
    lines(
        job.run_dir / "a02" / "events.jsonl",
        {"time": 3.0, "event": "resumed", "step": 40},
        {"time": 4.0, "event": "committed", "step": 60},
    )
    found = status(job, queued("RUNNING"))
    assert (found.state, found.step, found.steps, found.loss, found.images_s) == ("running", 70, 200, 5.5, 64)
    assert (found.wait, found.committed, found.starts) == (0.2, 60, 2)
    assert found.seconds_ago == pytest.approx(5, abs=3)


def test_a_row_that_was_cut_while_it_was_written_is_left_out(job):
    path = job.run_dir / "a01" / "metrics.jsonl"
    lines(path, {"result": {"step": 7}, "run": {}})
    with path.open("a") as file:
        file.write('{"result": {"st')
    assert status(job, queued("RUNNING")).step == 7


def test_the_state_of_a_job_that_is_over_says_how_it_ended_and_what_to_do(job):
    assert status(job, queued("PENDING")).state == "waiting"
    assert status(job, []).state == "ended without a word (make resume RUN=first goes on)"
    note(job.run_dir, "failed", reason="rank 0 on node1: s3://photos: no such bucket")
    assert status(job, []).state == "failed (rank 0 on node1: s3://photos: no such bucket)"
    Start(job.run_dir, "42", 0).end("preempted", requeued=True)
    Start(job.run_dir, "42", 10).end("finished")
    assert status(job, []).state == "finished"


def test_the_history_of_a_run_is_one_line_of_time_over_all_attempts(job):
    lines(job.run_dir / "a01" / "events.jsonl", {"time": 1.0, "event": "started"}, {"time": 4.0, "event": "preempted"})
    lines(job.run_dir / "jobs.jsonl", {"time": 0.5, "event": "submitted"}, {"time": 5.0, "event": "requeued"})
    lines(job.run_dir / "a02" / "events.jsonl", {"time": 9.0, "event": "resumed"})
    assert [event["event"] for event in history(job.run_dir)] == [
        "submitted",
        "started",
        "preempted",
        "requeued",
        "resumed",
    ]


def test_an_event_reads_as_a_line():
    event = {"time": 0.0, "attempt": 2, "event": "requeued", "reason": "rank 1: gloo", "committed": None, "start": 3}
    assert sentence(event).endswith("requeued: reason rank 1: gloo, start 3")


def test_logs_are_shown_rank_by_rank_from_the_newest_start(job):
    for number, start in ((0, "old"), (1, "new")):
        for rank in (0, 1):
            path = job.run_dir / "logs" / f"{start}_{rank}_log.out"
            path.write_text("".join(f"{start} {i}\n" for i in range(5)))
            Start(job.run_dir, "42", number).begin(rank, str(path))
    assert [path.name for path in logs(job)] == ["new_0_log.out", "new_1_log.out"]
    out = io.StringIO()
    show(job, 2, follow=False, out=out)
    assert out.getvalue() == "0| new 3\n0| new 4\n1| new 3\n1| new 4\n"


def test_before_its_ranks_have_begun_the_batch_scripts_log_is_shown(job):
    (job.run_dir / "logs" / "42_0_log.out").write_text("farseer: no\n")
    out = io.StringIO()
    show(job, 10, follow=False, out=out)
    assert out.getvalue() == "0| farseer: no\n"


def test_following_shows_each_line_once_and_whole_until_the_job_is_over(job, monkeypatch):
    path = job.run_dir / "logs" / "42_0_log.out"
    path.write_text("one\ntw")
    states = iter(["RUNNING", "RUNNING", None])

    def state(_):
        word = next(states)
        if word is None:
            path.write_text("one\ntwo\nthree\n")
        return word

    monkeypatch.setattr(runs, "state", state)
    monkeypatch.setattr(runs, "FOLLOW_S", 0)
    out = io.StringIO()
    show(job, 10, follow=True, out=out)
    assert out.getvalue() == "0| one\n0| two\n0| three\n"


def test_a_cancel_of_a_job_that_is_over_is_refused(job, monkeypatch):
    monkeypatch.setattr(runs.slurm, "queue", list)
    with pytest.raises(UserError, match="over already"):
        runs.cancel(job)
    assert not (job.run_dir / "cancel").exists()


def test_checkpoints_in_the_store_exist_when_their_manifest_is_there(tmp_path):
    root = tmp_path / "store" / "first" / "checkpoints"
    for name, files in (("step-000000100-a1", ("w", "MANIFEST.json")), ("step-000000200-a1", ("w",))):
        for file in files:
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / file).write_text("12345")
    assert stored_checkpoints(f"file://{tmp_path}/store/first") == [
        {"name": "step-000000100-a1", "bytes": 10, "state": "committed"},
        {"name": "step-000000200-a1", "bytes": 5, "state": "not committed"},
    ]
