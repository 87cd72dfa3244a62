"""Evaluations as they are asked for: of one checkpoint, or of one after another for as long as a run goes on.

They are worked on here, or over the nodes of a cluster: each task makes features on a GPU; whichever ends last gives
the score.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.progress import Progress, quiet
from data_shards.store import NotFound, Store
from jobs.array import Array, Task
from jobs.runs import Job, state
from jobs.site import Site
from jobs.slurm import SlurmError
from jobs.verbs import ProgressLine, complain
from pipeline import commit
from pipeline.evaluate.exam import Exam, open_exam
from pipeline.evaluate.score import Score
from pipeline.evaluate.wandb_score import show

LOOK_S = 30.0  # between two looks for a newer checkpoint
_DAMAGED = "damaged"  # beside what tasks say of their errors: that it is the checkpoint


@dataclass(frozen=True)
class Question:
    """What is asked, and where it is worked on.

    run: the run's folder in the store; wandb: the folder of W&B's files; size: pixels, None: the largest crop's;
    workers: tasks of the site's SLURM, None: this process; keep: whether features stay.
    """

    run: Store
    bank: str
    held_out: str
    site: Site | None
    wandb: Path
    size: int | None = None
    workers: int | None = None
    keep: bool = False

    def answer(self, step: int | None = None, progress: Progress = quiet) -> tuple[Exam, Score]:
        """The score of a step, by default the newest whole checkpoint's; without any work where it was asked before."""
        exam = open_exam(self.run, self.bank, self.held_out, step, self.size)
        while True:
            try:
                score = self._score(exam, progress)
            except commit.Damaged as error:
                exam.release()
                older = next((one for one in self._steps() if one < exam.step), None)
                if step is not None or older is None:
                    raise
                complain(f"{error}; asking about step {older:,} now")
                exam = open_exam(self.run, self.bank, self.held_out, older, self.size)
            else:
                self._show(exam, score)
                return exam, score

    def follow(self, job: Callable[[], Job], every: int, progress: Progress = quiet) -> Iterator[tuple[Exam, Score]]:
        """The same of the newest checkpoint whenever it is so many steps further, and of the last one at the end.

        job: asks for the run's newest job, which may be another by then.
        """
        last, answered, over = 0, False, False
        while not over:
            step = None
            try:
                over, step = state(job()) is None, next(iter(self._steps()), None)
                if over or (step is not None and step >= last + every):
                    exam, score = self.answer(None if over else step, progress)
                    if exam.step > last:
                        yield exam, score
                    last, answered = exam.step, True
            except UserError as error:
                passing = error.passing or isinstance(error, SlurmError)
                if not passing and (over or not answered):
                    raise
                complain(f"{error}; looking again")
                over = False
                last = last if passing or step is None else step  # or the next checkpoint may be better
            if not over:
                time.sleep(LOOK_S)

    def _score(self, exam: Exam, progress: Progress) -> Score:
        if self.keep:  # said before one looks: another evaluation may have them now, and would delete them
            exam.begin(keep=True)
            if exam.left():  # they went when the score was there
                exam.forget()
        if (score := exam.found()) is not None:
            exam.release()  # what one left that was killed after it had given the score
            return score
        if not self.keep:
            exam.begin()
        return self._work(exam, progress)

    def _work(self, exam: Exam, progress: Progress) -> Score:
        if self.workers is None or self.site is None or self.site.executor == "local":
            return _work_here(exam, progress)
        return evaluate_array(self.site, exam, self.workers, progress)

    def _show(self, exam: Exam, score: Score) -> None:
        """In W&B, once."""
        shown = f"{exam.path.removesuffix('.json')}.shown"
        if not self.run.exists(shown) and show(
            score, self.run, exam.config.monitor, self.wandb, lambda why: complain(f"W&B: {why}")
        ):
            self.run.put(shown, b"")

    def _steps(self) -> list[int]:
        """Of the checkpoints, the newest first."""
        return [place.step for place in commit.committed(commit.survey(self.run))]


def _work_here(exam: Exam, progress: Progress) -> Score:
    threads = os.cpu_count() or 1
    exam.extract(exam.left(), threads, progress)
    try:
        return exam.score()
    except NotFound:  # another that ended at the same time has deleted features
        if (score := exam.found()) is not None:
            return score
    exam.extract(exam.left(), threads, progress)
    return exam.score()


@dataclass(frozen=True)
class Evaluation(Task):
    """Makes the parts `worker`, `worker` + workers and so on of an exam; scores it when no part is left."""

    run: str
    bank: str
    held_out: str
    step: int
    size: int
    workers: int
    threads: int

    def work(self, worker: int) -> None:
        exam = open_exam(Store(self.run), self.bank, self.held_out, self.step, self.size)
        if exam.found() is not None:
            return
        mine = [part for part in exam.left() if part % self.workers == worker]
        try:
            exam.extract(mine, self.threads, ProgressLine())
        except commit.Damaged:
            Path(self.errors, _DAMAGED).touch()
            raise
        if exam.found() is not None or exam.left():
            return
        try:
            exam.score()
        except NotFound:  # another that ended at the same time was quicker, and has deleted the features
            if exam.found() is None:
                raise


def evaluate_array(site: Site, exam: Exam, workers: int, progress: Progress = quiet) -> Score:
    """Have an exam that was begun done by an array of so many tasks, or follow the one that is at it.

    Raises UserError when SLURM refuses it, or with what the first task said that failed; commit.Damaged when that was
    the checkpoint.
    """
    array = Array(site, "evaluate", f"{exam.run.url} {exam.path}", "parts of the evaluation", exam.run.url, gpus=1)
    workers = min(workers, len(exam.parts))
    task = Evaluation(
        str(array.errors),
        exam.run.url,
        exam.bank.shards.store.url,
        exam.held_out.shards.store.url,
        exam.step,
        exam.bank.size,
        workers,
        site.cpus_per_rank,
    )
    try:
        array.run(task, workers, lambda: 0 if exam.found() else len(exam.left()) + 1, progress)
    except UserError as error:
        if Path(array.errors, _DAMAGED).exists():
            raise commit.Damaged(str(error)) from None
        raise
    score = exam.found()
    assert score is not None
    return score
