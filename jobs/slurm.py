"""SLURM's own commands, asked with a time limit; what they refuse becomes one line. Needs no accounting (no sacct).

Lists are asked for with `--all`: else none but root hears of partitions that a cluster hides, nor of own jobs there.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError

TIMEOUT_S = 30.0
PATIENCE_S = 1800.0  # for a requeue while the controller is busy or starts again
AGAIN_S = 5.0
FINAL = ("disabled", "Invalid job id", "ermission denied")  # in what is said of a requeue that will never be
NAMES = 1000  # of 72 letters at most: Linux takes no argument of 128 KiB
_HINT = "make cluster-up for the local one, or another SITE=..."
USABLE = "idle,alloc,mix,comp,resv,plnd"  # states of nodes that run jobs, or soon will


class SlurmError(UserError):
    """SLURM does not answer, or refuses what it was asked for."""


class NotInstalled(SlurmError):
    """This machine, or the image in which this Python runs, has none of SLURM's commands."""


@dataclass(frozen=True)
class Queued:
    """A job as squeue shows it. `run`: the run's place in the store, which each job of ours carries as its comment."""

    job: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    nodes: str
    reason: str
    run: str
    user: str = ""


def job_name(run: str) -> str:
    """By which SLURM lists a run's jobs."""
    return f"farseer-{run}"


def queue(runs: Sequence[str]) -> list[Queued]:
    """The jobs of these runs that wait or run, whoever submitted them, in one call for a thousand runs."""
    found = []
    for first in range(0, len(runs), NAMES):
        names = ",".join(map(job_name, runs[first : first + NAMES]))
        lines = ask("squeue", "--all", "--noheader", "--name", names, "--format", "%i|%T|%N|%r|%u|%k").splitlines()
        for line in lines:
            if line.count("|") >= 5:
                job, state, nodes, reason, user, run = line.strip().split("|", 5)
                if state != "REVOKED":  # of a federation: another cluster has taken it
                    found.append(Queued(job, state, nodes, reason, run, user))
    return found


def job_state(job: str) -> tuple[str, str] | None:
    """State and reason of a job, or of one task of an array; None when it neither waits nor runs."""
    try:
        lines = ask("squeue", "--noheader", "--job", job, "--format", "%T|%r").split("\n")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    state, _, reason = lines[0].strip().partition("|")
    return (state, reason) if state else None


def check_partition(name: str | None, nodes: int) -> list[str]:
    """The partitions of that name, or the default one. Refuses one that does not exist or is too small.

    SLURM itself would let the job wait for ever.
    """
    lines = ask("sinfo", "--all", "--noheader", "--summarize", "--format", "%P|%D").splitlines()
    rows = [line.split("|") for line in lines]
    sizes = {row[0].rstrip("*"): int(row[1]) for row in rows}
    wanted = name or next((row[0].rstrip("*") for row in rows if row[0].endswith("*")), None)
    named = wanted.split(",") if wanted else []
    if not named or not sizes.keys() >= set(named):
        raise SlurmError(f"partition: found {wanted}; SLURM has {', '.join(sorted(sizes)) or 'none'}")
    if nodes > (most := max(sizes[one] for one in named)):
        raise SlurmError(f"nodes: found {nodes}; partition {wanted} has {most}")
    return named


def version() -> str | None:
    """Such as `slurm-wlm 22.05.8`; None where it cannot be asked."""
    try:
        return ask("sinfo", "--version").strip()
    except SlurmError:
        return None


def ask(*command: str) -> str:
    """What one of SLURM's commands answers. Raises SlurmError."""
    if shutil.which(command[0]) is None:
        raise NotInstalled(f"SLURM is not installed here ({command[0]} not found): {_HINT}")
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


