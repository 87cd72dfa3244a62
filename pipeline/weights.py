"""Tensors out of a checkpoint of any run: for an evaluation, an export, or as the beginning of another run.

A run may also begin with a trunk from a file made elsewhere, which pipeline.pretrained reads.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline import commit, pretrained
from pipeline.commit import Place
from pipeline.config import Config
from pipeline.ranks import Ranks
from pipeline.regnet import RegNet
from pipeline.sharding import is_parted, spread
from pipeline.snapshot import Saved

_AT_A_STEP = re.compile(r"\w+://.+@\d+")  # a run in another folder of runs
TRUNK = "model.trunk."  # what the names of its tensors begin with in a checkpoint


def fill(store: Store, place: Place, state: dict[str, Tensor], beside: Path | None = None) -> None:
    """Fill the given tensors in place from a checkpoint of the run whose folder `store` is; what else it holds is left.

    beside: the folder that has room for all of it meanwhile; by default the system's for temporary files.
    Raises commit.Damaged, and UserError when that folder has no room, or a tensor is missing or has another shape or
    type.
    """
    files = commit.read_manifest(store, place).files
    _check_room(f"{store.url}/{place.path}", sum(file.size for file in files), beside)
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        for file in files:
            commit.fetch(store, place, file, Path(folder))
        saved = Saved(Path(folder))
        if (mismatch := saved.mismatch(state)) is not None:
            raise UserError(f"{store.url}/{place.path}: {mismatch}; use it with the program and config that trained it")
        saved.read_into(state)


def _check_room(checkpoint: str, needed: int, beside: Path | None) -> None:
    """A disk that fills up on the way would be told as an error of the store's object."""
    folder = beside or Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(folder).free) < needed:
        elsewhere = "TMPDIR=... is a folder elsewhere (of a site: environment: {TMPDIR: ...})"
        raise UserError(
            f"{folder}: has {free / 1e9:,.1f} GB free, and {checkpoint} takes {needed / 1e9:,.1f} GB meanwhile; "
            + ("make room there" if beside else elsewhere)
        )


def fill_all(read: Callable[[dict[str, Tensor]], None], state: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill the tensors of all ranks alike: `read` fills them on rank 0, the others get them over the default group.

    The tensors are on the devices that this group serves. What `read` raises is raised on all ranks.
    """
    filled: dict[str, Tensor] = {}
    if ranks.rank == 0:
        filled = {name: torch.empty(t.shape, dtype=t.dtype) if is_parted(t) else t for name, t in state.items()}
    ranks.first(lambda: read(filled))
    for name, tensor in state.items():
        if is_parted(tensor):
            spread(filled.pop(name, None), tensor)
        else:
            sent = tensor.contiguous()  # groups send no other; weights may be channels_last
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


def begin(config: Config, state: dict[str, Tensor], ranks: Ranks, beside: Path) -> Literal["all", "trunk"]:
    """Fill the network of a new run on all ranks with what `train.start_from` names; returns how much of it.

    state: as SwAV.weights gives it. Of a file made elsewhere only the trunk is taken: head and prototypes are left as
    they are. beside: a folder with room for the file. Raises UserError on all ranks.
    """
    origin = str(config.train.start_from)
    if (checkpoint := parse(origin)) is not None:
        run, place = checkpoint
        fill_all(lambda tensors: fill(Store(run), place, tensors, beside), state, ranks)
        return "all"
    trunk = {name.removeprefix(TRUNK): tensor for name, tensor in state.items() if name.startswith(TRUNK)}
    fill_all(lambda tensors: pretrained.fill(origin, tensors, config.model.trunk, beside), trunk, ranks)
    return "trunk"


def check_origin(config: Config, retry_seconds: float) -> None:
    """Raise UserError where little reading shows that `begin` would. retry_seconds: for a store that is silent."""
    origin = str(config.train.start_from)
    if (checkpoint := parse(origin)) is None:
        pretrained.check(origin, config.model, retry_seconds)
        return
    run, place = checkpoint
    try:
        commit.read_manifest(Store(run, retry_seconds=retry_seconds), place)
    except commit.Damaged as error:
        raise UserError(f"{run}/{error}") from None


def keep_origin(config: Config, run: str) -> None:
    """Have the run that `train.start_from` names a checkpoint of keep it for `run`, as it keeps evaluated ones.

    Raises UserError where its folder cannot be written to.
    """
    if (checkpoint := parse(str(config.train.start_from))) is not None:
        origin, place = checkpoint
        Store(origin).put(f"eval/step-{place.step:09d}/begins-{run}", b"")


def parse(url: str) -> tuple[str, Place] | None:
    """The folder of the run, and which of its checkpoints: of s3://runs/old/checkpoints/step-000001000-a1.

    None when it is no checkpoint's url.
    """
    run, _, name = url.rstrip("/").rpartition(f"/{commit.ROOT}/")
    place = Place.parse(name)
    return (run, place) if run and place else None


def point(runs: Store, origin: str) -> str:
    """The url of what FROM= names: `run@step`, `run` for its newest checkpoint, a checkpoint, a file or a folder.

    runs: the folder of all runs; a run in another is named by its url, with @step behind it. Raises UserError, with the
    steps that there are, when there is no such checkpoint.
    """
    if parse(origin) is not None:
        return origin
    if pretrained.is_place(origin) and not _AT_A_STEP.fullmatch(origin):
        return pretrained.located(origin)
    name, _, step = origin.partition("@") if "://" not in origin else origin.rpartition("@")
    store = Store(name) if "://" in name else runs.at(name)
    places = commit.committed(commit.survey(store))
    wanted = [place for place in places if not step or str(place.step) == step]
    if not wanted:
        there = f"{store.url} has no such checkpoint; there are: {commit.steps(places)}"
        raise UserError(f"FROM={origin}: {there}; a run of another store is FROM=s3://bucket/runs/name@step")
    return f"{store.url}/{wanted[0].path}"


def trained_trunk(store: Store, config: Config, step: int | None = None) -> tuple[RegNet, Place]:
    """The trunk of a run and the checkpoint that it is from: the newest that is whole, or that of the step.

    store: the run's folder. Raises commit.Damaged when the step's is not whole, and UserError when there is no such
    checkpoint, with the steps that there are.
    """
    places, trunk = commit.existing(store, step), RegNet(config.model)
    for place in places:
        try:
            fill(store, place, {TRUNK + name: tensor for name, tensor in trunk.state_dict().items()})
        except commit.Damaged:
            continue
        return trunk, place
    if step is None:
        raise UserError(f"{store.url}: no checkpoint is whole; there are those of {commit.steps(places)}")
    others = commit.steps(place for place in commit.existing(store) if place.step != step)
    raise commit.Damaged(f"{store.url}: the checkpoint of step {step} is damaged; STEP= takes another: {others}")
