"""Tensors out of a checkpoint of any run: for an evaluation, an export, or as the beginning of another run."""

import tempfile
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline import commit
from pipeline.commit import Place
from pipeline.config import Config
from pipeline.ranks import Ranks
from pipeline.regnet import RegNet
from pipeline.snapshot import Saved

TRUNK = "model.trunk."  # what the names of its tensors begin with in a checkpoint


def fill(store: Store, place: Place, state: dict[str, Tensor], beside: Path | None = None) -> None:
    """Fill the given tensors in place from a checkpoint of the run whose folder `store` is; what else it holds is left.

    beside: the folder that has room for all of it meanwhile; by default the system's for temporary files.
    Raises commit.Damaged, and UserError when a tensor is missing or has another shape or type.
    """
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        for file in commit.read_manifest(store, place).files:
            commit.fetch(store, place, file, Path(folder))
        saved = Saved(Path(folder))
        if (mismatch := saved.mismatch(state)) is not None:
            raise UserError(f"{store.url}/{place.path}: {mismatch}; use it with the program and config that trained it")
        saved.read_into(state)


def fill_all(store: Store, place: Place, state: dict[str, Tensor], ranks: Ranks, beside: Path) -> None:
    """Fill the tensors of all ranks alike: rank 0 reads the checkpoint, the others get it over the default group.

    The tensors are on the devices that this group serves. Raises UserError on all ranks.
    """
    ranks.together(lambda: fill(store, place, state, beside) if ranks.rank == 0 else None)
    for tensor in state.values():
        sent = tensor.contiguous()  # groups send no other; weights may be channels_last
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


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
        raise UserError(f"FROM={origin}: {store.url} has no such checkpoint; there are: {_steps(places)}")
    return f"{store.url}/{wanted[0].path}"


def _steps(places: list[Place]) -> str:
    return ", ".join(str(place.step) for place in reversed(places)) or "none"


def trained_trunk(store: Store, config: Config, step: int | None = None) -> tuple[RegNet, Place]:
    """The trunk of a run and the checkpoint that it is from: the newest that is whole, or that of the step.

    store: the run's folder. Raises UserError, with the steps that there are, when there is no such checkpoint.
    """
    trunk = RegNet(config.model)
    places = commit.committed(commit.survey(store))
    for place in places:
        if step not in (None, place.step):
            continue
        try:
            fill(store, place, {TRUNK + name: tensor for name, tensor in trunk.state_dict().items()})
        except commit.Damaged:
            continue
        return trunk, place
    if not places:
        raise UserError(f"{store.url}: no checkpoint yet; make status shows how far the run is")
    wanted = "is whole" if step is None else f"of step {step} is there and whole"
    raise UserError(f"{store.url}: no checkpoint {wanted}; there are those of {_steps(places)}")
