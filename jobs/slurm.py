"""SLURM's own commands, asked with a time limit; what they refuse becomes one line. Needs no accounting (no sacct)."""

import getpass
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError

TIMEOUT_S = 30.0


class SlurmError(UserError):
    """SLURM does not answer, or refuses what it was asked for."""


@dataclass(frozen=True)
class Queued:
    """A job as squeue shows it. `run`: the run's place in the store, which each job of ours carries as its comment."""

    job: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    nodes: str
    reason: str
    run: str


def queue() -> list[Queued]:
    """All jobs of this user that wait or run, in one call."""
    lines = _call(["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%T|%N|%r|%k"]).splitlines()
    return [Queued(*line.strip().split("|", 4)) for line in lines if line.count("|") >= 4]


def check_partition(name: str | None, nodes: int) -> None:
    """Refuse a partition that does not exist or is too small; SLURM itself would let the job wait for ever."""
    rows = [line.split("|") for line in _call(["sinfo", "--noheader", "--summarize", "--format", "%P|%D"]).splitlines()]
    sizes = {row[0].rstrip("*"): int(row[1]) for row in rows}
    wanted = name or next((row[0].rstrip("*") for row in rows if row[0].endswith("*")), None)
    if wanted is None or wanted not in sizes:
        raise SlurmError(f"partition: found {wanted}; SLURM has {', '.join(sorted(sizes)) or 'none'}")
    if nodes > sizes[wanted]:
        raise SlurmError(f"nodes: found {nodes}; partition {wanted} has {sizes[wanted]}")


def version() -> str | None:
    """Such as `slurm-wlm 22.05.8`; None where it cannot be asked."""
    try:
        return _call(["sinfo", "--version"]).strip()
    except SlurmError:
        return None


def ask(*command: str) -> str:
    """What one of SLURM's commands answers. Raises SlurmError."""
    return _call(command)


def requeue(job: str) -> None:
    """Put a running job back into the queue under its id. Called from inside the job, this ends it."""
    _call(["scontrol", "requeue", job])


def requeue_without(job: str, hosts: Sequence[str]) -> None:
    """Requeue the job that this process is part of, off these hosts as far as its partition has others.

    Only a job that waits can be told so, and a requeued one does at once; SLURM then ends this process, which must live
    until it has said so.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spare = spare_nodes(os.environ["SLURM_JOB_PARTITION"], int(os.environ["SLURM_JOB_NUM_NODES"]))
    requeue(job)
    _call(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(hosts[:spare])}"])


def spare_nodes(partition: str | None, needed: int) -> int:
    """How many nodes of a partition (of all, without one) a job that needs so many can do without."""
    where = ["--partition", partition] if partition else []
    rows = _call(["sinfo", "--noheader", "--summarize", *where, "--format", "%D"]).split()
    return max(0, max(map(int, rows), default=0) - needed)


def signal_ranks(job: str, name: str = "USR2") -> None:
    """Signal every process of the job's steps (all ranks on all nodes), but not its batch script."""
    _call(["scancel", f"--signal={name}", job])


def cancel(job: str) -> None:
    """End a job, whether it waits or runs."""
    _call(["scancel", job])


def _call(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"SLURM is not installed here ({command[0]} not found): make cluster-up, or another SITE=...")
    config = Path(os.environ.get("SLURM_CONF", "/"))
    if not config.exists():  # SLURM's own commands wait a minute for it
        raise SlurmError(f"SLURM does not answer (SLURM_CONF: no {config}): {_HINT}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"SLURM does not answer ({command[0]}, {TIMEOUT_S:.0f} s): {_HINT}") from None
    if done.returncode:
        said = ((done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        away = any(sign in said for sign in ("Unable to contact", "Could not establish", "Unable to process config"))
        raise SlurmError(f"SLURM does not answer ({said}): {_HINT}" if away else f"SLURM refused {command[0]}: {said}")
    return done.stdout


_HINT = "make cluster-up for the local one, or another SITE=..."
