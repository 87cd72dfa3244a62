"""What a run will take, before it runs: images a second, restarts, days.

What cannot be computed is taken from earlier runs of the same site, or assumed; each figure says which.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.site import Site
from jobs.start import attempt_files, read_lines
from pipeline.config import SAVING, Config

TAIL_BYTES = 256 * 1024  # of metrics: some hundred rows
FEW_ROWS = 5  # say nothing of a run's speed
RESTART_S = 300.0  # from the end of a start to the next one's first new step: queue, imports, checkpoint, first window


@dataclass(frozen=True)
class Speed:
    """Images a second of all ranks; `source` says in words where the number comes from."""

    images_s: float
    source: str


def speed(config: Config, site: Site, assumed: float | None = None) -> Speed | None:
    """The assumed one, else what the site's newest run of the same model, crops, precision and batch did, else the
    site's own assumption, else None."""
    if assumed is not None:
        return Speed(assumed, "assumed, as you said")
    measured = next(_measured(config, site), None)
    if measured is not None:
        return measured
    if site.images_per_s is not None:
        return Speed(site.images_per_s, f"assumed: images_per_s of SITE={site.name}")
    return None


def _measured(config: Config, site: Site) -> Iterator[Speed]:
    """Of the site's runs that compute the same, the newest first; scaled when they had another number of ranks."""
    wanted = _computed(config.dump())
    for run_dir in sorted(Path(site.shared_dir).glob("*"), key=_last_written, reverse=True):
        try:
            same = _computed(yaml.safe_load((run_dir / "config.yaml").read_text())) == wanted
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            continue
        files = attempt_files(run_dir, "metrics.jsonl")
        if not same or not files:
            continue
        rows = read_lines(files[-1], TAIL_BYTES)[1:]  # without the first one, whose time is that of starting up
        begun = [event for event in read_lines(files[-1].with_name("events.jsonl")) if "ranks" in event]
        if len(rows) >= FEW_ROWS and begun:
            ranks = int(begun[-1]["ranks"])
            images_s = statistics.median(float(row["run"]["images_s"]) for row in rows)
            scaled = "" if ranks == site.ranks else f", scaled from {ranks} ranks to {site.ranks}"
            yield Speed(images_s * site.ranks / ranks, f"measured: run {run_dir.name}{scaled}")


def _computed(config: dict[str, Any]) -> str:
    """What a step's time depends on."""
    parts = [config["model"], config["augment"]["crops"], config["train"]["precision"], config["data"]["batch"]]
    parts += [config["efficiency"].get(name, False) for name in SAVING]  # once unknown
    return json.dumps(parts, sort_keys=True)


def _last_written(run_dir: Path) -> float:
    return max((path.stat().st_mtime for path in attempt_files(run_dir, "metrics.jsonl")), default=0.0)


@dataclass(frozen=True)
class Duration:
    """How long a run takes. `seconds` with all restarts, `step_seconds` without."""

    step_seconds: float
    seconds: float
    failures: float  # to be expected
    time_limits: int  # restarts because the job's time was over


def duration(steps: int, step_s: float, every_steps: int, site: Site) -> Duration:
    """A failure costs a restart and half of what lies between two checkpoints; a time limit, only the restart."""
    bare = steps * step_s
    failures = site.nodes * site.failures_per_node_day * bare / 86_400
    limits = int(bare // (60 * site.time_limit_min))
    lost = failures * (RESTART_S + min(every_steps, steps) * step_s / 2) + limits * RESTART_S
    return Duration(bare, bare + lost, failures, limits)
