"""Runs and their jobs as the user meets them: what runs, how far it is, stopping it.

Reads the shared disk and asks SLURM once, so it stays quick however many runs there are. What runs at other sites only
the store tells: jobs.elsewhere.
"""

import contextlib
import json
import math
import platform
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from jobs import daemons, local, slurm
from jobs.daemons import Process
from jobs.site import RUN_NAME, Site
from jobs.start import Start, attempt_files, cancel_marker, events, newest_start, write_json
from pipeline.goodput import End, Goodput, goodput
from pipeline.journal import read_lines

Row = dict[str, Any]

TAIL_BYTES = 64 * 1024  # of the newest attempt's rows: more than a hundred
LAST_BYTES = 4 * 1024  # of an older one's: the last is in them
READERS = 16  # folders read at the same time: a shared disk is slow to answer, not slow
STILL_S = 60.0  # without a step, or so many medians if that is longer: worth a look
MEDIANS = 20
NOT_SAVED = ("save failed", "save refused", "save delayed")  # events, until the next "committed"
WAITS = 0.3  # of the time for data: worth a look
ALONE = 0.75  # of that for one rank: worth naming it


@dataclass(frozen=True)
class Job:
    """The newest job of a run. Of a local one, `process` is the one that starts the ranks, and `host` is where.

    option: of the site, for commands to type.
    """

    run: str
    run_dir: Path
    store: str  # the run's folder in the store
    id: str
    process: Process | None = None
    host: str = ""
    option: str = field(default="", compare=False)

    def make(self, verb: str) -> str:
        """The command for a verb about this run."""
        return f"make {verb} RUN={self.run}{self.option}"

    def save(self) -> None:
        """Remember it as the run's newest job."""
        values = {"run": self.run, "store": self.store, "id": self.id}
        local = {"process": asdict(self.process), "host": self.host} if self.process else {}
        write_json(self.run_dir / "job.json", values | local)

    @classmethod
    def of(cls, site: Site, run: str) -> "Job":
        """The newest job of a run. Raises UserError, with the runs that there are, when it has none."""
        run_dir = site.run_dir(run)
        try:
            with owned(run_dir):
                values = json.loads((run_dir / "job.json").read_text())
            process = Process(**values["process"]) if "process" in values else None
            run, store, number = values["run"], values["store"], values["id"]
            return cls(run, run_dir, store, number, process, values.get("host", ""), site.option)
        except FileNotFoundError:
            known = ", ".join(path.name for path in folders(site)) or "none"
            where = f"{site.shared_dir}, SITE={site.name}"
            raise UserError(f"RUN={run}: no such run in {where}; there are: {known}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{run_dir}/job.json: not what a submission writes; move that folder away") from None

    @property
    def local(self) -> bool:
        return self.process is not None

    @property
    def start(self) -> Start:
        return newest_start(self.run_dir, self.id)


class Elsewhere(UserError):
    """The processes of a local job cannot be seen from this machine."""

    def __init__(self, job: Job) -> None:
        super().__init__(
            f"RUN={job.run}: {job.id} was started on {job.host}, and only there can be seen to; "
            f"if that is gone, move {job.run_dir} away: the store has the run"
        )


def folders(site: Site) -> list[Path]:
    """The runs that were submitted to this site, in the order of their names; copies of another name are none."""
    found = (path.parent for path in Path(site.shared_dir).glob("*/job.json"))
    return sorted(folder for folder in found if RUN_NAME.fullmatch(folder.name))


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Raises UserError, with the owner's name, for what this user may not do in the folder of a run."""
    try:
        yield
    except PermissionError as error:
        if not run_dir.is_dir():
            raise
        owner = str(run_dir.stat().st_uid)
        with contextlib.suppress(KeyError):  # of a user whom this machine does not know, the number has to do
            owner = run_dir.owner()
        raise UserError(f"RUN={run_dir.name}: {run_dir} is {owner}'s, and closed to you: {error}") from None


def state(job: Job, queue: Sequence[slurm.Queued] | None = None) -> str | None:
    """PENDING, RUNNING, COMPLETING or another of SLURM's words; None when the job is over.

    queue: what `slurm.queue` said, to ask only once for many jobs. Raises Elsewhere for a local job of another machine
    that has not left word of its end.
    """
    if job.process is not None:
        if job.host not in ("", platform.node()):
            if _left_word(job) is not None:
                return None
            raise Elsewhere(job)
        return "RUNNING" if not daemons.gone(job.process) else None
    queue = slurm.queue([job.run]) if queue is None else queue
    return next((entry.state for entry in queue if entry.job == job.id), None)


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
        others = [] if job.local else [entry for entry in slurm.queue([job.run]) if entry.run == job.store]
        over = f"job {job.id} is over already; make status{job.option} shows how it ended"
        raise UserError(f"RUN={job.run}: {foreign(others[0]) if others else over}")
    with owned(job.run_dir):
        cancel_marker(job.run_dir).touch()
    if now or was != "RUNNING" or not job.start.ranks():
        end(job)
        return f"job {job.id} is cancelled; {job.make('resume')} goes on from the last checkpoint, if there is one"
    preempt(job)
    return f"job {job.id} saves a last checkpoint and ends; NOW=1 does not wait for it"


