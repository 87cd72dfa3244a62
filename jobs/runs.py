"""Runs and their jobs as the user meets them: what runs, how far it is, its logs, stopping it.

Reads the shared disk and asks SLURM once; the store is not asked, so it stays quick however many runs there are.
"""

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import daemons, local, slurm
from jobs.daemons import Process
from jobs.site import Site
from jobs.start import Start, attempt_files, cancel_marker, events, newest_start, read_lines, write_json

TAIL_BYTES = 64 * 1024
FOLLOW_S = 0.5


@dataclass(frozen=True)
class Job:
    """The newest job of a run. `process` is set for a local job: the one that starts the ranks."""

    run: str
    run_dir: Path
    store: str  # the run's folder in the store
    id: str
    process: Process | None = None

    def save(self) -> None:
        """Remember it as the run's newest job."""
        values = {"run": self.run, "store": self.store, "id": self.id}
        write_json(self.run_dir / "job.json", values | ({"process": asdict(self.process)} if self.process else {}))

    @classmethod
    def of(cls, site: Site, run: str) -> "Job":
        """The newest job of a run. Raises UserError, with the runs that there are, when it has none."""
        run_dir = site.run_dir(run)
        try:
            values = json.loads((run_dir / "job.json").read_text())
        except FileNotFoundError:
            known = ", ".join(path.name for path in folders(site)) or "none"
            raise UserError(f"RUN={run}: no such run in {site.shared_dir}; there are: {known}") from None
        process = Process(**values["process"]) if "process" in values else None
        return cls(values["run"], run_dir, values["store"], values["id"], process)

    @property
    def local(self) -> bool:
        return self.process is not None

    @property
    def start(self) -> Start:
        return newest_start(self.run_dir, self.id)


def folders(site: Site) -> list[Path]:
    """The runs that were submitted to this site, in the order of their names."""
    return sorted(path.parent for path in Path(site.shared_dir).glob("*/job.json"))


def state(job: Job, queue: Sequence[slurm.Queued] | None = None) -> str | None:
    """PENDING, RUNNING, COMPLETING or another of SLURM's words; None when the job is over.

    queue: what `slurm.queue` said, to ask only once for many jobs.
    """
    if job.process is not None:
        return "RUNNING" if not daemons.gone(job.process) else None
    return next((entry.state for entry in (slurm.queue() if queue is None else queue) if entry.job == job.id), None)


def preempt(job: Job) -> None:
    """Do as SLURM does when it takes the nodes away: USR2 to every rank. They save, and the job starts again."""
    if job.process is not None:
        local.send(job.start, signal.SIGUSR2)
    else:
        slurm.signal_ranks(job.id)


def cancel(job: Job, now: bool = False) -> str:
    """Stop a job: after a last checkpoint, or `now`. Returns what was done, in words."""
    was = state(job)
    if was is None:
        raise UserError(f"RUN={job.run}: job {job.id} is over already; make status shows how it ended")
    cancel_marker(job.run_dir).touch()
    if now or was != "RUNNING" or not job.start.ranks():
        end(job)
        return f"job {job.id} is cancelled; make resume RUN={job.run} goes on from the last checkpoint"
    preempt(job)
    return f"job {job.id} saves a last checkpoint and ends; NOW=1 does not wait for it"


def end(job: Job) -> None:
    """End a job at once, whatever it does."""
    if job.process is not None:
        daemons.stop(job.process)
    else:
        slurm.cancel(job.id)


@dataclass(frozen=True)
class Status:
    """One line of `make status`. What a run has not reached yet is None."""

    run: str
    state: str  # in words
    job: str
    step: int | None
    steps: int | None
    loss: float | None
    images_s: float | None
    wait: float | None  # share of the time spent waiting for data
    committed: int | None  # step of the newest checkpoint in the store
    starts: int
    seconds_ago: float | None  # since the last step


def statuses(site: Site) -> list[Status]:
    """All runs of a site."""
    jobs = [Job.of(site, folder.name) for folder in folders(site)]
    queue = slurm.queue() if any(not job.local for job in jobs) else []
    return [status(job, queue) for job in jobs]


