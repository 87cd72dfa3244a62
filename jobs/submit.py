"""Submitting a run: whatever can be known to fail is refused before anything is written or spent.

The same command starts a run and goes on with it: where to resume is found in the store at each start.
"""

from functools import partial
from pathlib import Path

from data_shards.errors import UserError
from data_shards.store import Denied, Store, Unavailable
from jobs import slurm
from jobs.daemons import wait_until
from jobs.doctor_store import put_and_get
from jobs.feasible import CHECK_SECONDS, feasible
from jobs.launch import launch, packed_code
from jobs.reasons import Reasons
from jobs.runs import Job, foreign, owned, state
from jobs.site import ROOT, Site
from jobs.start import note
from jobs.supervise import committed_step, publish
from pipeline.config import Config
from pipeline.run import check_same, read_record
from pipeline.weights import check_origin, keep_origin, point

COMPLETING_S = 60.0  # SLURM's KillWait, and what its epilogs take


def submit(config: Config, site: Site, run: str, code: Path = ROOT, origin: str | None = None) -> Job:
    """Start a run, or go on with it. Raises UserError, with nothing written, when it cannot work.

    code: the folder whose three packages the job will run. origin: whose weights this one begins with: another run,
    `name` or `name@step`, or a file or folder with a trunk's; by default what the config says.
    """
    site.activate()
    runs = Store(config.store, retry_seconds=CHECK_SECONDS)
    if (named := origin or config.train.start_from) is not None:
        train = config.train.model_copy(update={"start_from": point(runs, named)})
        config = config.model_copy(update={"train": train})
    check(config, site, run, runs)
    store = runs.at(run)
    job = launch(site, run, store.url, config.dump(), committed := committed_step(store), code)
    _keep_code(job, store)
    if config.train.start_from is not None and committed is None:
        _keep_origin(config, job)
    publish(job.run_dir, job.id, store)
    return job


def _keep_code(job: Job, store: Store) -> None:
    """Put what the job runs from beside what it learns; the job goes its way if the store does not take it."""
    try:
        store.put(f"code/{job.id}.tar.gz", packed_code(job.run_dir).read_bytes())
    except UserError as error:
        note(job.run_dir, "upload failed", reason=str(error))


def _keep_origin(config: Config, job: Job) -> None:
    """The job may wait for days while the run that it begins with goes on, and deletes old checkpoints."""
    try:
        keep_origin(config, job.run)
    except UserError as error:
        note(job.run_dir, "origin not kept", reason=f"{error}; {config.train.start_from} may be gone before the start")


def check(config: Config, site: Site, run: str, runs: Store) -> None:
    """Raise UserError with all that can be known to fail before anything is spent. runs: the folder of all runs."""
    store, reasons = runs.at(run), Reasons()
    if _answers(runs, reasons):
        found = reasons.ask(lambda: feasible(config, site, record=read_record(store)))
        if found is not None and found.shards is not None:
            same = partial(check_same, store, found.config, found.shards, config.checkpoint.force)
            reasons.ask(same)
        if config.train.start_from is not None and committed_step(store) is None:  # later it needs them no more
            reasons.ask(lambda: check_origin(config, CHECK_SECONDS))
    reasons.ask(lambda: _check_free(site, run, store.url))
    if not reasons.lines:
        reasons.ask(lambda: put_and_get(store))
    reasons.refuse()


def _answers(runs: Store, reasons: Reasons) -> bool:
    """Whether it makes sense to ask for the shards too: a store that does not answer would say the same again."""
    try:
        runs.check()
    except UserError as error:
        reasons.add(error)
        return not isinstance(error, Denied | Unavailable)
    return True


def _check_free(site: Site, run: str, store: str) -> None:
    """Refuse when SLURM does not answer or has the run already; two jobs must not work on one run."""
    run_dir = site.run_dir(run)
    with owned(run_dir):
        job = Job.of(site, run) if (run_dir / "job.json").exists() else None
    taken = f"job {job.id}" if job is not None and site.executor == "local" and state(job) is not None else None
    if site.executor == "slurm":
        slurm.check_partition(site.used_partition, site.nodes)
        for entry in _queued(run, store, None if job is None else job.id):
            if job is None or entry.job != job.id:
                raise UserError(f"RUN={run}: {foreign(entry)}")
            taken = f"job {entry.job} ({entry.state.lower()})"
    if job is not None and taken is not None:
        ways = f"{job.make('logs')} FOLLOW=1 shows what it does, {job.make('cancel')} ends it"
        raise UserError(f"RUN={run}: {taken} is on it already; {ways}")


def _queued(run: str, store: str, last: str | None) -> list[slurm.Queued]:
    """The jobs that are on a run. One that completes may be on its way back into the queue: its end is waited for.

    last: this site's last job of the run, also where SLURM has another comment put to it.
    """
    found: list[slurm.Queued] = []

    def settled() -> bool:
        found[:] = [entry for entry in slurm.queue([run]) if entry.run == store or entry.job == last]
        return all(entry.state != "COMPLETING" for entry in found)

    wait_until(settled, COMPLETING_S, 1.0)
    return found
