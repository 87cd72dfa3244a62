"""Sharded training on real ranks: the same losses and weights as replicated, checkpoints that either can go on from."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from data_shards.store import Store
from pipeline import net as net_code
from pipeline.checkpoint import Checkpointer, CheckpointSettings
from pipeline.config import Config
from pipeline.loader import Batch
from pipeline.module import SwAV
from pipeline.net import Net
from pipeline.ranks import Ranks
from pipeline.sharding import first_row, part
from pipeline.signals import StopRequest
from pipeline.snapshot import Saved, write
from pipeline.train import Launch
from pipeline.trainer import build_trainer
from pipeline.weights import fill_all
from tests.pipeline import distributed
from tests.pipeline.test_module import LANES, STEPS, B, Batches, Record, batch, config, different

SAVED, END = 6, 9
LARC = {"optim": {"name": "larc", "lr": 0.3, "trust": 0.02}}


def on(rank: int, world_size: int, batches: list[Batch]) -> list[Batch]:
    """The samples of a rank, whose lanes follow each other."""
    mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
    return [
        replace(
            one,
            crops=[crops[mine] for crops in one.crops],
            ids=one.ids[mine],
            lanes=one.lanes[mine],
            indices=one.indices[mine],
            digests=one.digests[mine],
        )
        for one in batches
    ]


def module_of(settings: Config, rank: int, world_size: int) -> SwAV:
    lanes = LANES // world_size
    return SwAV(settings, range(rank * lanes, (rank + 1) * lanes), rank, world_size, steps=STEPS)


class Attempt(Record):
    """A start of a run: loads, trains to the end, saves after the sixth step."""

    def __init__(self, checkpoints: Checkpointer) -> None:
        super().__init__(None, None)
        self.checkpoints = checkpoints
        self.loaded: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SwAV)
        if (found := self.checkpoints.newest()) is not None:
            self.checkpoints.load(found, pl_module.state())
            pl_module.step = found.step
        self.loaded = put_together(pl_module.state())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, SwAV)
        assert pl_module.result is not None
        self.results.append(pl_module.result)
        if pl_module.step == SAVED and self.checkpoints.newest() is None:
            self.checkpoints.save(SAVED, pl_module.state(), {})
            self.checkpoints.wait(30)
        self.last = put_together(pl_module.state())


def attempt(settings: Config, rank: int, world_size: int, folder: Path, steps: range) -> Attempt:
    lanes = LANES // world_size
    module = SwAV(settings, range(rank * lanes, (rank + 1) * lanes), rank, world_size, steps=STEPS)
    made = Attempt(checkpointer(folder, rank, world_size))
    launch = Launch("", "", rank, rank, world_size, world_size, "127.0.0.1", 0)
    batches = on(rank, world_size, [batch(step) for step in steps])
    build_trainer(settings, launch, StopRequest(), made).fit(module, Batches(batches))
    return made


def whole(tensor: Tensor) -> Tensor:
    """A parted tensor put together again on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_together(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).clone() for name, tensor in state.items()}


def checkpointer(folder: Path, rank: int, world_size: int) -> Checkpointer:
    return Checkpointer(
        Store(f"file://{folder}/store"), folder / "local", attempt=1, fingerprint="f", host="node1",
        ranks=Ranks(rank, world_size, dist.group.WORLD if world_size > 1 else None),
        settings=CheckpointSettings(), fence=lambda: None,
        event=lambda name, **fields: None,
    )  # fmt: skip


def both(changed: dict[str, Any]) -> dict[str, Config]:
    efficiency = {name: {"efficiency": {"sharded": name == "sharded"}} for name in ("sharded", "replicated")}
    return {name: config(**{**changed, **values}) for name, values in efficiency.items()}