def status(job: Job, queue: Sequence[slurm.Queued] | None = None) -> Status:
    """How a run is, from its folder on the shared disk."""
    told = history(job.run_dir)
    row = _last_row(job.run_dir)
    result, run = row.get("result", {}), row.get("run", {})
    wait = run["wait_s"] / run["step_s"] if run.get("step_s") else None
    return Status(
        run=job.run,
        state=_in_words(job, state(job, queue)),
        job=job.id,
        step=result.get("step"),
        steps=_latest(told, "steps"),
        loss=result.get("loss"),
        images_s=run.get("images_s"),
        wait=wait,
        committed=_latest([event for event in told if event["event"] == "committed"], "step"),
        starts=sum(event["event"] in ("started", "resumed") for event in told),
        seconds_ago=time.time() - run["time"] if "time" in run else None,
    )


def history(run_dir: Path) -> list[dict[str, Any]]:
    """What happened to a run, oldest first: the events of its training and of its jobs."""
    told = [event for path in attempt_files(run_dir, "events.jsonl") for event in read_lines(path)]
    return sorted([*told, *events(run_dir)], key=lambda event: float(event["time"]))


def sentence(event: dict[str, Any]) -> str:
    """An event as a line: when, what, and whatever else it tells."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    known = ("time", "event", "attempt")
    shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in event.items()}
    more = ", ".join(f"{key} {value}" for key, value in shown.items() if key not in known and value is not None)
    return f"{when}  {event['event']}" + (f": {more}" if more else "")


def logs(job: Job) -> list[Path]:
    """The log files of the newest start, rank by rank; before its ranks have begun, the batch script's."""
    ranks = [Path(record.log) for record in job.start.ranks()]
    return ranks or sorted((job.run_dir / "logs").glob(f"{job.id}_*_log.out"))


def _last_row(run_dir: Path) -> dict[str, Any]:
    files = reversed(attempt_files(run_dir, "metrics.jsonl"))
    return next((rows[-1] for path in files if (rows := read_lines(path, TAIL_BYTES))), {})


def _latest(told: Sequence[dict[str, Any]], key: str) -> Any:
    return next((event[key] for event in reversed(told) if key in event), None)


def _in_words(job: Job, word: str | None) -> str:
    if word is not None:
        return "waiting" if word == "PENDING" else word.lower()
    outcome, last = job.start.outcome(), _latest(events(job.run_dir), "event")
    if outcome is not None and outcome.outcome in ("finished", "cancelled"):
        return outcome.outcome
    if cancel_marker(job.run_dir).exists():
        return "cancelled"
    if last == "failed":
        return f"failed ({_latest(events(job.run_dir), 'reason')})"
    return f"ended without a word (make resume RUN={job.run} goes on)"


def show(job: Job, lines: int, follow: bool, out: TextIO) -> None:
    """Write the last lines of every rank's log, each with its rank; `follow`: also what comes, until it is over."""
    places: dict[Path, int] = {}
    while True:
        over = not follow or state(job) is None  # asked first: what was written before the end is still shown
        for path in logs(job):
            _show_new(path, places, lines, out)
        out.flush()
        if over:
            return
        time.sleep(FOLLOW_S)


def stored_checkpoints(url: str, verify: bool = False) -> list[dict[str, Any]]:
    """The checkpoints of a run in the store, oldest first: name, bytes, state in words.

    verify: read and hash every byte of those that are committed.
    """
    from pipeline import commit

    store = Store(url)
    found = []
    for place, objects in sorted(commit.survey(store).items()):
        state = "committed" if commit.MANIFEST in objects else "not committed"
        if verify and state == "committed":
            state = commit.damage(store, place) or "verified"
        found.append({"name": place.name, "bytes": sum(objects.values()), "state": state})
    return found


def _show_new(path: Path, places: dict[Path, int], lines: int, out: TextIO) -> None:
    """Write what a log has beyond its place, at first its last lines; a line that is not finished waits."""
    try:
        with path.open("rb") as file:
            file.seek(places.get(path, 0))
            whole = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return
    new = whole[0].decode(errors="replace").splitlines()
    rank = path.name.split("_")[-2]
    for line in new if path in places else new[-lines:]:
        out.write(f"{rank}| {line}\n")
    places[path] = places.get(path, 0) + len(whole[0] + whole[1])
