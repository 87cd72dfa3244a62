"""An evaluation over the nodes of a cluster: each task makes features on a GPU; whichever ends last gives the score."""

from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.progress import Progress, quiet
from data_shards.store import NotFound, Store
from jobs.array import Array, Task
from jobs.site import Site
from jobs.verbs import ProgressLine
from pipeline import commit
from pipeline.evaluate.exam import Exam, open_exam
from pipeline.evaluate.score import Score

_DAMAGED = "damaged"  # beside what tasks say of their errors: that it is the checkpoint


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
