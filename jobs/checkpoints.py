"""The checkpoints of a run: those in the store, and what lies on this disk and has not got there."""

import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_shards.store import Store
from jobs.runs import Job, history
from pipeline import commit
from pipeline.commit import Place


@dataclass(frozen=True)
class Stored:
    """`where`: its folder. `state`: committed, not committed, verified, damaged, or on this disk only."""

    step: int
    attempt: int
    age_s: float | None  # since it was committed, where this site's events tell
    bytes: int
    where: str
    state: str
    damage: str | None = None


def checkpoints(job: Job, verify: bool = False) -> list[Stored]:
    """Oldest first. verify: read and hash every byte of those that are committed."""
    store = Store(job.store)
    told = {(e["step"], e["attempt"]): e["time"] for e in history(job.run_dir) if e["event"] == "committed"}
    found = []
    for place, objects in sorted(commit.survey(store).items()):
        state, damage = "committed" if commit.MANIFEST in objects else "not committed", None
        if verify and state == "committed":
            damage = commit.damage(store, place)
            if damage and not store.exists(f"{place.path}/{commit.MANIFEST}"):
                continue  # an old one, which its run has deleted meanwhile
            state = "damaged" if damage else "verified"
        at = told.get((place.step, place.attempt))
        age_s = None if at is None else time.time() - at
        where = f"{store.url}/{place.path}"
        found.append(Stored(place.step, place.attempt, age_s, sum(objects.values()), where, state, damage))
    sure = {(one.step, one.attempt) for one in found if one.state != "not committed"}
    return sorted([*found, *_here(job, sure)], key=lambda one: (one.step, one.attempt, one.where))


def _here(job: Job, sure: set[tuple[int, int]]) -> list[Stored]:
    """What ranks of this host saved and the store does not have whole; the next start sends it."""
    found = []
    for folder in (_local_root(job) / commit.local_folder(job.store)).glob("step-*"):
        place = Place.parse(folder.name)
        if place is not None and (place.step, place.attempt) not in sure:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(Stored(place.step, place.attempt, None, size, str(folder), "on this disk only"))
    return found


def _local_root(job: Job) -> Path:
    try:
        config = yaml.safe_load((job.run_dir / "config.yaml").read_text())
        return Path(config["checkpoint"]["local_dir"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError):  # not set: in the run's folder
        return job.run_dir / "checkpoints"
