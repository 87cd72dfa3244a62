"""Tensors out of a checkpoint of any run: for an evaluation, or as the beginning of another run."""

import tempfile
from pathlib import Path

from torch import Tensor

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline import commit
from pipeline.commit import Place
from pipeline.snapshot import Saved


def fill(store: Store, place: Place, state: dict[str, Tensor]) -> None:
    """Fill the given tensors in place from a checkpoint of the run whose folder `store` is; what else it holds is left.

    Raises commit.Damaged, and UserError when a tensor is missing or has another shape or type.
    """
    with tempfile.TemporaryDirectory() as folder:
        for file in commit.read_manifest(store, place).files:
            commit.fetch(store, place, file, Path(folder))
        saved = Saved(Path(folder))
        if (mismatch := saved.mismatch(state)) is not None:
            raise UserError(f"{store.url}/{place.path}: {mismatch}; use it with the program and config that trained it")
        saved.read_into(state)


def parse(url: str) -> tuple[str, Place]:
    """The folder of the run, and which of its checkpoints: of s3://runs/old/checkpoints/step-000001000-a1."""
    run, _, name = url.rstrip("/").rpartition(f"/{commit.ROOT}/")
    place = Place.parse(name)
    if not run or place is None:
        raise UserError(f"train.start_from: found {url}; valid is s3://runs/<run>/{commit.ROOT}/step-<9 digits>-a<n>")
    return run, place


def point(runs: Store, origin: str) -> str:
    """The url of the checkpoint that `run@step` means, or `run` for its newest. runs: the folder of all runs.

    Raises UserError, with the steps that there are, when there is none.
    """
    name, _, step = origin.partition("@")
    store = runs.at(name)
    places = commit.committed(commit.survey(store))
    wanted = [place for place in places if not step or str(place.step) == step]
    if not wanted:
        there = ", ".join(str(place.step) for place in reversed(places)) or "none"
        raise UserError(f"FROM={origin}: {store.url} has no such checkpoint; there are: {there}")
    return f"{store.url}/{wanted[0].path}"
