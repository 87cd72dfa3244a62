"""Evaluations as they are asked for: of one checkpoint, or of one after another for as long as a run goes on."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.progress import Progress, quiet
from data_shards.store import Store
from jobs.runs import Job, state
from jobs.site import Site
from jobs.verbs import complain
from pipeline import commit
from pipeline.evaluate.exam import Exam, Score, open_exam
from pipeline.evaluate.wandb_score import show

LOOK_S = 30.0  # between two looks for a newer checkpoint


@dataclass(frozen=True)
class Question:
    """What is asked, and where it is worked on.

    run: the run's folder in the store; wandb: the folder of W&B's files; size: pixels, None: the largest crop's;
    workers: tasks of the site's SLURM, None: this process; keep: whether features stay.
    """

    run: Store
    bank: str
    held_out: str
    site: Site
    wandb: Path
    size: int | None = None
    workers: int | None = None
    keep: bool = False

    def answer(self, step: int | None = None, progress: Progress = quiet) -> tuple[Exam, Score]:
        """The score of a step, by default the newest checkpoint's; without any work where it was asked before."""
        exam = open_exam(self.run, self.bank, self.held_out, step, self.size)
        if (score := exam.found()) is None:
            exam.begin()
            score = self._work(exam, progress)
            show(score, self.run, exam.config.monitor, self.wandb, lambda why: complain(f"W&B: {why}"))
        return exam, score

    def follow(self, job: Callable[[], Job], every: int, progress: Progress = quiet) -> Iterator[tuple[Exam, Score]]:
        """The same of the newest checkpoint whenever it is so many steps further, and of the last one at the end.

        job: asks for the run's newest job, which may be another by then.
        """
        last = 0
        while True:
            over, step = state(job()) is None, self._newest()
            if over or (step is not None and step >= last + every):
                exam, score = self.answer(step, progress)
                if exam.step > last:
                    yield exam, score
                last = exam.step
            if over:
                return
            time.sleep(LOOK_S)

    def _work(self, exam: Exam, progress: Progress) -> Score:
        if self.workers is None or self.site.executor == "local":
            exam.extract(exam.left(), os.cpu_count() or 1, progress)
            return exam.score(self.keep)
        from jobs.evaluate_array import evaluate_array

        return evaluate_array(self.site, exam, self.workers, self.keep, progress)

    def _newest(self) -> int | None:
        return next((place.step for place in commit.committed(commit.survey(self.run))), None)
