"""What the ranks of a run wrote, merged by time; what failed first; the run's history as sentences."""

import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jobs.runs import Job, state
from jobs.slurm import SlurmError
from jobs.stamps import parse

FOLLOW_S = 0.5
ASK_S = 5.0  # between two questions to SLURM whether the job is over
TAIL_BYTES = 256 * 1024  # of each rank, at first
OTHERS_SHOWN = 5


class Line(NamedTuple):
    """time: seconds since 1970; 0 before the first stamp of its file."""

    time: float
    rank: str
    text: str


def logs(job: Job) -> list[Path]:
    """The log files of the newest start, rank by rank; before its ranks have begun, the batch script's."""
    ranks = [Path(record.log) for record in job.start.ranks()]
    script = job.run_dir / "logs" / "local.log"
    return ranks or sorted((job.run_dir / "logs").glob(f"{job.id}_*_log.out")) or [script] * script.exists()


def show(job: Job, lines: int, follow: bool, out: TextIO) -> None:
    """Write the last lines of all ranks in the order of their time; `follow`: also what comes, until it is over."""
    tails: dict[Path, Tail] = {}
    begun, over, asked = False, not follow, -ASK_S
    while True:
        if follow and (job.local or time.monotonic() - asked > ASK_S):
            over, asked = is_over(job), time.monotonic()  # before the logs: what came before the end is still shown
        new = [line for path in logs(job) for line in tails.setdefault(path, Tail(path)).new()]
        new.sort(key=lambda line: line.time)
        for line in new if begun else new[max(0, len(new) - lines) :]:
            at = time.strftime("%H:%M:%S ", time.localtime(line.time)) if line.time else ""
            out.write(f"{at}{line.rank}| {line.text}\n")
        begun = begun or bool(new)
        out.flush()
        if over:
            return
        time.sleep(FOLLOW_S)


def is_over(job: Job) -> bool:
    """Whether a job is over, for whoever asks again; it is not where SLURM is too busy to tell."""
    try:
        return state(job) is None
    except SlurmError:
        return False


class Tail:
    """The end of a log file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._time = path, 0.0
        self._place: int | None = None
        self._rank = path.name.split("_")[-2] if "_" in path.name else "job"

    def new(self) -> Iterator[Line]:
        """The lines since the last call; one that is not finished waits."""
        try:
            with self._path.open("rb") as file:
                if self._place is None:
                    self._place = max(0, self._path.stat().st_size - TAIL_BYTES)
                    file.seek(self._place)
                    self._place += len(file.readline()) if self._place else 0  # a line that is cut
                file.seek(self._place)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._place += len(whole + end)
        for text in whole.decode(errors="replace").splitlines() if end else ():
            stamped, rest = parse(text)
            self._time = self._time if stamped is None else stamped
            yield Line(self._time, self._rank, rest)


def what_failed(job: Job) -> Iterator[str]:
    """The traceback of the rank that failed first, then in a line each what some others said."""
    failures = job.start.failures()
    if not failures:
        return
    first, *others = failures
    yield f"FAILED FIRST  {first}"
    yield from filter(None, [first.trace.rstrip()])
    yield from (f"then          {failure}" for failure in others[:OTHERS_SHOWN])
    if others[OTHERS_SHOWN:]:
        yield f"              and {len(others) - OTHERS_SHOWN} ranks more"
    yield ""


def sentence(event: dict[str, Any]) -> str:
    """An event as a line: when, what, and whatever else it tells."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    forms = (*_SENTENCES.get(event["event"], ()), "{event} at step {step}: {reason}", "{event}: {reason}", "{event}")
    form = next(form for form in forms if _fields(form) <= event.keys())
    told = {"time", "event", "attempt", *_fields(form)}
    rest = [f"{key} {_short(value)}" for key, value in event.items() if key not in told and value is not None]
    return f"{when}  {form.format(**event)}" + (f" ({', '.join(rest)})" if rest else "")


def _fields(form: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(form) if name}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_SENTENCES: dict[str, tuple[str, ...]] = {
    "submitted": ("submitted as job {job}",),
    "started": ("training begins, to step {steps}, on {ranks} ranks", "training begins"),
    "resumed": ("training goes on from step {step} to {steps}, on {ranks} ranks", "training goes on from step {step}"),
    "committed": ("the checkpoint of step {step} is in the store",),
    "saved": ("the checkpoint of step {step} is copied, training goes on",),
    "preempted": ("preempted at step {step}",),
    "stopped": ("{seconds} s after the signal the checkpoint of step {step} is in the store",),
    "recovered": ("step {step} is the first new one, {seconds} s after the last before; {redone} were done again",),
    "terminated": ("told to end at step {step}",),
    "cancelled": ("cancelled at step {step}",),
    "finished": ("finished at step {step}",),
    "requeued": ("requeued: {reason}", "requeued at step {step}"),
    "failed": ("the job has FAILED: {reason}",),
    "profiled": ("up to step {step} was looked at: {trace}",),
    "alarm": ("ALARM at step {step}: {reason}", "ALARM: {reason}"),
    "checkpoint damaged": ("the checkpoint of step {step} is damaged: {reason}",),
    "checkpoint completed": ("the checkpoint of step {step} was completed after the end of its attempt: {reason}",),
    "removed": (
        "from step {step} on {count} removed images are left out, by {note}",
        "from step {step} on {count} removed images are left out",
    ),
    "step skipped": ("step {step} is skipped: {reason}",),
}
