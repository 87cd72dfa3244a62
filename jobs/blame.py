"""What a failed start says about machines: which hosts are suspect, and which stay out of the next starts.

A host that was to blame twice within some hours is excluded for as long. What is known lies on the shared disk, for all
runs of the site: <shared_dir>/hosts-<uid>.jsonl, a line for each blame, in a file of each user.
"""

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.start import Failure, Start, append_lines
from pipeline.journal import read_lines

TWICE = 2
START_LINE = "farseer: start"  # the batch script begins each start with it; its log is that of all starts
_BEGUN = re.compile(rf"{START_LINE} \d+ of job \S+ on (\S+)")
_LEFT = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: (.+)")
_LOST = re.compile(r"srun: error: .*(?:io error.*|Cannot communicate with) node (\d+)")  # by its place in the step


def log_of(start: Start) -> str:
    """What the batch script, srun and rank 0 have said in this start, "" if it did not come to its first line."""
    log = start.run_dir / "logs" / f"{start.job}_0_log.out"
    text = log.read_text(errors="replace") if log.exists() else ""
    begun = text.rfind(f"{START_LINE} {start.number} of job {start.job} ")
    return text[begun:] if begun >= 0 else ""


def last_words(log: str) -> tuple[str, str] | None:
    """The host whose rank left first, and how, by what srun said of it in a start's log; None where it said nothing."""
    found = _LEFT.search(log)
    return (found[1], found[2].strip()) if found else None


def signalled_early(log: str) -> bool:
    """Whether the first rank to leave was ended by the signal of a preemption: it did not listen yet."""
    left = last_words(log)
    return left is not None and left[1].startswith("User defined signal 2")


def lost(log: str) -> str | None:
    """The host on which srun has lost its step; ranks elsewhere are then ended by srun itself."""
    begun, found = _BEGUN.search(log), _LOST.search(log)
    hosts = begun[1].split(",") if begun else []
    return hosts[int(found[1])] if found and int(found[1]) < len(hosts) else None


def out_of_memory(log: str) -> str | None:
    """What srun said of a rank that had no memory left, None where it said nothing of the kind."""
    full = (found for found in _LEFT.finditer(log) if "Out Of Memory" in found[2])
    return next((found[0].replace("error: ", "").strip() for found in full), None)


def suspects(log: str, failures: Sequence[Failure]) -> dict[str, str]:
    """Hosts that may be to blame for the end of a start, and for each what happened, in words.

    Those that a rank names (silent in a hang); else the one that srun has lost, or whose rank left first, if it left
    without a word of its own: who can say what went wrong is not the one that broke.
    """
    named: dict[str, str] = {}
    for failure in failures:
        if failure.host not in named:  # who stood still, and wakes up as all are ended, finds the others silent
            named |= {host: str(failure) for host in failure.suspects if host not in named}
    if named or out_of_memory(log):  # too little was asked for, or too much is used
        return named
    if gone := lost(log):
        broken, how = gone, f"srun has lost {gone}: its step's daemon is gone"
    elif left := last_words(log):
        broken, how = left[0], f"a rank on {left[0]} left first, without a word ({left[1]})"
    else:
        return {}
    return {} if broken in {failure.host for failure in failures} else {broken: how}


def blame(shared_dir: Path, run: str, hosts: dict[str, str]) -> None:
    """Note the hosts for all runs of the site."""
    lines = [{"time": time.time(), "host": host, "run": run, "reason": reason} for host, reason in hosts.items()]
    if lines:
        path = shared_dir / f"hosts-{os.getuid()}.jsonl"
        append_lines(path, lines)
        with suppress(OSError):
            path.chmod(0o644)  # others read it, whatever this user's umask is


def blamed(shared_dir: Path, hours: float) -> dict[str, list[dict[str, Any]]]:
    """The hosts to blame within the last `hours`, each with what this user can read about it, the oldest first."""
    lines, since = list[dict[str, Any]](), time.time() - hours * 3600
    for path in shared_dir.glob("hosts-*.jsonl"):
        with suppress(OSError):
            lines += filter(_is_blame, read_lines(path))
    found: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: float(line["time"])):
        if line["time"] > since:
            found.setdefault(line["host"], []).append(line)
    return found


def _is_blame(line: dict[str, Any]) -> bool:
    """Other users, and other versions of this program, write these files too."""
    words = all(isinstance(line.get(name), str) for name in ("host", "run", "reason"))
    return words and isinstance(line.get("time"), int | float)


def excluded(shared_dir: Path, hours: float) -> list[str]:
    """Hosts that were to blame twice within the last `hours`, the worst first."""
    times = {host: len(told) for host, told in blamed(shared_dir, hours).items() if len(told) >= TWICE}
    return sorted(times, key=times.__getitem__, reverse=True)


def kind(message: str) -> str:
    """What sort of trouble a failure is, in the words of the runbook."""
    return next((name for name, pattern in _KINDS if re.search(pattern, message, re.IGNORECASE)), "unknown")


_KINDS = (
    (
        "out of memory",
        r"out ?of ?memory|\boom|MemoryError|cannot allocate|allocation failed|by signal 9|\(Killed\)",
    ),
    ("hang", r"stood still"),
    ("time", r"time limit|asked to stop"),
    ("disk", r"No space left|Errno 28|Read-only file system|Errno 30"),
    ("store", r"s3://|not committed|did not answer"),
    ("not finite", r"not finite|nan\b"),
    ("collective", r"gloo|nccl|connection (closed|reset)|timed out"),
    ("node", r"bad host|node failure|srun has lost|Bus error|CUDA (runtime API |driver API )?error|ECC|uncorrectable"),
)