def scenario(rank: int, folder: str, changed: dict[str, Any]) -> dict[str, Any]:
    """Both ways to train, and from the checkpoint of each, both ways to go on."""
    net_code.LARGE_LAYER = 2000  # some layers of the blocks are units of their own
    assert any(inner for _, *inner in Net(config()).units())
    gone: dict[str, Any] = {}
    for name, settings in both(changed).items():
        gone[name] = kept(attempt(settings, rank, 2, Path(folder) / name, range(END)))
        for other, going_on in both(changed).items():
            resumed = attempt(going_on, rank, 2, Path(folder) / name, range(SAVED, END))
            gone[f"{name}, then {other}"] = kept(resumed)
    return gone


def kept(made: Attempt) -> dict[str, Any]:
    """What is looked at; Lightning's callbacks are not pickled."""
    return {"results": made.results, "loaded": made.loaded, "last": made.last}


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With LARC, whose rates need the norms of whole tensors; tests/real has AdamW."""
    folder = tmp_path_factory.mktemp("sharded")
    of_ranks = distributed.run(2, scenario, str(folder), LARC)
    return {**of_ranks[0], "folder": folder, "changed": LARC}


@pytest.mark.slow
def test_losses_are_those_of_replicated_training(gone: dict[str, Any]) -> None:
    for ours, theirs in zip(gone["sharded"]["results"], gone["replicated"]["results"], strict=True):
        assert (ours.step, ours.lr, ours.finite) == (theirs.step, theirs.lr, theirs.finite)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)


@pytest.mark.slow
def test_the_state_has_the_same_names_and_shapes_and_begins_the_same(gone: dict[str, Any]) -> None:
    ours, theirs = gone["sharded"], gone["replicated"]
    for when in ("loaded", "last"):
        assert {n: t.shape for n, t in ours[when].items()} == {n: t.shape for n, t in theirs[when].items()}
    assert different(ours["loaded"], theirs["loaded"]) == []
    assert "model.trunk.s1.b1.conv1.conv.weight" in different(ours["loaded"], ours["last"])


@pytest.mark.slow
def test_a_sharded_run_that_is_resumed_goes_on_bit_for_bit(gone: dict[str, Any]) -> None:
    straight, resumed = gone["sharded"], gone["sharded, then sharded"]
    assert resumed["results"] == straight["results"][SAVED:]
    assert different(resumed["last"], straight["last"]) == []


@pytest.mark.slow
def test_a_checkpoint_of_either_way_is_gone_on_from_by_the_other(gone: dict[str, Any]) -> None:
    for name, other in (("sharded", "replicated"), ("replicated", "sharded")):
        same, switched = gone[f"{name}, then {name}"], gone[f"{name}, then {other}"]
        assert different(same["loaded"], switched["loaded"]) == []
        for ours, theirs in zip(switched["results"], same["results"], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


def alone(rank: int, folder: str, changed: dict[str, Any]) -> dict[str, Any]:
    return kept(attempt(both(changed)["replicated"], 0, 1, Path(folder) / "sharded", range(SAVED, SAVED + 1)))


@pytest.mark.slow
def test_a_sharded_checkpoint_of_two_ranks_is_read_by_one(gone: dict[str, Any]) -> None:
    (found,) = distributed.run(1, alone, str(gone["folder"]), gone["changed"])
    expected = gone["sharded, then sharded"]["loaded"]
    shared = {name: tensor for name, tensor in found["loaded"].items() if name in expected}
    assert len(shared) > 0.9 * len(found["loaded"])  # the second rank's lanes have queues of their own
    assert different(shared, {name: expected[name] for name in shared}) == []


def parts(rank: int) -> dict[str, Any]:
    """How an uneven tensor is parted, and what a whole one fills of it."""
    module = SwAV(both({})["sharded"], range(2 * rank, 2 * rank + 2), rank, 2, steps=STEPS)
    state = module.weights()
    uneven = dict(module.net.named_parameters())["trunk.s1.b1.se.fc1.bias"]
    wanted = {name: torch.arange(tensor.numel()).view(tensor.shape).to(tensor.dtype) for name, tensor in state.items()}

    def read(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(wanted[name])

    fill_all(read, state, Ranks(rank, 2, dist.group.WORLD))
    wrong = [name for name, tensor in state.items() if not torch.equal(whole(tensor), wanted[name])]
    held = sum(part(tensor).numel() for tensor in state.values())
    return {"wrong": wrong, "uneven": (uneven.shape[0], len(part(uneven)), first_row(uneven)), "held": held}


@pytest.mark.slow
def test_each_rank_has_some_rows_of_everything_and_whole_tensors_fill_them() -> None:
    one, other = distributed.run(2, parts)
    assert one["wrong"] == other["wrong"] == []
    rows, first, begins = one["uneven"]
    assert begins == 0
    assert other["uneven"] == (rows, rows - first, first)
    everything = sum(tensor.numel() for tensor in Net(config()).state_dict().values())
    assert 0.5 * everything <= one["held"] <= 0.6 * everything  # statistics are everyone's


def test_what_a_rank_has_nothing_of_it_does_not_write(tmp_path: Path) -> None:
    """A header says where a part begins; torch puts the parts together."""
    write({"a": torch.arange(6.0).view(3, 2), "b": torch.tensor(7.0)}, tmp_path / "0.safetensors", {"a": 0})
    write({"a": torch.arange(6.0, 10).view(2, 2)}, tmp_path / "1.safetensors", {"a": 3})
    state = {"a": torch.zeros(5, 2), "b": torch.tensor(0.0)}
    saved = Saved(tmp_path)
    assert saved.mismatch(state) is None
    assert saved.mismatch({"a": torch.zeros(6, 2)}) == "its a has the shape (5, 2), this run's has (6, 2)"
    saved.read_into(state)
    assert state["a"].flatten().tolist() == list(range(10))
    assert state["b"] == 7


def gathers(rank: int, checkpointing: bool) -> dict[str, list[str]]:
    """Of a step's backward: which units were gathered, and which of them were asked for while another was at work."""
    net_code.LARGE_LAYER = 2000
    efficiency = {"sharded": True, "activation_checkpointing": checkpointing}
    module = module_of(config(model={"depth": 4}, efficiency=efficiency), rank, 2)
    said: dict[str, list[str]] = {"gathered": [], "ahead": []}
    gather, ahead = FSDPParamGroup.unshard, FSDPParamGroup._prefetch_unshard

    def gathered(group: FSDPParamGroup, async_op: bool = False) -> None:
        if group._all_gather_result is None and not group.is_unsharded:
            said["gathered"].append(str(group._module_fqn))
        gather(group, async_op)

    def asked(group: FSDPParamGroup, *rest: Any) -> None:
        before = len(said["gathered"])
        ahead(group, *rest)
        said["ahead"] += said["gathered"][before:]

    for _ in range(2):  # the first step finds out in which order units come
        crops = [torch.rand(8, count, size, size, 3).movedim(-1, 2) for count, size in ((2, 32), (2, 16))]
        loss = module.net.prototypes(module.net(crops)).square().mean()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FSDPParamGroup, "unshard", gathered)
            patch.setattr(FSDPParamGroup, "_prefetch_unshard", staticmethod(asked))
            said["gathered"].clear()
            said["ahead"].clear()
            loss.backward()
            module.net.finish_backward()
    return said


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_backward_a_unit_is_gathered_once_for_each_size_of_crops_while_another_works(checkpointing: bool) -> None:
    said = distributed.run(2, gathers, checkpointing)[0]
    gathered, ahead = ([name for name in said[what] if "trunk" in name] for what in ("gathered", "ahead"))
    sizes = 2
    assert Counter(gathered) == dict.fromkeys(gathered, sizes)
    again = sum("conv1" in name for name in gathered) if checkpointing else 0  # the forward's first comes as a surprise
    assert len(ahead) >= len(gathered) - sizes - again
