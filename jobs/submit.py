"""Submitting a run: whatever can be known to fail is refused before anything is written or spent.

The same command starts a run and goes on with it: where to resume is found in the store at each start.
"""

from pathlib import Path

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import slurm
from jobs.launch import launch
from jobs.runs import Job, state
from jobs.site import ROOT, Site
from jobs.supervise import committed_step
from pipeline.config import Config
from pipeline.run import check_same, open_data

CHECK_SECONDS = 20.0  # how long a store that does not answer is asked again before a submission is refused


def submit(config: Config, site: Site, run: str, code: Path = ROOT) -> Job:
    """Start a run, or go on with it. Raises UserError, with nothing written, when it cannot work.

    code: the folder whose three packages the job will run.
    """
    site.activate()
    runs = Store(config.store, retry_seconds=CHECK_SECONDS)
    check(config, site, run, runs)
    store = runs.at(run)
    return launch(site, run, store.url, config.dump(), committed_step(store), code)


def check(config: Config, site: Site, run: str, runs: Store) -> None:
    """Raise UserError for whatever can be known to fail before anything is spent. runs: the folder of all runs."""
    run_dir, store = site.run_dir(run), runs.at(run)
    runs.check()
    Store(config.data.url).check()  # gives up sooner than a read would
    shards, order, filled = open_data(config, CHECK_SECONDS)
    order.lanes_of(0, site.ranks)
    check_same(store, filled, shards.manifest, force=config.checkpoint.force)
    _check_free(site, run, run_dir, store.url)


def _check_free(site: Site, run: str, run_dir: Path, store: str) -> None:
    """Refuse when SLURM does not answer or has the run already; two jobs must not work on one run."""
    if site.executor == "slurm":
        slurm.check_partition(site.partition, site.nodes)
        queued = [entry for entry in slurm.queue() if entry.run == store and entry.state != "COMPLETING"]
        taken = next((f"job {entry.job}, {entry.state.lower()}" for entry in queued), None)
    else:
        job = Job.of(site, run) if (run_dir / "job.json").exists() else None
        taken = f"job {job.id}" if job is not None and state(job) is not None else None
    if taken is not None:
        raise UserError(f"RUN={run}: {taken}, is on it already; make logs RUN={run} follows it, make cancel ends it")
