"""Work in parts over the nodes of a cluster: a SLURM array, whose tasks leave what they have done in the store.

A task that is preempted, out of time or lost with its node is requeued and does what is left to do; so does the whole,
when the same command is given again. Whichever task ends last does what needs all of it.
"""

import abc
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import submitit

from data_shards.errors import UserError, one_line
from data_shards.progress import Progress
from jobs import slurm
from jobs.launch import exports, guarded, job_executor, write_snapshot
from jobs.site import ROOT, Site

POLL_S = 2.0


@dataclass(frozen=True)
class Task(submitit.helpers.Checkpointable, abc.ABC):
    """What each task runs. submitit pickles it by name, so it comes from the snapshot, and so do its subclasses.

    errors: the folder for what a user can mend.
    """

    errors: str

    def __call__(self, worker: int) -> None:
        try:
            self.work(worker)
        except UserError as error:
            sys.stderr.write(f"farseer: {error}\n")
            Path(self.errors, f"{worker:04d}").write_text(str(error))
            raise

    @abc.abstractmethod
    def work(self, worker: int) -> None:
        """The share of one task of all `workers`, counted from 0, and the whole's end where nothing else is left."""


@dataclass(frozen=True)
class Array:
    """A piece of work, which has a folder of its own on the shared disk.

    kind: pack, evaluate; identity: tells it apart from others of the kind; what: the parts, in words; about: the
    store's url that it fills; gpus: that a task needs, where the site has any.
    """

    site: Site
    kind: str
    identity: str
    what: str
    about: str
    gpus: int = 0

    @property
    def folder(self) -> Path:
        digest = blake2b(self.identity.encode(), digest_size=6).hexdigest()
        return Path(self.site.shared_dir) / f"{self.kind}-{digest}"

    @property
    def errors(self) -> Path:
        return self.folder / "errors"

    def run(self, task: Task, workers: int, left: Callable[[], int], progress: Progress) -> None:
        """Have it done by so many tasks, or follow those that are at it; returns when nothing is left.

        left: how many parts are. Raises UserError when SLURM refuses it, or with what the first task said that failed.
        """
        job, over = self._at_work() or self._submit(task, workers), False
        now = total = left()
        while now and not over:
            progress(self.what, total - now, total)
            time.sleep(POLL_S)
            over = _is_over(job)
            now = left()
        if now:
            said = [path.read_text() for path in sorted(self.errors.iterdir())]
            why = said[0] if said else f"{self.folder / 'logs'} says why"
            raise UserError(
                f"job {job} is over and {now:,} of {total:,} {self.what} are left; the same command goes on: {why}"
            )

    def _at_work(self) -> str | None:
        """The array that was submitted for this before, if SLURM still has it."""
        try:
            number = str(json.loads((self.folder / "array.json").read_text())["job"])
        except (FileNotFoundError, ValueError, KeyError):  # none yet, or one that a full disk has cut
            return None
        except PermissionError as error:
            raise UserError(f"SITE={self.site.name}: another user is at the same work: {error}") from None
        return number if slurm.job_state(number) is not None else None

    def _submit(self, task: Task, workers: int) -> str:
        try:
            write_snapshot(self.folder, ROOT)
            self.errors.mkdir(exist_ok=True)
            for old in self.errors.iterdir():
                old.unlink()
        except OSError as error:
            shared = f"shared_dir: {self.site.shared_dir} cannot be written"
            raise UserError(f"SITE={self.site.name}: {shared}: {error}") from None
        try:
            jobs = self._executor(workers).map_array(task, range(workers))
        except submitit.core.utils.FailedJobError as error:
            said = one_line(error)
            raise UserError(f"SITE={self.site.name}: SLURM refused the job: {said}") from None
        number = str(jobs[0].job_id).partition("_")[0]
        (self.folder / "array.json").write_text(json.dumps({"job": number}))
        return number

    def _executor(self, workers: int) -> submitit.SlurmExecutor:
        """A task has the cores of a rank of the site, and its share of a node's memory."""
        return job_executor(
            self.site,
            self.folder,
            ranks=1,
            without="exclusive",  # a task is small
            job_name=f"farseer-{self.kind}",
            comment=self.about,
            nodes=1,
            gpus_per_node=min(self.gpus, self.site.gpus_per_node),
            array_parallelism=workers,
            setup=[*exports(self.site, self.folder), *guarded(self.site.setup, self._setup_failed(), self.folder)],
        )

    def _setup_failed(self) -> str:
        """The shell line by which a task tells of a site's setup that fails, as `Task` does of what a user can mend."""
        said = "the site's setup: $2 failed on $SLURMD_NODENAME (exit code $1)"
        return f'echo "{said}" | tee {shlex.quote(str(self.errors))}/setup-$SLURM_JOB_ID >&2'


def _is_over(job: str) -> bool:
    try:
        return slurm.job_state(job) is None
    except slurm.SlurmError:  # busy: it will be asked again
        return False
