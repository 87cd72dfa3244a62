"""Faults drawn with a seed, each against a short real run on a cluster of its own. All must end as the undisturbed one.

VAR/chaos/s3, VAR/chaos/slurm   a real S3 server and a real SLURM of four nodes
VAR/chaos/jobs                  the runs' folders, with their logs
VAR/chaos/disk                  a small file system for local saves, where one can be mounted (root)
"""

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from jobs import cluster, local_s3, local_slurm, photos
from jobs.chaos.faults import FAULTS
from jobs.chaos.proxy import Proxy
from jobs.chaos.trial import SETTINGS, Scene, Trial
from jobs.site import ROOT, Site
from pipeline.config import Config, load

DATA = "s3://shards/chaos"
SHARD_BYTES = 2**20  # small, so that a small set has several
DISK_MB = 48
DISK_FAULT = "the local disk is full"


@dataclass(frozen=True)
class Row:
    """One trial. equal: its rows are those of the undisturbed run, bit for bit; `error` says what went wrong else."""

    fault: str
    moment: str
    seed: int
    recovered_s: float | None
    steps_redone: int
    equal: bool
    error: str | None = None


@contextlib.contextmanager
def scene(folder: Path, config: Config) -> Iterator[Scene]:
    """S3, SLURM and the proxy between them, up for as long as this lasts; runs save on a small disk if there is one."""
    folder = folder.resolve()
    try:
        disk = _disk(folder / "disk")
        s3 = local_s3.start_s3(folder / "s3")
        slurm = local_slurm.start_slurm(folder / "slurm", SETTINGS)
        if disk is not None:
            checkpoint = config.checkpoint.model_copy(update={"local_dir": str(disk)})
            config = config.model_copy(update={"checkpoint": checkpoint})
        with contextlib.closing(Proxy(s3.url)) as proxy:
            environment = {**s3.environment(), **slurm.environment()}
            local_s3.activate(environment)
            yield Scene(_site(folder, {**environment, "AWS_ENDPOINT_URL": proxy.url}), config, slurm, proxy, disk)
    finally:
        down(folder)


def down(folder: Path) -> None:
    """Stop what runs for a campaign in that folder, also for one that was killed; what is not there is passed over."""
    cluster.down(folder)
    if (disk := folder / "disk").is_mount():
        subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)


def _site(folder: Path, environment: dict[str, str]) -> Site:
    """Two nodes of partition `low` for each run."""
    return Site(
        name="chaos",
        shared_dir=str(folder / "jobs"),
        partition="low",
        nodes=2,
        time_limit_min=10,
        signal_delay_s=25,
        exclude_hours=0.001,  # all nodes are one machine, and the campaign kills them all
        environment=environment,
    )


def reference(scene: Scene) -> list[dict[str, Any]]:
    """The rows of a run that nothing disturbs."""
    trial = Trial(scene, f"reference-{int(time.time())}", seed=0)
    trial.finish()
    rows = trial.results()
    if [row["step"] for row in rows] != list(range(1, (scene.config.train.steps or 0) + 1)):
        raise UserError(f"{trial.run_dir}: the undisturbed run has {len(rows)} rows; its logs say why")
    return rows


def draw(count: int, seed: int, among: Sequence[str]) -> list[tuple[str, int]]:
    """Faults with a seed each: all of them by turns, in an order that the seed draws."""
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(list(among), len(among))
    return [(fault, rng.randrange(10**6)) for fault in drawn[:count]]


def possible(only: Sequence[str], disk: Path | None) -> list[str]:
    """The faults that can be had here: of `only`, or of all. Raises UserError when none can."""
    found = [name for name in only or FAULTS if disk is not None or name != DISK_FAULT]
    if not found:
        raise UserError(f"fault: {DISK_FAULT}: no small disk can be mounted here; as root one can, or take another")
    return found


def attempt(scene: Scene, fault: str, seed: int, undisturbed: list[dict[str, Any]]) -> Row:
    """Let one thing happen to one run."""
    trial = Trial(scene, f"{fault.replace(' ', '-')}-{seed}-{os.getpid()}", seed)
    moment, error = "before its moment", None
    try:
        moment = FAULTS[fault](trial)
        trial.finish()
    except UserError as problem:
        error = str(problem)
    finally:
        scene.repair()
    rows = trial.results()
    if error is None and rows != undisturbed:
        error = _difference(rows, undisturbed)
    recovered = trial.recovered_s()
    return Row(fault, moment, seed, recovered and round(recovered, 1), trial.steps_redone(), error is None, error)


def campaign(var: Path, count: int, seed: int, only: Sequence[str], tell: Callable[[str], None]) -> list[Row]:
    """Run it in VAR/chaos; rows go to VAR/chaos.json, and `tell` gets a line for each trial, as it ends.

    only: faults to draw among; by default all that can be had here. Raises UserError when it cannot begin.
    """
    unknown = set(only) - set(FAULTS)
    if unknown:
        raise UserError(f"fault: found {', '.join(sorted(unknown))}; there are: {'; '.join(FAULTS)}")
    config = load(ROOT / "conf" / "chaos.yaml", f"store=s3://runs/chaos data.url={DATA}")
    pictures = photos.prepare(var / "photos")
    with scene(var / "chaos", config) as where:
        among = possible(only, where.disk)
        pack(pictures.train, Store(DATA), PackSettings(shard_bytes=SHARD_BYTES))
        undisturbed = reference(where)
        rows: list[Row] = []
        for fault, trial_seed in draw(count, seed, among):
            rows.append(attempt(where, fault, trial_seed, undisturbed))
            (var / "chaos.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            tell(f"{len(rows)}/{count}  {line(rows[-1])}")
    return rows


def line(row: Row) -> str:
    """A trial in words."""
    recovered = "-" if row.recovered_s is None else f"{row.recovered_s:.1f} s"
    verdict = "equal" if row.equal else f"NOT EQUAL: {row.error}"
    what = f"{row.fault} ({row.moment}, seed {row.seed})"
    return f"{what}: new steps after {recovered}, {row.steps_redone} redone, {verdict}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, a line a fault: how often, recovered in (median, most), steps redone (most), how many were equal."""
    lines = ["| fault | trials | recovered in, median (most) | steps redone, most | equal |", "|---|---|---|---|---|"]
    for fault in dict.fromkeys(row.fault for row in rows):
        of = [row for row in rows if row.fault == fault]
        seconds = sorted(row.recovered_s for row in of if row.recovered_s is not None)
        times = f"{seconds[len(seconds) // 2]:.0f} s ({seconds[-1]:.0f} s)" if seconds else "-"
        equal = sum(row.equal for row in of)
        lines.append(
            f"| {fault} | {len(of)} | {times} | {max(row.steps_redone for row in of)} | {equal} of {len(of)} |"
        )
    return lines


def _difference(rows: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> str:
    steps = [row["step"] for row in rows]
    if steps != [row["step"] for row in undisturbed]:
        return f"it has {len(steps)} rows, up to step {max(steps, default=0)}; {len(undisturbed)} are right"
    first = next(i for i, row in enumerate(rows) if row != undisturbed[i])
    keys = [key for key, value in rows[first].items() if value != undisturbed[first][key]]
    return f"step {rows[first]['step']} differs in {', '.join(keys)}"


def _disk(folder: Path) -> Path | None:
    """A file system of DISK_MB in memory, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_mount():  # of a campaign that was killed
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "farseer-chaos", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    return folder if mounted else None
