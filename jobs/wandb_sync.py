"""Sends to W&B what it has not got of a run that is over: recorded offline, or lost while W&B was away."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import runs
from jobs.runs import Job
from pipeline.wandb_client import wandb_mode, wandb_url

ANSWER_S = 10.0  # W&B's command itself asks for minutes, without a word


def send(job: Job) -> tuple[int, int]:
    """Returns how many starts recorded offline have gone out, and how many rows that W&B had missed of others.

    They become one run there, under the run's own id. Raises UserError when there is nothing to send, no key, no
    answer, or when something is left behind.
    """
    folder = job.run_dir / "wandb"
    offline, online = sorted(folder.glob("offline-run-*")), any(folder.glob("run-*"))
    if not offline and not online:
        raise UserError(f"{folder}: W&B has recorded nothing of this run")
    if (state := runs.state(job)) is not None:
        raise UserError(f"RUN={job.run}: job {job.id}, {state.lower()}, still writes; send it when the job is over")
    if wandb_mode("auto") != "online":
        raise UserError(f"no key for {wandb_url()}; `wandb login` puts one into netrc")
    unsent = [found for found in offline if not _sent(found)]  # the oldest first, by their names
    if unsent or online:
        _check_answers(wandb_url())
    if unsent:
        _send_offline(job, unsent)
    return len(unsent), _catch_up(job) if online else 0


def _send_offline(job: Job, folders: list[Path]) -> None:
    """By W&B's own command. When it has left something behind it says so on stderr, and leaves with 0 all the same."""
    quiet, names = {**os.environ, "WANDB_ERROR_REPORTING": "false"}, [f"wandb/{folder.name}" for folder in folders]
    # its log goes to wandb/ of the folder where it is called: the run's, not the user's
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *names]
    subprocess.run(command, check=False, env=quiet, cwd=job.run_dir)
    if left := [folder.name for folder in folders if not _sent(folder)]:
        raise UserError(f"{job.run_dir / 'wandb'}: not sent: {', '.join(left)}; the same command tries again")


def _catch_up(job: Job) -> int:
    from pipeline.run import read_config, read_record
    from pipeline.wandb_rows import WandbRun

    record, outcome = read_record(store := Store(job.store)), job.start.outcome()
    if record is None:
        raise UserError(f"{job.store}: no run there (run.json); W&B's rows of it cannot be completed")
    config = read_config(store)
    of_run = WandbRun(job.run_dir, job.store, record.wandb_id, config.monitor, config.dump())
    return of_run.catch_up(None if outcome is None else outcome.outcome)


def _sent(folder: Path) -> bool:
    """W&B's command leaves a file beside what has gone out whole."""
    return any(folder.glob("*.wandb.synced"))


def _check_answers(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=ANSWER_S).close()  # noqa: S310 - the user's own setting
    except urllib.error.HTTPError:
        return  # an answer
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: W&B does not answer ({error}); check the network, or WANDB_BASE_URL") from None