def foreign(entry: slurm.Queued) -> str:
    """In words, that a job is on a run of which another site, or another folder, knows."""
    who = f"is on it already, submitted elsewhere by {entry.user}"
    return f"job {entry.job}, {entry.state.lower()}, {who}; scancel {entry.job} ends it"


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
    nodes: str
    step: int | None
    steps: int | None
    loss: float | None
    images_s: float | None
    wait: float | None  # share of the time spent waiting for data
    left_s: float | None
    committed: int | None  # step of the newest checkpoint in the store
    committed_ago_s: float | None
    at_risk: int | None  # steps since then
    starts: int
    goodput: Goodput | None
    seconds_ago: float | None  # since the last step
    look: str  # where to look next; empty when all is well
    store: str  # the run's folder there; empty when that is not known


def statuses(site: Site, names: Sequence[str] = ()) -> list[Status]:
    """All runs of a site, or those of these names, by one call of squeue, their folders read in parallel."""
    with ThreadPoolExecutor(READERS) as pool:
        runs = [folder.name for folder in folders(site) if not names or folder.name in names]
        found = list(pool.map(partial(_job_or_why_not, site), runs))
        told, queue = "", list[slurm.Queued]()
        try:
            queue = slurm.queue([one.run for one in found if isinstance(one, Job) and not one.local])
        except slurm.SlurmError as error:
            told = str(error)

        def shown(one: Job | Status) -> Status:
            if isinstance(one, Status):
                return one
            try:
                return _unasked(status(one, queue), one, told) if told else status(one, queue)
            except Elsewhere as error:
                return _unknown(one.run, error, one.store)

        return list(pool.map(shown, found))


def _job_or_why_not(site: Site, run: str) -> Job | Status:
    try:
        return Job.of(site, run)
    except UserError as error:
        return _unknown(run, error)


def _unknown(run: str, why: UserError, store: str = "") -> Status:
    return replace(summary(run, store, "unknown", [], [], job="", nodes=""), look=str(why))


def _unasked(one: Status, job: Job, error: str) -> Status:
    """What the disk says of a run while SLURM, which knows whether its job waits or runs, does not answer."""
    sure = job.local or one.state in ("finished", "cancelled")
    return one if sure else replace(one, state="unknown", look=error)


def status(job: Job, queue: Sequence[slurm.Queued] | None = None) -> Status:
    """How a run is, from its folder on the shared disk."""
    if queue is None:
        queue = [] if job.local else slurm.queue([job.run])
    entry = next((entry for entry in queue if entry.job == job.id), None)
    told, rows, ends = history(job.run_dir), *_rows(job.run_dir)
    word = state(job, queue)
    found = summary(job.run, job.store, _in_words(job, word), told, rows, job=job.id, nodes=_nodes(job, entry))
    good = goodput(told, ends, time.time() if word == "RUNNING" else None)
    return replace(found, goodput=good, look=_where_to_look(found, job, entry, told, rows))


def summary(
    run: str, store: str, words: str, told: Sequence[Row], rows: Sequence[Row], *, job: str, nodes: str
) -> Status:
    """What a run's events and its last rows say of it. words: its state."""
    result, spent = (rows[-1]["result"], rows[-1]["run"]) if rows else ({}, {})
    step, steps, now = result.get("step"), _latest(told, "steps"), time.time()
    commits = [event for event in told if event["event"] == "committed"]
    committed = _latest(commits, "step")
    to_go = (steps - step) * _step_s(rows) if words == "running" and steps and step is not None else None
    return Status(
        run=run,
        state=words,
        job=job,
        nodes=nodes,
        step=step,
        steps=steps,
        loss=result.get("loss"),
        images_s=spent.get("images_s"),
        wait=_wait(rows),
        left_s=to_go or None,
        committed=committed,
        committed_ago_s=now - commits[-1]["time"] if commits else None,
        at_risk=None if step is None else step - min(step, committed or 0),
        starts=sum(event["event"] in ("started", "resumed") for event in told),
        goodput=None,
        seconds_ago=now - spent["time"] if "time" in spent else None,
        look="",
        store=store,
    )


def _wait(rows: Sequence[Row]) -> float | None:
    timed = [row["run"] for row in rows if "wait_s" in row["run"]]
    seconds = sum(run["step_s"] for run in timed)
    return sum(run["wait_s"] for run in timed) / seconds if seconds else None


