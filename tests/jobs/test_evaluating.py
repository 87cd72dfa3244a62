"""Following a run: its newest checkpoint is asked about whenever it is far enough, and the last one at the end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.store import Unavailable
from jobs import evaluating
from jobs.daemons import Process
from jobs.evaluating import Question
from jobs.runs import Job
from jobs.site import Site
from jobs.slurm import SlurmError
from pipeline.evaluate.exam import Exam, open_exam
from pipeline.evaluate.score import Score
from tests.pipeline.evaluate.sets import labelled
from tests.pipeline.test_export import a_run, damage


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


@pytest.mark.slow
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
    left = f"{exam.bank.folder}/00000.safetensors"
    question.run.put(left, b"of one that was killed after it had given the score")
    ((_, again),) = question.follow(lambda: job(tmp_path), every=100)
    assert again == score
    assert not question.run.exists(left)


def test_a_run_that_ends_without_a_checkpoint_says_so(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted((tmp_path / "runs" / "first" / "checkpoints").glob("*/*")):
        path.unlink()
    played(monkeypatch, tmp_path, ("RUNNING", None), (None, None))
    with pytest.raises(UserError, match="no checkpoint yet"):
        list(question.follow(lambda: job(tmp_path), every=3))


@pytest.mark.slow
def test_what_passes_or_ails_one_checkpoint_does_not_end_the_following(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = [("RUNNING", None), ("RUNNING", 5), ("RUNNING", 7), (None, 9)]
    played(monkeypatch, tmp_path, *looks)
    state = evaluating.state
    hiccups: list[UserError | None] = [SlurmError("SLURM does not answer"), None, None, Unavailable("no answer"), None]

    def unwell(of: Job) -> str | None:
        if hiccups and (error := hiccups.pop(0)):
            raise error
        now = state(of)
        if question._steps()[0] == 7:
            damage(question.run, 7)
        return now

    monkeypatch.setattr(evaluating, "state", unwell)
    assert [score.step for _, score in question.follow(lambda: job(tmp_path), every=2)] == [3, 5, 9]
    told = capsys.readouterr().err
    assert "SLURM does not answer; looking again" in told
    assert "no answer; looking again" in told
    assert "the checkpoint of step 7 is damaged" in told


def test_what_cannot_be_asked_ends_the_following_at_once(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, tmp_path, *[("RUNNING", None)] * 3)
    with pytest.raises(UserError, match="no MANIFEST"):
        list(replace(question, bank=f"file://{tmp_path}/nowhere").follow(lambda: job(tmp_path), every=2))


@pytest.mark.slow
def test_a_store_that_is_away_at_the_end_of_a_run_is_asked_again(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played(monkeypatch, tmp_path, ("RUNNING", None), (None, 5), (None, None))
    work, away = Question._work, [False, True, False]

    def sometimes(of: Question, exam: Exam, progress: Any) -> Score:
        if away.pop(0):
            raise Unavailable("no answer")
        return work(of, exam, progress)

    monkeypatch.setattr(Question, "_work", sometimes)
    assert [score.step for _, score in question.follow(lambda: job(tmp_path), every=2)] == [3, 5]
    assert "no answer; looking again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_at_which_slurm_does_not_answer_is_asked_about_at_the_next_look(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(monkeypatch, tmp_path, ("RUNNING", None), ("RUNNING", 5), ("RUNNING", None), (None, 6))
    work, silent = Question._work, [False, True, False, False]

    def sometimes(of: Question, exam: Exam, progress: Any) -> Score:
        if silent.pop(0):
            raise SlurmError("SLURM does not answer")
        return work(of, exam, progress)

    monkeypatch.setattr(Question, "_work", sometimes)
    assert [score.step for _, score in question.follow(lambda: job(tmp_path), every=2)] == [3, 5, 6]


def test_without_a_step_the_newest_whole_checkpoint_is_asked_about_and_the_damaged_one_left_to_be_deleted(
    question: Question, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path, 5, 7)
    for step in (5, 7):
        damage(question.run, step)
    _, score = question.answer()
    assert score.step == 3
    assert capsys.readouterr().err.splitlines() == [
        f"farseer: {question.run.url}: the checkpoint of step {step} is damaged; STEP= takes another: {others}; "
        f"asking about step {older} now"
        for step, others, older in ((7, "3, 5", 5), (5, "3, 7", 3))
    ]
    assert {entry.path.split("/")[1] for entry in question.run.list("eval")} == {"step-000000003"}
    with pytest.raises(UserError, match="the checkpoint of step 7 is damaged"):
        question.answer(step=7)


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_damaged_ends_the_following_with_what_is_whole(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(tmp_path, 5)
    damage(question.run, 5)
    played(monkeypatch, tmp_path, (None, None))
    assert [score.step for _, score in question.follow(lambda: job(tmp_path), every=2)] == [3]


@pytest.mark.slow
def test_features_that_are_to_stay_are_made_again_where_only_the_score_is_there(question: Question) -> None:
    exam, score = question.answer()
    assert len(exam.left()) == len(exam.parts)
    again, same = replace(question, keep=True).answer()
    assert same == score
    assert again.left() == []


@pytest.mark.slow
def test_features_that_are_to_stay_do_not_go_with_another_evaluation_that_has_them_now(question: Question) -> None:
    exam, _ = question.answer()
    other = replace(question, bank=question.held_out, held_out=question.bank)
    theirs = open_exam(other.run, other.bank, other.held_out, size=32)
    for one in (exam, theirs):  # all features are there, and only the other evaluation needs them
        one.begin()
        one.extract(one.left())
        one.bank.release(exam.name) if one is exam else None
    assert exam.left() == []
    kept, _ = replace(question, keep=True).answer()
    other.answer()
    assert kept.left() == []


@pytest.mark.slow
def test_features_that_another_evaluation_has_deleted_are_made_again(
    question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    extract = Exam.extract

    def deleted(exam: Exam, numbers: list[int], *rest: Any) -> None:
        extract(exam, numbers, *rest)
        made.append(len(numbers))
        if len(made) == 1:
            exam.run.delete(entry.path for entry in exam.run.list(exam.bank.folder))

    monkeypatch.setattr(Exam, "extract", deleted)
    exam, score = question.answer()
    assert exam.found() == score
    assert len(made) == 2


def test_a_score_that_w_and_b_has_not_taken_is_sent_by_the_next_call_and_then_no_more(
    question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, sent = [False, True], list[int]()

    def show(score: Score, *_: Any) -> bool:
        sent.append(score.step)
        return answers.pop(0)

    monkeypatch.setattr(evaluating, "show", show)
    for _ in range(3):
        question.answer()
    assert sent == [3, 3]
