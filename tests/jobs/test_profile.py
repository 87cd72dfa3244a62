"""Asking a run for its next steps; the run is a process of this machine that answers, or does not."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_shards.errors import UserError
from jobs import daemons
from jobs.cli import main
from jobs.daemons import Process, wait_until
from jobs.profile import profile
from jobs.runs import Job
from jobs.start import append_lines
from pipeline import profile as answering


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


@pytest.fixture
def job(tmp_path: Path, process: subprocess.Popen[bytes]) -> Job:
    (tmp_path / "runs" / "first" / "a01").mkdir(parents=True)
    job = Job("first", tmp_path / "runs" / "first", f"file://{tmp_path}/first", "local-1", Process.of(process.pid))
    job.save()
    return job


def once_asked(job: Job, answer: dict[str, object] | None = None) -> threading.Thread:
    """Waits for the question, takes it as rank 0 does, and tells the answer; without one, the job ends."""

    def serve() -> None:
        question = job.run_dir / answering.QUESTION
        assert wait_until(question.exists, 30)
        if answer is None:
            assert job.process is not None
            daemons.stop(job.process)
        else:
            question.unlink()
            append_lines(job.run_dir / "a01" / "events.jsonl", [{"time": 1.0, "attempt": 1, **answer}])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_the_table_and_the_place_of_the_trace_are_said(job, tmp_path, capsys):
    table, trace = (job.run_dir / "a01" / f"profile-step-000000004.{end}" for end in ("txt", "json.gz"))
    table.write_text("forward 3 ms\n")
    earlier = {"time": 0.0, "attempt": 1, "event": "profiled", "step": 2, "trace": "/elsewhere"}
    append_lines(job.run_dir / "a01" / "events.jsonl", [earlier])
    (tmp_path / "site.yaml").write_text(f"executor: local\nshared_dir: {job.run_dir.parent}\n")
    answer = once_asked(job, {"event": "profiled", "step": 4, "table": str(table), "trace": str(trace)})
    assert main(["profile", "--run", "first", "--site", str(tmp_path / "site.yaml")]) == 0
    answer.join()
    said = capsys.readouterr().out
    assert "forward 3 ms" in said
    assert said.splitlines()[-1] == f"{trace}: ui.perfetto.dev shows it"


def test_a_profiler_that_does_not_work_there_is_told(job):
    answer = once_asked(job, {"event": "profile failed", "step": 4, "reason": "no CUPTI"})
    with pytest.raises(UserError, match="RUN=first: torch's profiler does not work there: no CUPTI"):
        profile(job)
    answer.join()


def test_a_run_that_ends_before_it_answers_is_told_and_not_asked_any_more(job, monkeypatch):
    monkeypatch.setattr("jobs.profile.ASK_S", 0.1)
    answer = once_asked(job)
    with pytest.raises(UserError, match="job local-1 ended before its next steps did; make status"):
        profile(job)
    answer.join()
    assert not (job.run_dir / answering.QUESTION).exists()


def test_a_run_that_does_not_go_on_is_refused(job, process):
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="RUN=first: job local-1 is over, and has no steps to look at; make status"):
        profile(job)
