"""Packing over the nodes of a cluster: a SLURM array, each task of which packs its groups of shards.

The plan is made by who submits. Whichever task ends last merges. A task that is preempted, out of time or lost with its
node is requeued and goes on where it was; so does the whole, when the same command is given again.
"""

import json
import shlex
import sys
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import submitit

from data_shards.errors import UserError
from data_shards.merge import merge, unfinished
from data_shards.plan import Plan, load_plans
from data_shards.progress import Progress, quiet
from data_shards.store import Store
from data_shards.work import pack_groups
from jobs import slurm
from jobs.launch import exports, guarded, sbatch_options, write_snapshot
from jobs.site import INHERITED, ROOT, Site
from jobs.verbs import ProgressLine

POLL_S = 2.0


@dataclass(frozen=True)
class Task(submitit.helpers.Checkpointable):
    """What a task of the array runs. submitit pickles it by name, so it comes from the snapshot."""

    dst: str
    plan: int
    workers: int
    processes: int
    errors: str  # folder for what a user can mend

    def __call__(self, worker: int) -> None:
        """Pack the groups `worker`, `worker` + workers and so on; merge when no other task has anything left to do."""
        try:
            store = Store(self.dst)
            plan = load_plans(store)[self.plan - 1]
            pack_groups(store, plan, range(worker, plan.groups, self.workers), self.processes, ProgressLine())
            if not unfinished(store, plan):
                merge(store, plan)
        except UserError as error:
            sys.stderr.write(f"farseer: {error}\n")
            Path(self.errors, f"{worker:04d}").write_text(str(error))
            raise


def pack_array(site: Site, dst: Store, plan: Plan, workers: int, progress: Progress = quiet, code: Path = ROOT) -> None:
    """Pack a plan by an array of so many tasks, or follow the one that is at it; returns when the set is there.

    Raises UserError when SLURM refuses it, or with what the first task said that failed.
    """
    folder = Path(site.shared_dir) / f"pack-{blake2b(f'{dst.url} {plan.identity}'.encode(), digest_size=6).hexdigest()}"
    job = _at_work(folder) or _submit(site, folder, dst, plan, min(workers, plan.groups), code)
    _follow(job, folder, dst, plan, progress)


def _submit(site: Site, folder: Path, dst: Store, plan: Plan, workers: int, code: Path) -> str:
    errors = folder / "errors"
    try:
        write_snapshot(folder, code)
        errors.mkdir(exist_ok=True)
        for old in errors.iterdir():
            old.unlink()
    except OSError as error:
        raise UserError(f"SITE={site.name}: shared_dir: {site.shared_dir} cannot be written: {error}") from None
    executor = submitit.SlurmExecutor(folder / "logs", max_num_timeout=1_000_000, python=site.python)
    memory = {} if site.memory_gb is None else {"mem": f"{round(site.memory_gb * 1024 / site.ranks_per_node)}MB"}
    executor.update_parameters(
        job_name="farseer-pack",
        comment=dst.url,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=site.cpus_per_rank,
        time=site.time_limit_min,
        signal_delay_s=site.signal_delay_s,
        array_parallelism=workers,
        stderr_to_stdout=True,
        setup=[*exports(site, folder), *guarded(site.setup, _setup_failed(errors))],
        srun_args=["--open-mode=append", f"--cpus-per-task={site.cpus_per_rank}"],
        additional_parameters={
            "requeue": True,
            "chdir": str(folder / "snapshot"),  # python -m looks there first
            "export": ",".join(INHERITED),
            **site.extra,
        },
        **memory,
        **sbatch_options(site),
    )
    task = Task(dst.url, plan.number, workers, site.cpus_per_rank, str(errors))
    try:
        jobs = executor.map_array(task, range(workers))
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SITE={site.name}: SLURM refused the job: {' '.join(str(error).split())}") from None
    number = str(jobs[0].job_id).partition("_")[0]
    (folder / "array.json").write_text(json.dumps({"job": number}))
    return number


def _setup_failed(errors: Path) -> str:
    """The shell line by which a task tells of a site's setup that fails, as `Task` does of what a user can mend."""
    said = "the site's setup: $2 failed on $SLURMD_NODENAME (exit code $1)"
    return f'echo "{said}" | tee {shlex.quote(str(errors))}/setup-$SLURM_JOB_ID >&2'


def _at_work(folder: Path) -> str | None:
    """The array that was submitted for this before, if SLURM still has it."""
    try:
        number = str(json.loads((folder / "array.json").read_text())["job"])
    except FileNotFoundError:
        return None
    return number if slurm.job_state(number) is not None else None


def _follow(number: str, folder: Path, dst: Store, plan: Plan, progress: Progress) -> None:
    over = False
    while (left := len(unfinished(dst, plan))) and not over:
        progress("groups of shards", plan.groups - left, plan.groups)
        time.sleep(POLL_S)
        over = slurm.job_state(number) is None
    if left:
        said = [path.read_text() for path in sorted((folder / "errors").iterdir())]
        why = said[0] if said else f"{folder / 'logs'} says why"
        raise UserError(
            f"job {number} is over and {left:,} of {plan.groups:,} groups are left; the same command goes on: {why}"
        )
    merge(dst, plan)  # the last task does it, too; this waits for nobody
