"""Sends to W&B what a run has recorded offline, by W&B's own command."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from data_shards.errors import UserError
from jobs import runs
from jobs.runs import Job
from pipeline.wandb_client import wandb_mode, wandb_url

ANSWER_S = 10.0  # W&B's command itself asks for minutes, without a word


def send(job: Job) -> list[Path]:
    """Send what was not sent before, the oldest start first; returns the folders that have gone out.

    They become one run there, under the run's own id. Raises UserError when there is nothing to send, no key, no
    answer, or when W&B's command has left something behind: it says so on stderr, and leaves with 0 all the same.
    """
    found = sorted((job.run_dir / "wandb").glob("offline-run-*"))  # by the time of their start
    if not found:
        raise UserError(f"{job.run_dir / 'wandb'}: nothing was recorded offline; with a key, rows go out while it runs")
    if (state := runs.state(job)) is not None:
        raise UserError(f"RUN={job.run}: job {job.id}, {state.lower()}, still writes; send it when the job is over")
    if wandb_mode("auto") != "online":
        raise UserError(f"no key for {wandb_url()}; `wandb login` puts one into netrc")
    unsent = [folder for folder in found if not _sent(folder)]
    if unsent:
        _check_answers(wandb_url())
        quiet, names = {**os.environ, "WANDB_ERROR_REPORTING": "false"}, [f"wandb/{folder.name}" for folder in unsent]
        # its log goes to wandb/ of the folder where it is called: the run's, not the user's
        command = [sys.executable, "-m", "wandb", "sync", "--yes", *names]
        subprocess.run(command, check=False, env=quiet, cwd=job.run_dir)
    if left := [folder.name for folder in unsent if not _sent(folder)]:
        raise UserError(f"{job.run_dir / 'wandb'}: not sent: {', '.join(left)}; the same command tries again")
    return unsent


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
