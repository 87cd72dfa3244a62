import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from jobs import runs
from jobs.daemons import Process
from jobs.elsewhere import elsewhere, stores_of
from jobs.launch import launch
from jobs.runs import Job, history, status
from jobs.site import ROOT, Site
from jobs.slurm import Queued
from jobs.start import Start, note
from jobs.submit import _check_free


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
    return [
        Queued("41", "RUNNING", "node9", "None", "x"),
        Queued(job, state, "node[1-2]", "Priority" if state == "PENDING" else "None", "x"),
    ]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"run": "odd", "store": "x", "id": "1", "process": {}}'])
def test_an_odd_folder_takes_no_other_run_out_of_the_status(job, site, tmp_path, monkeypatch, text):
    monkeypatch.setattr(runs.slurm, "queue", lambda names: [])
    for name in ("odd", "first (copy)"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/odd/job.json: not what a submission writes"):
        Job.of(site, "odd")
    known = runs.statuses(site)
    found = {one.run: one for one in known}
    assert set(found) == {"first", "odd"}
    assert (found["odd"].state, found["odd"].look.startswith(f"{tmp_path}/odd/job.json: ")) == ("unknown", True)
    assert stores_of(known) == [f"file://{tmp_path}/store"]
    assert elsewhere(known, []) == ([], [])


def test_a_job_is_remembered_with_its_run(job, site):
    assert Job.of(site, "first") == job


@contextlib.contextmanager
def foreign(mode: int) -> Iterator[Job]:
    """A run whose folder is open so far to this process, which is root no longer."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        job = Job("first", Path(folder) / "first", "s3://runs/first", "42")
        job.save()
        (job.run_dir / "config.yaml").write_text("lr: 1\n")
        Path(folder).chmod(0o755)
        job.run_dir.chmod(mode)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            yield job
        finally:
            os.seteuid(user)
            job.run_dir.chmod(0o755)


def test_what_only_the_owner_of_a_run_may_do_is_refused_with_their_name(monkeypatch):
    monkeypatch.setattr(runs.slurm, "queue", lambda names: queued("RUNNING"))
    with foreign(0o555) as job:
        site = Site(name="mine", shared_dir=str(job.run_dir.parent))
        said = f"RUN=first: {job.run_dir} is {job.run_dir.owner()}'s, and closed to you: .*Permission denied"
        assert Job.of(site, "first") == job
        with pytest.raises(UserError, match=said):
            runs.cancel(job)
        with pytest.raises(UserError, match=said):
            launch(site, "first", job.store, {"lr": 30}, code=ROOT)
        assert (job.run_dir / "config.yaml").read_text() == "lr: 1\n"


def test_a_run_that_its_owner_keeps_closed_is_refused_with_their_name():
    with foreign(0o000) as job:
        site = Site(name="mine", executor="local", shared_dir=str(job.run_dir.parent))
        said = f"RUN=first: {job.run_dir} is {job.run_dir.owner()}'s, and closed to you: .*Permission denied"
        with pytest.raises(UserError, match=said):
            Job.of(site, "first")
        with pytest.raises(UserError, match=said):
            launch(site, "first", job.store, {"lr": 30}, code=ROOT)
        with pytest.raises(UserError, match=said):
            _check_free(site, "first", job.store)


def test_an_unknown_run_is_refused_with_those_that_there_are(job, site):
    with pytest.raises(UserError, match=r"RUN=second: no such run in .*; there are: first"):
        Job.of(site, "second")


def test_a_running_job_shows_its_last_row_and_what_its_events_say(job):
    row = {
        "result": {"step": 70, "loss": 5.5},
        "run": {"time": time.time() - 5, "step_s": 0.5, "wait_s": 0.1, "images_s": 64},
    }
    spent = {"time": 1.0, "step_s": 0.5}
    lines(job.run_dir / "a01" / "metrics.jsonl", {"result": {"step": 99, "loss": 1.0}, "run": spent})
    lines(job.run_dir / "a02" / "metrics.jsonl", {"result": {"step": 69}, "run": spent}, row)
    lines(
        job.run_dir / "a01" / "events.jsonl",
        {"time": 1.0, "attempt": 1, "event": "started", "step": 0, "steps": 200},
    )
    lines(
        job.run_dir / "a02" / "events.jsonl",
        {"time": 3.0, "attempt": 2, "event": "resumed", "step": 40},
        {"time": 4.0, "attempt": 2, "event": "committed", "step": 60},
    )
    found = status(job, queued("RUNNING"))
    assert (found.state, found.step, found.steps, found.loss, found.images_s) == ("running", 70, 200, 5.5, 64)
    assert (found.wait, found.committed, found.starts) == (0.2, 60, 2)
    assert found.seconds_ago == pytest.approx(5, abs=3)
    assert (found.at_risk, found.nodes, found.look) == (10, "node[1-2]", "")
    assert found.left_s == pytest.approx(130 * 0.5)
    assert found.committed_ago_s == pytest.approx(time.time() - 4.0, abs=5)
    assert status(job, queued("PENDING")).left_s is None


def test_a_run_that_went_back_behind_its_newest_checkpoint_has_nothing_at_risk(job):
    now = time.time()
    attempt(job, 1, 0, [(90, now - 9), (91, now - 8)], {"time": now - 8, "event": "committed", "step": 91})
    attempt(job, 2, 60, [(61, now - 2), (62, now - 1)])
    found = status(job, queued("RUNNING"))
    assert (found.committed, found.at_risk) == (91, 0)


def test_the_wait_for_data_is_that_of_many_steps_and_not_of_the_last_one_for_which_nothing_is_fetched(job):
    waits = (0.3, 0.1, 0.2, 0.0)
    rows = [
        {"result": {"step": n}, "run": {"time": 1.0, "step_s": 0.5, "wait_s": wait}} for n, wait in enumerate(waits)
    ]
    lines(job.run_dir / "a01" / "metrics.jsonl", *rows)
    assert status(job, queued("RUNNING")).wait == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("starved", "ranks", "told"),
    [
        ((1, 1, 1, 0), 2, ", most of it for rank 1 on node2"),
        ((0, 0, 0, 1), 2, ", most of it for rank 0 on node1"),
        ((1, 0, 1, 0), 2, ""),
        ((0, 0, 0, 0), 1, ""),
        ((-1, -1, -1, -1), 2, ""),  # not told
    ],
)
def test_a_rank_for_whose_images_all_others_wait_is_named_with_its_host(job, starved, ranks, told):
    spent = {"time": time.time(), "step_s": 0.5, "wait_s": 0.4}
    rows = [{"result": {"step": n}, "run": {**spent, "wait_rank": rank}} for n, rank in enumerate(starved)]
    lines(job.run_dir / "a01" / "metrics.jsonl", *rows)
    begun = {"time": time.time(), "attempt": 1, "event": "started", "step": 0, "steps": 9, "ranks": ranks}
    lines(job.run_dir / "a01" / "events.jsonl", begun)
    for rank in range(2):
        record = {"rank": rank, "host": f"node{rank + 1}", "pid": 1, "started": 1, "log": ""}
        start = job.run_dir / "starts" / "42-1" / f"rank-000{rank}.json"
        start.parent.mkdir(parents=True, exist_ok=True)
        start.write_text(json.dumps(record))
    expected = f"waits for data 80% of the time{told}: reader.connections, cpus_per_rank"
    assert status(job, queued("RUNNING")).look == expected


def attempt(job: Job, number: int, start: int, rows: list[tuple[int, float]], *events: dict[str, Any]) -> None:
    """An attempt as it lies on the shared disk: its start, its rows (step, time) of a second each, its events."""
    begun = {"event": "resumed" if start else "started", "step": start, "steps": 200, "ranks": 2}
    told = [{"time": rows[0][1] - 10, "attempt": number, **begun}, *({"attempt": number, **event} for event in events)]
    lines(job.run_dir / f"a{number:02d}" / "events.jsonl", *told)
    values = [
        {"result": {"step": step, "loss": 5.0}, "run": {"time": time, "step_s": 1.0, "wait_s": 0.1, "images_s": 64.0}}
        for step, time in rows
    ]
    lines(job.run_dir / f"a{number:02d}" / "metrics.jsonl", *values)


def test_restarts_lost_steps_and_goodput_come_from_the_attempts(job):
    now = time.time()
    attempt(job, 1, 0, [(step, now - 200 + step) for step in range(1, 91)])
    attempt(job, 2, 60, [(step, now - 140 + step) for step in range(61, 141)])
    found = status(job, queued("RUNNING"))
    assert found.goodput is not None
    assert (found.goodput.restarts, found.goodput.lost_steps) == (1, 30)
    assert found.goodput.productive_s == pytest.approx(140, abs=1)
    assert found.goodput.share == pytest.approx(140 / 209, abs=0.02)


def test_the_last_column_says_where_to_look(job):
    now = time.time()
    attempt(
        job,
        1,
        0,
        [(step, now - 10 + step) for step in range(1, 9)],
        {"time": now, "event": "alarm", "reason": "collapse"},
    )
    assert status(job, queued("RUNNING")).look == "collapse"
    attempt(job, 1, 0, [(step, now - 500 + step) for step in range(1, 9)])
    (start := job.run_dir / "starts" / f"{job.id}-0").mkdir(parents=True)
    os.utime(start, (now - 510, now - 510))
    assert status(job, queued("RUNNING")).look == "no step for 8 min: make logs RUN=first"
    assert status(job, queued("PENDING")).look == "Priority"
    assert status(job, []).look == "make resume RUN=first goes on"
    note(job.run_dir, "failed", reason="rank 0 on node1: RuntimeError: f(x)")
    assert status(job, []).look == "rank 0 on node1: RuntimeError: f(x); make logs RUN=first"


def test_a_run_stands_still_when_neither_a_step_nor_an_event_has_come_for_many_of_its_steps(job):
    def look(step_s: float, last_step: float, last_event: float) -> str:
        now = time.time()
        row = {"result": {"step": 8}, "run": {"time": now - last_step, "step_s": step_s, "wait_s": 0.0}}
        lines(job.run_dir / "a01" / "metrics.jsonl", *[row] * 3)
        begun = {"time": now - last_event, "attempt": 1, "event": "started", "step": 0}
        lines(job.run_dir / "a01" / "events.jsonl", begun)
        return status(job, queued("RUNNING")).look

    assert look(0.1, 9999, 9999) == ""  # its ranks are yet to come: it has waited in the queue
    start = job.run_dir / "starts" / f"{job.id}-0"
    start.mkdir(parents=True)
    assert look(0.1, 9999, 9999) == ""
    os.utime(start, (time.time() - 9999,) * 2)
    (job.run_dir / "a01" / "metrics.jsonl").unlink()
    assert status(job, queued("RUNNING")).look == "no step for 167 min: make logs RUN=first"
    few, many = 0.7 * runs.MEDIANS, 1.1 * runs.MEDIANS
    slow = 2 * runs.STILL_S / runs.MEDIANS  # seconds of a step of which that many take longer than STILL_S
    assert look(0.1, 0.7 * runs.STILL_S, 9999) == ""
    assert look(0.1, 1.1 * runs.STILL_S, 9999).startswith("no step for ")
    assert look(0.1, 9999, 0.7 * runs.STILL_S) == ""
    assert look(slow, few * slow, 9999) == ""
    assert look(slow, many * slow, 9999).startswith("no step for ")


def test_what_was_wrong_before_the_last_start_is_shown_no_more_and_of_its_alarms_the_last_one_is(job):
    now = time.time()
    bad = [
        {"time": now - 50, "event": "alarm", "reason": "collapse"},
        {"time": now - 49, "event": "save failed", "step": 5, "reason": "full"},
    ]
    attempt(job, 1, 0, [(step, now - 60 + step) for step in range(1, 9)], *bad)
    attempt(job, 2, 5, [(step, now - 20 + step) for step in range(6, 9)])
    assert status(job, queued("RUNNING")).look == ""
    alarms = [{"time": now - 9 + n, "event": "alarm", "reason": reason} for n, reason in enumerate(("collapse", "nan"))]
    attempt(job, 2, 5, [(step, now - 20 + step) for step in range(6, 9)], *alarms)
    assert status(job, queued("RUNNING")).look == "nan"


def test_the_goodput_of_a_run_that_is_over_falls_no_further(job):
    long_ago = time.time() - 100_000
    attempt(job, 1, 0, [(step, long_ago + step) for step in range(1, 91)])
    over, running = status(job, []).goodput, status(job, queued("RUNNING")).goodput
    assert over is not None
    assert running is not None
    assert over.share == pytest.approx(0.9, abs=0.01)
    assert running.share < 0.01


def test_a_save_that_has_not_arrived_is_shown_until_one_has(job):
    now = time.time()
    rows = [(step, now - 9 + step) for step in range(1, 9)]
    failed = {"time": now - 2, "event": "save failed", "step": 5, "reason": "[Errno 28] No space left on device"}
    attempt(job, 1, 0, rows, failed)
    assert status(job, queued("RUNNING")).look == "save failed: [Errno 28] No space left on device"
    attempt(job, 1, 0, rows, failed, {"time": now - 1, "event": "committed", "step": 8})
    assert status(job, queued("RUNNING")).look == ""


def test_all_runs_cost_one_question_to_slurm(tmp_path, site, monkeypatch):
    for number in range(30):
        job = Job(f"run{number:02d}", tmp_path / f"run{number:02d}", "file:///x", str(number))
        attempt(job, 1, 0, [(1, 1.0), (2, 2.0)])
        job.save()
    asked: list[int] = []
    monkeypatch.setattr(runs.slurm, "queue", lambda names: asked.append(len(names)) or queued("RUNNING", "7"))
    found = runs.statuses(site)
    assert [one.run for one in found] == [f"run{number:02d}" for number in range(30)]
    assert [one.run for one in found if one.state == "running"] == ["run07"]
    assert asked == [30]


def test_while_slurm_does_not_answer_the_disk_tells_what_it_knows(tmp_path, site, monkeypatch):
    for name, outcome in (("done", "finished"), ("other", None)):
        job = Job(name, tmp_path / name, "file:///x", name)
        attempt(job, 1, 0, [(1, 1.0), (2, 2.0)])
        job.save()
        if outcome is not None:
            job.start.end(outcome)

    def busy(names):
        raise runs.slurm.SlurmError("SLURM does not answer (Socket timed out)")

    monkeypatch.setattr(runs.slurm, "queue", busy)
    found = {one.run: one for one in runs.statuses(site)}
    assert (found["done"].state, found["other"].state) == ("finished", "unknown")
    assert (found["other"].step, found["other"].look) == (2, "SLURM does not answer (Socket timed out)")


def test_why_a_run_failed_is_told_whatever_was_noted_after_it(job, monkeypatch):
    monkeypatch.setattr(runs.slurm, "queue", lambda names: [])
    for event, reason in (("submitted", "x"), ("failed", "too hot"), ("upload failed", "the store is away")):
        note(job.run_dir, event, reason=reason)
    assert runs.status(job).state == "failed (too hot)"


def test_a_row_that_was_cut_while_it_was_written_is_left_out(job):
    path = job.run_dir / "a01" / "metrics.jsonl"
    lines(path, {"result": {"step": 7}, "run": {"time": 1.0, "step_s": 0.5, "wait_s": 0.1}})
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


def test_a_cancel_of_a_job_that_is_over_is_refused(job, monkeypatch):
    monkeypatch.setattr(runs.slurm, "queue", lambda names: [])
    with pytest.raises(UserError, match="over already"):
        runs.cancel(job)
    assert not (job.run_dir / "cancel").exists()


def test_a_job_that_is_on_the_run_but_was_submitted_elsewhere_is_named_with_what_ends_it(job, site, monkeypatch):
    others = [Queued("12", "RUNNING", "node1", "None", job.store, "ada"), *queued("RUNNING", "41")]
    monkeypatch.setattr(runs.slurm, "queue", lambda names: others)
    monkeypatch.setattr(runs.slurm, "check_partition", lambda *_: None)
    said = "RUN=first: job 12, running, is on it already, submitted elsewhere by ada; scancel 12 ends it"
    with pytest.raises(UserError, match=said):
        runs.cancel(job)
    with pytest.raises(UserError, match=said):
        _check_free(site, "first", job.store)
    others[0] = replace(others[0], job=job.id)
    with pytest.raises(UserError, match=r"job 42 \(running\) is on it already; .*, make cancel RUN=first ends it"):
        _check_free(site, "first", job.store)


def test_a_local_job_of_another_machine_is_not_taken_for_one_that_is_over(tmp_path, site):
    job = Job("first", tmp_path / "first", "file:///x", "local-7", Process(7, 1), "another")
    job.save()
    here = site.model_copy(update={"executor": "local"})
    said = "RUN=first: local-7 was started on another, and only there can be seen to; if that is gone, move "
    for refused in (lambda: runs.cancel(job), lambda: _check_free(here, "first", job.store)):
        with pytest.raises(UserError, match=f"{said}{job.run_dir} away"):
            refused()
    (found,) = runs.statuses(here)
    assert (found.state, found.look.startswith(said)) == ("unknown", True)
    note(job.run_dir, "failed", reason="too hot")
    _check_free(here, "first", job.store)
    assert [one.state for one in runs.statuses(here)] == ["failed (too hot)"]
    Job.of(site, "first").start.end("finished")
    assert runs.state(job) is None


def test_a_local_job_of_this_machine_is_known_to_be_over(tmp_path, site):
    for host in (platform.node(), ""):  # before this was written down
        job = Job("first", tmp_path / "first", "file:///x", "local-7", Process(2**22 + 1, 1), host)
        job.save()
        assert Job.of(site, "first") == job
        assert runs.state(job) is None
        assert status(job).nodes == "here"


def test_slurm_is_not_asked_about_runs_that_it_does_not_have(job, site, tmp_path, monkeypatch):
    Job("second", tmp_path / "second", "file:///x", "local-7", Process(2**22 + 1, 1), platform.node()).save()
    asked: list[list[str]] = []
    monkeypatch.setattr(runs.slurm, "queue", lambda names: asked.append(names) or [])
    runs.statuses(site)
    assert asked == [["first"]]
