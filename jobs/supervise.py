"""What the end of a start means: the one place that decides whether a job is over or starts again.

Runs in the batch script before and after the ranks (no daemon), under the local executor in the process that starts
them (jobs.local). `decide` is pure; everything it needs was left on the shared disk and in the store.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import blame, daemons
from jobs.start import CODE_ERROR, Failure, Outcome, Start, attempt_files, events, note
from pipeline import commit
from pipeline.journal import read_lines

TOO_EARLY = "preempted before the first step"
STORE_S = 5.0  # a store that is away longer is not waited for
BY_THE_SHELL = 3  # exit code: to be requeued by the batch script, where this Python has no SLURM


@dataclass(frozen=True)
class Decision:
    """`end`: it is over, and well. `requeue`: start again. `stop`: trying again would not help; `reason` says why."""

    action: Literal["end", "requeue", "stop"]
    reason: str


class SetupFailed(UserError):
    """A command of the site's `setup` failed; on another node, or later, it may not."""

    passing = True

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(f"the site's setup: `{command}` failed ({_in_words(exit_code)}), so nothing was started")


def decide(
    exit_code: int,
    outcome: Outcome | None,
    failures: Sequence[Failure],
    *,
    cancelled: bool = False,
    stalled: int = 0,
    max_cycles: int = 3,
    suspects: Mapping[str, str] | None = None,
    memory: str | None = None,
) -> Decision:
    """Judge a start that has ended.

    exit_code: srun's, the highest of all ranks. outcome: what rank 0 left, None when it could not. failures: what ranks
    said, the first one first. stalled: failed starts just before this one, and with it, without a new checkpoint.
    suspects: hosts that may be to blame, and for each what happened. memory: what SLURM said of a rank that had none
    left.
    """
    if outcome is not None and (outcome.outcome in ("finished", "cancelled") or outcome.requeued):
        return Decision("end", outcome.outcome)
    if cancelled:
        return Decision("end", "cancelled")
    if outcome is not None:  # preempted or terminated, and nobody has asked SLURM yet
        return Decision("requeue", outcome.outcome)
    if (final := _final(failures, alone=not suspects and memory is None)) is not None:
        return Decision("stop", str(final))
    # whom the others wait for knows better than they do; one that was killed says nothing itself
    words = [*filter(None, [memory]), *(suspects or {}).values(), *map(str, failures)]
    cause = words[0] if words else f"the ranks left without a word ({_in_words(exit_code)})"
    if stalled >= max_cycles:
        return Decision(
            "stop", f"{stalled} starts without a new checkpoint ({blame.kind(cause)}); the last one: {cause}"
        )
    return Decision("requeue", cause)


def _final(failures: Sequence[Failure], alone: bool) -> Failure | None:
    """The failure that another start would meet again, if one is.

    What a user can mend is one, whichever rank says it. An error of the code (exit code 1) is one if it came first and
    no other rank is known to have gone (`alone`): when others have left, code goes wrong that is right.
    """
    first = failures[0] if failures and alone and failures[0].exit_code is not None else None
    return first or next((failure for failure in failures if (failure.exit_code or 0) > CODE_ERROR), None)


def before(start: Start) -> int:
    """Make way for a start: a free port of this host, on which rank 0 will meet the others.

    Removes what an earlier start of this job has pickled, which would pass for the result of this one.
    Raises UserError when a cancel was asked for while the job waited.
    """
    if start.cancelled:
        start.end("cancelled")
        raise UserError(f"{start.run_dir}: a cancel was asked for; not started (make resume goes on)")
    shutil.rmtree(start.folder, ignore_errors=True)  # outside SLURM a job may bear the number of an older one
    for stale in (start.run_dir / "logs").glob(f"{start.job}_*_result.pkl"):
        stale.unlink(missing_ok=True)
    return daemons.free_ports(1)[0]


