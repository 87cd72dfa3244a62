"""Whether a site can do what a run will ask of it: a line for each thing, ok or what to do.

Looks from where it is called, the login node; `probe` looks from the nodes as well, by a job of its own.
"""

import getpass
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import one_line
from jobs.blame import TWICE, blamed
from jobs.site import Site

FREE_BYTES = 10e9  # of the shared disk: code snapshots, logs, rows, and checkpoints on their way
FREE_INODES = 10_000
LOOK_S, NODES_S = 60.0, 240.0  # longer than what waits for SLURM, for a store that is away; for nodes

Look = Callable[[], Iterator["Finding"]]


@dataclass(frozen=True)
class Finding:
    """`ok` None: no mistake, but worth knowing; or nothing to see from here."""

    what: str
    ok: bool | None
    says: str

    def line(self) -> str:
        return f"{ {True: 'ok  ', None: 'note', False: 'BAD '}[self.ok] }  {self.what:12}  {self.says}"


def examine(site: Site, runs: str, shards: Sequence[str] = (), probe: bool = False) -> list[Finding]:
    """runs: the folder of all runs in the store; shards: sets. The site's environment must be active."""
    from jobs.doctor_slurm import look_at_nodes, look_at_slurm
    from jobs.doctor_store import look_at_shards, look_at_store

    looks: dict[str, Look] = {"store": lambda: look_at_store(runs), "sets": lambda: look_at_shards(shards)}
    if site.executor == "slurm":
        looks["SLURM"] = lambda: look_at_slurm(site)
    looks |= {"shared disk": lambda: _disk(site), "W&B": lambda: _wandb(site), "hosts": lambda: _hosts(site)}
    if probe and site.executor == "slurm":
        looks["nodes"] = lambda: look_at_nodes(site, runs)
    else:
        looks["GPUs"] = lambda: _gpus(site)
    return list(_found(looks))


def _found(looks: Mapping[str, Look]) -> Iterator[Finding]:
    """All at once; what does not come to its end, as on a disk that does not answer, is left behind."""
    found: dict[str, list[Finding]] = {what: [] for what in looks}
    threads = {
        what: threading.Thread(target=_all, args=(look, found[what]), daemon=True) for what, look in looks.items()
    }
    begun = time.monotonic()
    for thread in threads.values():
        thread.start()
    for what, thread in threads.items():
        limit_s = NODES_S if what == "nodes" else LOOK_S
        thread.join(max(0.0, begun + limit_s - time.monotonic()))
        yield from list(found[what])
        if thread.is_alive():
            yield Finding(what, False, f"no answer for {limit_s:.0f} s")


def _all(look: Look, found: list[Finding]) -> None:
    try:
        found.extend(look())
    except Exception as error:  # noqa: BLE001 - whatever it is, a look that failed is not one that found nothing
        found.append(Finding("cannot look", False, one_line(error)))


def _disk(site: Site) -> Iterator[Finding]:
    """The shared folder: writable, whole renames, room."""
    place = Path(site.shared_dir)
    there = next(path for path in (place, *place.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding("shared disk", False, f"{place}: {getpass.getuser()} cannot write {there}; set shared_dir")
        return
    first, second = (there / f".farseer-doctor-{secrets.token_hex(4)}" for _ in range(2))
    try:
        first.write_text("new")
        second.write_text("old")
        begun = time.monotonic()
        first.replace(second)
        whole = second.read_text() == "new" and not first.exists()
        took = 1000 * (time.monotonic() - begun)
    except OSError as error:
        yield Finding("shared disk", False, f"{place} cannot be written: {error}; make room, or set shared_dir")
        return
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)
    says = f"{place} is written, and renames are whole ({took:.0f} ms)"
    if there != place:
        says += f"; it is yet to be made, in {there}: see that this is a disk that all nodes share"
    yield Finding("shared disk", whole, says if whole else f"{place}: a rename is not whole; take another shared_dir")
    room = os.statvfs(there)
    free, inodes = room.f_bavail * room.f_frsize, room.f_favail if room.f_files else None
    enough = free >= FREE_BYTES and (inodes is None or inodes >= FREE_INODES)
    says = f"{free / 1e9:,.0f} GB" + ("" if inodes is None else f" and {inodes:,} files") + f" free in {there}"
    yield Finding("disk room", enough, says if enough else f"only {says}; remove old runs' folders")


def _gpus(site: Site) -> Iterator[Finding]:
    """By nvidia-smi, where there is one."""
    elsewhere = site.executor == "slurm"
    if shutil.which("nvidia-smi") is None:
        ok = None if elsewhere or site.gpus_per_node == 0 else False
        says = "; PROBE=1 looks on the nodes" if elsewhere else ": runs go on the CPU"
        says = f"; the site's gpus_per_node is {site.gpus_per_node}" if ok is False else says
        yield Finding("GPUs", ok, f"none here{says}")
        return
    ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=8, check=False)
    cards = [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    if not cards:
        said = " ".join((done.stdout + done.stderr).split())
        yield Finding("GPUs", None if elsewhere else False, f"nvidia-smi finds none ({said}); check the driver")
        return
    enough = elsewhere or len(cards) >= site.gpus_per_node
    says = f"{len(cards)} x {cards[0]}"
    yield Finding("GPUs", enough, says if enough else f"{says}; gpus_per_node says {site.gpus_per_node}")


def _wandb(site: Site) -> Iterator[Finding]:
    """Whether a key is to be had in the job; it is not shown."""
    from pipeline.wandb_client import wandb_mode

    in_environment = bool(os.environ.pop("WANDB_API_KEY", None)) if site.executor == "slurm" else False
    if wandb_mode("auto") == "online":
        yield Finding("W&B", True, "a key is there: runs are shown online")
    elif in_environment:
        yield Finding("W&B", False, "WANDB_API_KEY does not travel to the job; `wandb login` puts the key into netrc")
    else:
        yield Finding("W&B", None, "no key: runs are recorded offline; `wandb login` puts one into netrc")


def _hosts(site: Site) -> Iterator[Finding]:
    """Those that failed lately."""
    found = blamed(Path(site.shared_dir), site.exclude_hours)
    for host, told in found.items():
        last = told[-1]
        ago = (time.time() - last["time"]) / 3600
        what = "kept out of the next start" if len(told) >= TWICE else "kept out if it fails once more"
        yield Finding(
            "host", None, f"{host}: to blame {len(told)}x, {ago:.1f} h ago in {last['run']} ({last['reason']}); {what}"
        )
    if not found:
        yield Finding("hosts", True, f"none was to blame within {site.exclude_hours:g} h")
