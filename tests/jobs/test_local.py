"""The local executor with real processes and the stand-in trainer; the same scenes under SLURM are in tests/real."""

import json
from pathlib import Path

import pytest

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import runs
from jobs.daemons import wait_until
from jobs.launch import launch
from jobs.local import visible_gpus
from jobs.runs import Job
from jobs.site import Site
from jobs.start import Start, events
from pipeline.journal import read_events
from tests.jobs import stand_in

slow = pytest.mark.slow
DEADLINE_S = 60.0


@pytest.fixture
def start_job(tmp_path: Path):
    """Starts a run on two local ranks; what still runs at the end of the test is ended."""
    code = stand_in.make(tmp_path / "code")
    site = Site(name="here", executor="local", shared_dir=str(tmp_path / "shared"), ranks_per_node=2, signal_delay_s=20)
    started = []

    def start(**config) -> Job:
        values = {"steps": 15, "save_every": 5, **config}
        started.append(launch(site, "run", f"file://{tmp_path}/store/run", values, code=code))
        return started[-1]

    yield start
    for job in started:
        if runs.state(job) is not None:
            runs.end(job)


def wait(job: Job) -> None:
    assert wait_until(lambda: runs.state(job) is None, DEADLINE_S), (job.run_dir / "logs" / "local.log").read_text()


def began(job: Job, rank: int = 0) -> list[int]:
    """The steps at which a rank began, start by start."""
    path = job.run_dir / f"said-{rank}.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def ended(job: Job, number: int) -> str | None:
    outcome = Start(job.run_dir, job.id, number).outcome()
    return outcome and outcome.outcome


@slow
def test_a_preempted_local_job_saves_and_starts_again_from_there(start_job):
    job = start_job()
    assert wait_until(lambda: bool(began(job)) and bool(began(job, 1)), DEADLINE_S)
    runs.preempt(job)
    wait(job)
    assert (ended(job, 0), ended(job, 1)) == ("preempted", "finished")
    assert began(job) == began(job, 1)
    assert 0 < began(job)[1] < 15
    assert [event["event"] for event in read_events(Store(job.store))] == ["submitted"]


@slow
def test_a_killed_rank_takes_the_others_along_and_the_job_starts_again_from_the_checkpoint(start_job):
    job = start_job(die_at=12, die_from=0, die_rank=1, die_how="kill")
    wait(job)
    assert began(job) == [0, 10]
    assert ended(job, 1) == "finished"
    assert [event["event"] for event in events(job.run_dir)] == ["submitted", "requeued"]


@slow
def test_a_crash_at_the_same_step_ends_the_job_after_three_starts_with_the_cause(start_job):
    job = start_job(die_at=7, die_rank=0, die_how="error")
    wait(job)
    assert len(began(job)) == 4  # the first one committed step 5, three more did not get further
    assert "3 starts without a new checkpoint" in runs.status(job).state
    assert "RuntimeError: out of luck" in runs.status(job).state


@slow
def test_an_error_that_the_user_can_mend_ends_the_job_at_once(start_job):
    job = start_job(die_at=2, die_rank=1, die_how="mendable")
    wait(job)
    assert len(began(job)) == 1
    assert "data.lanes: 3 does not divide" in runs.status(job).state


@slow
def test_a_cancelled_job_saves_and_does_not_start_again_until_it_is_submitted_again(start_job):
    job = start_job()
    assert wait_until(lambda: bool(began(job)) and bool(began(job, 1)), DEADLINE_S)
    assert "saves a last checkpoint" in runs.cancel(job)
    wait(job)
    assert (len(began(job)), ended(job, 0), runs.status(job).state) == (1, "cancelled", "cancelled")
    again = start_job()
    wait(again)
    assert runs.status(again).state == "finished"
    assert began(again)[1] > 0


@slow
def test_a_job_cancelled_now_leaves_no_process(start_job):
    job = start_job(steps=500)
    assert wait_until(lambda: bool(began(job)) and bool(began(job, 1)), DEADLINE_S)
    runs.cancel(job, now=True)
    wait(job)
    assert not [record for record in job.start.ranks() if record.process.running()]
    assert runs.status(job).state == "cancelled"


@pytest.mark.parametrize(("given", "gpus"), [("4,5", (4, 5)), ("7", (7,)), (None, ())])
def test_ranks_get_the_gpus_that_the_user_left_visible(
    monkeypatch: pytest.MonkeyPatch, given: str | None, gpus: tuple[int, ...]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus(1) == gpus
    assert visible_gpus(0) == ()


@pytest.mark.parametrize("given", ["", "3", "GPU-4f2a,GPU-91bc"])
def test_fewer_visible_gpus_than_the_site_has_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=.* by their numbers, and the site has gpus_per_node: 2"):
        visible_gpus(2)
