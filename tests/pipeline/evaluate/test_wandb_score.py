"""Scores in W&B: a row a step under an id of their own, in the group of the training's run; no error but words."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from data_shards.store import Store
from pipeline.evaluate.score import TITLES, Score
from pipeline.evaluate.wandb_score import show
from pipeline.monitor import MonitorSettings
from pipeline.run import Record
from tests.pipeline import wandb_file

pytestmark = pytest.mark.usefixtures("no_wandb_key")


def score_of(step: int) -> Score:
    right = {key: (step + n) / 100 for n, key in enumerate(TITLES)}
    return Score("s3://runs/first", step, "s3://set/train", "s3://set/val/", 224, 10, 5, 2, 0.1, right)


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = Store(f"file://{tmp_path}/runs/first")
    record = Record("f", "layout", 10, 1, "abc", 0.0, {})
    store.put("run.json", json.dumps(asdict(record)).encode())
    return store


@pytest.mark.slow
def test_scores_of_two_steps_are_rows_of_one_run_beside_the_training_s(run: Store, tmp_path: Path) -> None:
    said: list[str] = []
    for step in (20, 10):
        assert show(score_of(step), run, MonitorSettings(), tmp_path, said.append)
    assert said == []
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    (run_id,) = {wandb_file.run_id(file) for file in files}
    assert run_id.startswith("abc-evaluate-")
    rows = [row for file in files for row in wandb_file.rows(file)]
    assert rows == [
        {"step": step, **{f"set/val/{key}": pytest.approx(right) for key, right in score_of(step).right.items()}}
        for step in (20, 10)
    ]
    opened = next(one.run for one in wandb_file.records(files[0]) if one.WhichOneof("record_type") == "run")
    assert (opened.display_name, opened.run_group, opened.job_type) == ("first-evaluate", "first", "evaluate")


def test_a_disk_that_wandb_cannot_use_is_told_and_is_no_error(run: Store, tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file is in the way")
    said: list[str] = []
    assert not show(score_of(1), run, MonitorSettings(), tmp_path, said.append)
    assert len(said) == 1
    assert said[0].endswith("the score is in the run's folder")


@pytest.mark.parametrize("settings", [MonitorSettings(wandb="disabled"), MonitorSettings()])
def test_nothing_is_sent_when_wandb_is_off_or_the_run_has_no_record(
    settings: MonitorSettings, run: Store, tmp_path: Path
) -> None:
    show(score_of(1), run if settings.wandb == "disabled" else run.at("other"), settings, tmp_path, pytest.fail)
    assert not (tmp_path / "wandb").exists()
