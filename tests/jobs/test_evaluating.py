"""Following a run: its newest checkpoint is asked about whenever it is far enough, and the last one at the end."""

from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from jobs import evaluating
from jobs.daemons import Process
from jobs.evaluating import Question
from jobs.runs import Job
from jobs.site import Site
from tests.pipeline.evaluate.sets import labelled
from tests.pipeline.test_export import a_run


@pytest.fixture
def question(tmp_path: Path) -> Question:
    run, _ = a_run(tmp_path, 3)
    bank, held_out = (shards.store.url for shards in labelled(tmp_path, 30))
    site = Site(name="here", executor="local", shared_dir=str(tmp_path / "shared"))
    return Question(run, bank, held_out, site, tmp_path / "wandb", size=32)


def job(tmp_path: Path) -> Job:
    return Job("first", tmp_path, "", "local-1", Process(2**30, 0))


def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *looks: tuple[str | None, int | None]) -> list[Any]:
    """A run that is in the given state at each look, the given checkpoint having been committed before it."""
    left = list(looks)

    def state(_: Job) -> str | None:
        now, step = left.pop(0)
        if step is not None:
            a_run(tmp_path, step)
        return now

    monkeypatch.setattr(evaluating, "state", state)
    monkeypatch.setattr(evaluating, "LOOK_S", 0.0)
    return left


def test_checkpoints_far_enough_apart_are_asked_about_and_the_last_one_at_the_end(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [("RUNNING", None), ("RUNNING", 4), ("PENDING", 5), ("RUNNING", 7), ("RUNNING", 8), (None, 9)]
    left = played(monkeypatch, tmp_path, *looks)
    asked = [score.step for _, score in question.follow(lambda: job(tmp_path), every=3)]
    assert asked == [3, 7, 9]
    assert left == []


def test_a_run_that_is_over_is_asked_about_once_and_not_at_all_again(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, tmp_path, (None, 5))
    ((exam, score),) = question.follow(lambda: job(tmp_path), every=100)
    assert score.step == 5
    assert not exam.bank.run.exists(f"{exam.bank.folder}/00000.safetensors")
    played(monkeypatch, tmp_path, (None, None))
    ((_, again),) = question.follow(lambda: job(tmp_path), every=100)
    assert again == score


def test_a_run_that_ends_without_a_checkpoint_says_so(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted((tmp_path / "runs" / "first" / "checkpoints").glob("*/*")):
        path.unlink()
    played(monkeypatch, tmp_path, ("RUNNING", None), (None, None))
    with pytest.raises(UserError, match="no checkpoint yet"):
        list(question.follow(lambda: job(tmp_path), every=3))
