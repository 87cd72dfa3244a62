"""What can happen to a job, on a real SLURM of four nodes and a real S3: each run ends as the undisturbed one, bit for
bit, with no step missing or twice."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from jobs import runs
from jobs.chaos.campaign import DATA, DISK_FAULT, attempt, reference, scene
from jobs.chaos.faults import FAULTS
from jobs.chaos.trial import Scene, Trial
from jobs.daemons import wait_until
from jobs.site import ROOT
from jobs.start import RankRecord
from pipeline.config import load
from tests.conftest import kept_environment, once, skip_without_slurm
from tests.photos import write_tiles

pytestmark = [pytest.mark.slow(minutes=1), pytest.mark.timeout(600)]
CAMPAIGN_ONLY = {
    "a rank killed while the controller is away",  # SLURM 22.05 takes a minute to start such a job again
    "all ranks killed",  # test_resume compares the rows, test_submit sees the requeue
}
BELOW = {"a rank hangs"}  # with more to be seen


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A cluster and a store of this module's own: what happens here must not happen to other tests."""
    skip_without_slurm()
    folder = tmp_path_factory.mktemp("life")
    config = load(ROOT / "conf" / "chaos.yaml", f"store=s3://runs/life data.url={DATA}")
    with kept_environment(), scene(folder, config) as found:
        pack(write_tiles(folder / "tiles", 192), Store(DATA), PackSettings(shard_bytes=150_000))
        yield found


@pytest.fixture(scope="module")
def undisturbed(stage: Scene, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once(tmp_path_factory, "undisturbed", lambda: reference(stage))


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - CAMPAIGN_ONLY - BELOW))
def test_whatever_happens_the_run_ends_as_the_undisturbed_one(
    stage: Scene, undisturbed: list[dict[str, Any]], fault: str
) -> None:
    if fault == DISK_FAULT and stage.disk is None:
        pytest.skip("a small disk cannot be mounted here (that takes root)")
    row = attempt(stage, fault, random.randrange(10**6), undisturbed)
    assert row.equal, row


def test_a_hang_is_told_by_the_name_of_the_silent_rank_with_the_stacks_of_the_others_and_made_good(
    stage: Scene, undisturbed: list[dict[str, Any]]
) -> None:
    trial = Trial(stage, "hang", seed=1)
    FAULTS["a rank hangs"](trial)
    assert wait_until(lambda: bool(_stopped(trial)), 10)  # a signal takes effect a little later than it is sent
    (stopped,) = _stopped(trial)
    trial.finish()
    (requeued,) = [event for event in runs.history(trial.run_dir) if event["event"] == "requeued"]
    assert f"silent: rank {stopped.rank} on {stopped.host}" in requeued["reason"]
    assert requeued["suspects"] == [stopped.host]
    stacks = trial.run_dir / "a01" / f"stacks-{1 - stopped.rank:04d}.txt"
    assert "train.py" in stacks.read_text()
    assert trial.results() == undisturbed


def test_a_run_goes_on_through_more_preemptions_than_submitit_allows(
    stage: Scene, undisturbed: list[dict[str, Any]]
) -> None:
    trial = Trial(stage, "four-times", seed=1)
    for number in range(1, 5):
        trial.wait(lambda number=number: trial.step >= 10 * number, f"step {10 * number}")
        runs.preempt(trial.job)
        trial.wait(lambda number=number: trial.job.start.number == number, "the next start")
    trial.finish()
    assert trial.results() == undisturbed


def _stopped(trial: Trial) -> list[RankRecord]:
    return [r for r in trial.ranks() if Path(f"/proc/{r.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"]