def after(start: Start, exit_code: int, store: Store, max_cycles: int) -> Decision:
    """Decide about a start that has ended, and note it among the run's events; in the store too when it was the last.

    store: the run's folder, best asked for STORE_S only. After a time limit there are seconds left to ask SLURM in; of
    a requeue the store hears from the next start.
    """
    outcome = start.outcome()
    if outcome is not None or start.cancelled:
        return decide(exit_code, outcome, [], cancelled=start.cancelled)
    failures = start.failures()
    log = blame.log_of(start)
    if not failures and blame.signalled_early(log):
        start.note("requeued", reason=TOO_EARLY)
        return Decision("requeue", TOO_EARLY)
    noted = _noted(start, store)
    committed = _newest(store, start.run_dir, noted)
    stalled = stalled_starts(noted, committed)
    suspects, memory = blame.suspects(log, failures), blame.out_of_memory(log)
    decision = decide(
        exit_code, None, failures, stalled=stalled, max_cycles=max_cycles, suspects=suspects, memory=memory
    )
    event = "requeued" if decision.action == "requeue" else "failed"
    more = {"suspects": [*suspects]} if suspects else {}
    unwritten = start.note(event, reason=decision.reason, committed=committed, **more)
    if unwritten is not None:
        _put_unwritten(start, store, unwritten)
    blame.blame(start.run_dir.parent, start.run_dir.name, suspects)
    if decision.action != "requeue":
        publish(start.run_dir, start.job, store)
    return decision


def _noted(start: Start, store: Store) -> list[dict[str, Any]]:
    """The events of the run's jobs, oldest first, with those that a full disk has not taken.

    The store is asked for these only where the start before has left no word of its end: it may be away.
    """
    told, earlier = events(start.run_dir), Start(start.run_dir, start.job, start.number - 1)
    known = (event.get("start") == earlier.number and event.get("job") == start.job for event in told)
    if start.number == 0 or earlier.outcome() is not None or any(known):
        return told
    try:
        unwritten = [json.loads(store.get(entry.path)) for entry in store.list(_unwritten(start))]
    except UserError:
        unwritten = []
    return sorted([*told, *unwritten], key=lambda event: float(event["time"]))


def _put_unwritten(start: Start, store: Store, event: dict[str, Any]) -> None:
    """Else a job whose starts all fail for the full disk would be started for ever."""
    with contextlib.suppress(UserError):
        store.put(f"{_unwritten(start)}/{start.number:04d}.jsonl", json.dumps(event).encode() + b"\n")


def _unwritten(start: Start) -> str:
    return f"events/unwritten-{start.job}"


def publish(run_dir: Path, job: str, store: Store) -> None:
    """Copy the run's jobs.jsonl to the store, beside the events of the training; what the store refuses, later does.

    One object a job, each with all that its site knows: a run may go on at another site, which knows nothing of it.
    """
    try:
        store.put(f"events/jobs-{job}.jsonl", (run_dir / "jobs.jsonl").read_bytes())
    except UserError as error:
        note(run_dir, "upload failed", reason=str(error))


def committed_step(store: Store) -> int | None:
    """The step of the newest attempt's newest checkpoint that exists (its manifest does), None when there is none.

    One of an earlier attempt may be above it: damaged, so that the later one went on from below.
    """
    found = commit.committed(commit.survey(store))
    return max(((place.attempt, place.step) for place in found), default=(0, None))[1]


def stalled_starts(noted: Sequence[dict[str, Any]], committed: int | None) -> int:
    """How many failed starts in a row, up to the one that ends now with `committed`, brought no newer checkpoint.

    noted: the events of the run's jobs, oldest first; those before the last submission do not count.
    """
    submitted = max((i for i, event in enumerate(noted) if event["event"] == "submitted"), default=0)
    known = [event["committed"] for event in noted[submitted:] if "committed" in event]
    steps = [-1 if step is None else step for step in (*known, committed)]
    count = 0
    while count + 1 < len(steps) and steps[-1 - count] <= steps[-2 - count]:
        count += 1
    return count


def _newest(store: Store, run_dir: Path, noted: Sequence[dict[str, Any]]) -> int | None:
    """The newest checkpoint's step; when the store is away, the last one of which anything was heard here."""
    try:
        return committed_step(store)
    except UserError:
        told = (event for path in attempt_files(run_dir, "events.jsonl") for event in read_lines(path))
        known = [event["committed"] for event in noted if "committed" in event]
        known += [event["step"] for event in told if event["event"] == "committed"]
        return known[-1] if known else None


def _in_words(exit_code: int) -> str:
    if exit_code > 128:
        return f"ended by signal {exit_code - 128}"
    return f"exit code {exit_code}"