def requeue(job: str, patience_s: float = 0.0) -> None:
    """Put a running job back into the queue under its id. Called from inside the job, this ends it.

    A controller that is busy or away is asked again for so long. Raises SlurmError, at once for what will not change.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            ask("scontrol", "requeue", job)
            return
        except SlurmError as error:
            final = isinstance(error, NotInstalled) or any(sign in str(error) for sign in FINAL)
            if final or time.monotonic() > end:
                raise
        time.sleep(AGAIN_S)


def requeue_without(job: str, hosts: Sequence[str], always: Sequence[str], constraint: str | None) -> None:
    """Requeue the job that this process is part of, off these hosts as far as its partition has others.

    always: hosts that the site keeps its jobs off; constraint: what its nodes must have. Only a job that waits can be
    told so, and a requeued one does at once; SLURM then ends this process, which must live until it has said so.
    Raises SlurmError when SLURM does not requeue the job; on which nodes it runs matters less.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    off = _spared_here(hosts, constraint, always) if hosts else []
    requeue(job, PATIENCE_S)
    try:
        ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*always, *off])}")
    except SlurmError as error:
        sys.stderr.write(f"farseer: requeued, but not kept off {', '.join(off) or 'any host'}: {error}\n")


def _spared_here(hosts: Sequence[str], constraint: str | None, always: Sequence[str]) -> list[str]:
    where, nodes = os.environ["SLURM_JOB_PARTITION"], int(os.environ["SLURM_JOB_NUM_NODES"])
    gpus = os.environ.get("SLURM_GPUS_PER_NODE", "0") != "0"
    try:
        return spared(hosts, where, nodes, constraint, kept_off=always, gpus=gpus)
    except SlurmError:
        return []  # SLURM is busy: better a suspect host than none


def spared(
    hosts: Sequence[str],
    partition: str | None,
    needed: int,
    constraint: str | None,
    *,
    kept_off: Sequence[str] = (),
    gpus: bool = False,
) -> list[str]:
    """The hosts that a job of so many nodes can do without, the first ones first; none that SLURM does not know.

    SLURM refuses a whole list for one name that it does not know. partition: without, the default one; of several,
    each that could hold the job still can. constraint: a feature that the nodes must have; of an expression it is not
    known which nodes have it: none is spared. kept_off: hosts that the job does not get anyway. gpus: it needs some.
    """
    if not hosts:
        return []
    where = ["--partition", partition] if partition else []
    usable = _nodes(f"--states={USABLE}", *where)
    others = {host for one in kept_off for host in ask("scontrol", "show", "hostnames", one).split()}
    fit: dict[str, set[str]] = {}
    for node, of, features, gres in usable:
        asked = of.rstrip("*") in partition.split(",") if partition else of.endswith("*")
        has = (constraint is None or constraint in features.split(",")) and (not gpus or "gpu" in gres)
        if asked and has and node not in others:
            fit.setdefault(of, set()).add(node)
    able = [nodes for nodes in fit.values() if len(nodes) >= needed]
    if not able:
        return []
    off: list[str] = []
    for host in hosts:
        if any(host in nodes for nodes in fit.values()) and all(len(nodes - {host, *off}) >= needed for nodes in able):
            off.append(host)
    known, here = ({row[0] for row in rows} for rows in (_nodes(*where), usable))
    return off + [host for host in hosts if host in known - here]  # it may come back before the job starts


def _nodes(*which: str) -> list[list[str]]:
    """Name, partition, features and generic resources of nodes, a row for each partition that one is in."""
    shown = () if "--partition" in which else ("--all",)  # sinfo takes one of them; a partition's name shows it, too
    lines = ask("sinfo", *shown, "--noheader", "--Node", *which, "--format", "%N|%P|%f|%G").splitlines()
    return [line.split("|") for line in lines]


def signal_ranks(job: str) -> None:
    """USR2 to every process of the job's steps (all ranks on all nodes), but not to its batch script."""
    ask("scancel", "--signal=USR2", job)


def cancel(job: str) -> None:
    """End a job, whether it waits or runs."""
    ask("scancel", job)
