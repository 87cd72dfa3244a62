"""An evaluation by a real SLURM array, of a run and sets in the real S3: a task is killed, the same command goes on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.pack import PackSettings, Source, pack
from data_shards.store import Store
from jobs import slurm as slurm_commands
from jobs.daemons import wait_until
from jobs.evaluating import evaluate_array
from jobs.site import Site
from pipeline import commit
from pipeline.evaluate.exam import open_exam
from tests.photos import write_tiles
from tests.pipeline.test_export import a_run
from tests.real.arrays import kill_second_task

pytestmark = pytest.mark.slow
DEADLINE_S = 120.0


@pytest.fixture
def site(slurm: Any, s3: Any, tmp_path: Path) -> Iterator[Site]:
    tmp_path.chmod(0o755)
    environment = {**slurm.environment, **s3.environment}
    yield Site(name="here", shared_dir=str(tmp_path / "shared"), time_limit_min=10, environment=environment)
    for array in tmp_path.glob("shared/evaluate-*/array.json"):
        slurm_commands.cancel(json.loads(array.read_text())["job"])


@pytest.fixture
def sets(s3: Any, tmp_path: Path) -> list[str]:
    """Labelled tiles to learn from, and others to ask about."""
    files = sorted(write_tiles(tmp_path / "tiles", 120).glob("*/*.jpg"))
    sources = [Source(str(file), name=file.name, label=file.parent.name) for file in files]
    urls = [s3.bucket("shards"), s3.bucket("shards")]
    for url, part in zip(urls, (sources[::2], sources[1::2]), strict=True):
        pack(part, Store(url), PackSettings(shard_bytes=50_000))
    return urls


@pytest.fixture
def run(s3: Any, tmp_path: Path) -> Store:
    """The folder of a run, with one checkpoint."""
    made, _ = a_run(tmp_path, 6)
    store = Store(s3.bucket("runs"))
    for entry in made.list():
        store.put(entry.path, made.get(entry.path))
    return store


def test_an_array_gives_the_score_of_one_process_and_goes_on_after_a_task_was_killed(
    site: Site, sets: list[str], run: Store, tmp_path: Path
) -> None:
    exam = open_exam(run, *sets, size=48)
    exam.begin()
    killed = False

    def kill_one(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        nonlocal killed
        assert (what, total) == ("parts of the evaluation", 3)  # two sets, and the score
        if not killed:
            killed = wait_until(lambda: kill_second_task(tmp_path), DEADLINE_S, 0.02)

    with pytest.raises(UserError, match=r"job \d+ is over and [23] of 3 parts of the evaluation are left; the same"):
        evaluate_array(site, exam, 8, progress=kill_one)
    assert killed
    assert exam.found() is None
    exam.begin(keep=True)
    evaluate_array(site, exam, 8)
    score = exam.found()
    assert score is not None
    assert score.held_out == 60
    assert exam.left() == []
    assert exam.score() == score  # here, of the same features
    exam.extract(exam.left())  # and of those that are made here
    assert exam.score().right == pytest.approx(score.right)


def test_a_damaged_checkpoint_that_stops_a_task_is_told_by_the_command_in_one_line(
    site: Site, sets: list[str], run: Store
) -> None:
    exam = open_exam(run, *sets, size=48)
    exam.begin()
    for entry in run.list("checkpoints"):
        if entry.path.endswith(".safetensors"):
            run.put(entry.path, run.get(entry.path)[:-1] + b"?")
    with pytest.raises(commit.Damaged, match=r"job \d+ is over .* the checkpoint of step 6 is damaged") as error:
        evaluate_array(site, exam, 2)
    assert "\n" not in str(error.value)