def _step_s(rows: Sequence[Row]) -> float:
    return statistics.median(row["run"].get("step_s", 0.0) for row in rows) if rows else 0.0


def history(run_dir: Path) -> list[dict[str, Any]]:
    """What happened to a run, oldest first: the events of its training and of its jobs."""
    told = [event for path in attempt_files(run_dir, "events.jsonl") for event in read_lines(path)]
    return sorted([*told, *events(run_dir)], key=lambda event: float(event["time"]))


def _rows(run_dir: Path) -> tuple[list[Row], dict[int, tuple[End, End]]]:
    """The last rows of the newest attempt that has any, and of each attempt what its first and its last one say."""
    newest: list[Row] = []
    ends = {}
    files = attempt_files(run_dir, "metrics.jsonl")
    for path in files:
        rows = read_lines(path, TAIL_BYTES if path == files[-1] else LAST_BYTES)
        first = _first_line(path)
        if first is not None and rows:
            ends[int(path.parent.name[1:])] = (End.of(first), End.of(rows[-1]))
        newest = rows or newest
    return newest, ends


def _first_line(path: Path) -> Row | None:
    with path.open("rb") as file:
        try:
            found: Row = json.loads(file.readline())
        except ValueError:
            return None
    return found


def _nodes(job: Job, entry: slurm.Queued | None) -> str:
    return "here" if job.local else entry.nodes if entry is not None else ""


def _where_to_look(one: Status, job: Job, entry: slurm.Queued | None, told: Sequence[Row], rows: Sequence[Row]) -> str:
    """The most urgent thing, in words; empty when all is well."""
    state, _, reason = one.state.removesuffix(")").partition(" (")
    if state != "running":
        ways = {"waiting": entry.reason if entry is not None and entry.reason != "None" else ""}
        ways |= {"failed": f"{reason}; {job.make('logs')}", "cancelled": f"{job.make('resume')} goes on"}
        return ways.get(state, reason)
    heard = [one.seconds_ago, *(time.time() - event["time"] for event in told[-1:])]
    still_s = min((ago for ago in heard if ago is not None), default=math.inf)
    limit_s = max(STILL_S, MEDIANS * _step_s(rows))
    if still_s > limit_s:
        still_s = min(still_s, _began_ago(job))
    if still_s > limit_s:
        return f"no step for {still_s / 60:.0f} min: {job.make('logs')}"
    if (trouble := troubled(told)) is not None:
        return trouble
    if one.wait is not None and one.wait > WAITS:
        alone = _starved(job, rows) if (_latest(told, "ranks") or 1) > 1 else ""
        return f"waits for data {one.wait:.0%} of the time{alone}: reader.connections, cpus_per_rank"
    return ""


def _began_ago(job: Job) -> float:
    """Seconds since the last of the start's ranks left word that it is there."""
    try:
        return time.time() - job.start.folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _starved(job: Job, rows: Sequence[Row]) -> str:
    """In words, the one rank for whose images the others wait; empty when several are short of them."""
    waited = Counter[int]()
    for row in rows:
        waited[row["run"].get("wait_rank", -1)] += row["run"].get("wait_s", 0.0)
    rank, seconds = waited.most_common(1)[0]
    if rank < 0 or seconds < ALONE * waited.total():
        return ""
    host = next((f" on {one.host}" for one in job.start.ranks() if one.rank == rank), "")
    return f", most of it for rank {rank}{host}"


def troubled(told: Sequence[Row]) -> str | None:
    """The last alarm of this start, or the last save if it has not arrived, in words."""
    this_start = next((i for i in reversed(range(len(told))) if told[i]["event"] in ("started", "resumed")), 0)
    since = told[this_start:]
    save = next((event for event in reversed(since) if event["event"] in ("committed", *NOT_SAVED)), None)
    if save is not None and save["event"] in NOT_SAVED:
        return f"{save['event']}: {save['reason']}"
    return next((str(event["reason"]) for event in reversed(since) if event["event"] == "alarm"), None)


def _latest(told: Sequence[dict[str, Any]], key: str) -> Any:
    return next((event[key] for event in reversed(told) if key in event), None)


def _in_words(job: Job, word: str | None) -> str:
    if word is not None:
        return "waiting" if word == "PENDING" else word.lower()
    if (told := _left_word(job)) is not None:
        return told
    if cancel_marker(job.run_dir).exists():
        return "cancelled"
    return f"ended without a word ({job.make('resume')} goes on)"


def _left_word(job: Job) -> str | None:
    """How a job ended, in words, if it could say so."""
    outcome = job.start.outcome()
    if outcome is not None and outcome.outcome in ("finished", "cancelled"):
        return outcome.outcome
    ends = [event for event in events(job.run_dir) if event["event"] in ("submitted", "requeued", "failed")]
    return f"failed ({ends[-1]['reason']})" if ends and ends[-1]["event"] == "failed" else None
