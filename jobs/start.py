"""One start of a job: a folder on the shared disk in which ranks and supervisor leave word for each other.

    <run>/job.json                       the run's newest job (jobs.runs)
    <run>/jobs.jsonl                     submitted, requeued, failed, ...: what happened to the run's jobs
    <run>/cancel                         there while a cancel is asked for: save, then end without a requeue
    <run>/profile                        there while a profile is asked for (jobs.profile)
    <run>/starts/<job>-<number>/         number counts the requeues of that job
        rank-0001.json                   who runs it: host, process
        failure-0001.json                why it left, written by a rank that still could
        preflight-node1.json             a node that is fit (jobs.preflight)
        outcome.json                     finished, preempted, terminated or cancelled, written by rank 0

Everything here is small, local and without secrets; what a run learned is in the store.
"""

import json
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_shards.errors import UserError, lacks_library, may_pass
from data_shards.whole import write_whole
from jobs.daemons import Process
from pipeline.journal import append_whole, attempt_folders, read_lines

Word = TypeVar("Word")

CODE_ERROR = 1  # the exit code that stands for an error of the code


@dataclass(frozen=True)
class RankRecord:
    """A rank that was started: on which host, as which process (see jobs.daemons.Process), with which log."""

    rank: int
    host: str
    pid: int
    started: int
    log: str

    @property
    def process(self) -> Process:
        return Process(self.pid, self.started)


@dataclass(frozen=True)
class Failure:
    """Why a rank left. `exit_code` is set for an error of the config or the code: trying again would not help.

    suspects: hosts that are to blame, as far as the error tells.
    """

    rank: int
    host: str
    time: float
    message: str
    trace: str
    exit_code: int | None
    suspects: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = self.message if self.exit_code is not None else textwrap.shorten(self.message, 160, placeholder=" ...")
        return f"rank {self.rank} on {self.host}: {said}"


@dataclass(frozen=True)
class Outcome:
    """How a start ended, when it ended well. `requeued`: SLURM has been asked to start it again."""

    outcome: str
    requeued: bool = False


@dataclass(frozen=True)
class Start:
    """The `number`-th start of `job`."""

    run_dir: Path
    job: str
    number: int

    @classmethod
    def here(cls) -> "Start":
        """The start that this process belongs to, from what the job's script has set."""
        return cls(
            Path(os.environ["FARSEER_RUN_DIR"]), os.environ["FARSEER_JOB"], int(os.environ.get("FARSEER_START", "0"))
        )

    @property
    def folder(self) -> Path:
        return self.run_dir / "starts" / f"{self.job}-{self.number}"

    @property
    def cancelled(self) -> bool:
        return cancel_marker(self.run_dir).exists()

    def begin(self, rank: int, log: str) -> None:
        """Leave word who runs this rank, and where it writes."""
        process = Process.of(os.getpid())
        record = RankRecord(rank, this_host(), os.getpid(), process.started if process else -1, log)
        write_json(self.folder / f"rank-{rank:04d}.json", asdict(record))

    def fail(self, rank: int, error: BaseException) -> None:
        """Leave word why this rank leaves."""
        code = None if may_pass(error) else getattr(error, "exit_code", CODE_ERROR)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        suspects = (this_host(),) if lacks_library(error) else tuple(getattr(error, "hosts", ()))
        failure = Failure(rank, this_host(), time.time(), f"{kind}{error}", trace, code, suspects)
        write_json(self.folder / f"failure-{rank:04d}.json", asdict(failure))

    def end(self, outcome: str, requeued: bool = False) -> None:
        """Leave word how the start ended."""
        write_json(self.folder / "outcome.json", asdict(Outcome(outcome, requeued)))

    def ranks(self) -> list[RankRecord]:
        return read_all(self.folder, "rank-*", RankRecord)

    def failures(self) -> list[Failure]:
        """What the ranks said when they failed, the first one first."""
        return sorted(read_all(self.folder, "failure-*", Failure), key=lambda failure: failure.time)

    def outcome(self) -> Outcome | None:
        found = read_all(self.folder, "outcome", Outcome)
        return found[0] if found else None

    def note(self, event: str, **fields: Any) -> dict[str, Any] | None:
        """Append an event of this start to the run's jobs.jsonl; returns it if the disk does not take it."""
        return note(self.run_dir, event, job=self.job, start=self.number, **fields)


def this_host() -> str:
    """The name by which SLURM knows it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def newest_start(run_dir: Path, job: str) -> Start:
    """The last start of a job; number 0 when none has begun."""
    numbers = [int(path.name.rpartition("-")[2]) for path in (run_dir / "starts").glob(f"{job}-*")]
    return Start(run_dir, job, max(numbers, default=0))


def note(run_dir: Path, event: str, **fields: Any) -> dict[str, Any] | None:
    """Append an event to the run's jobs.jsonl; returns one that the disk does not take: the job goes its way."""
    line = {"time": time.time(), "attempt": newest_attempt(run_dir), "event": event, **fields}
    return None if append_lines(run_dir / "jobs.jsonl", [line]) else line


def events(run_dir: Path) -> list[dict[str, Any]]:
    """The events of the run's jobs, oldest first."""
    return read_lines(run_dir / "jobs.jsonl")


def attempt_files(run_dir: Path, name: str) -> list[Path]:
    """The files of that name that the run's attempts left here, the oldest attempt's first."""
    return [path for folder in attempt_folders(run_dir).values() if (path := folder / name).exists()]


def newest_attempt(run_dir: Path) -> int:
    """The highest attempt that has left a folder `a<number>` here, 0 before the first."""
    return max(attempt_folders(run_dir), default=0)


def cancel_marker(run_dir: Path) -> Path:
    return run_dir / "cancel"


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> bool:
    """As JSON, one each; whether the disk takes them. What it does not take goes to stderr."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        append_whole(path, text.encode())
    except OSError as error:
        sys.stderr.write(f"farseer: not written, {error}: {text}")
        return False
    return True


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all: others read while we write."""
    write_whole(path, json.dumps(values))


def read_all(folder: Path, name: str, kind: type[Word]) -> list[Word]:
    """What was left there as <name>.json, a pattern, in the order of names."""
    return [kind(**json.loads(path.read_text())) for path in sorted(folder.glob(f"{name}.json"))]
