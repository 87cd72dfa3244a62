"""A rank's life with a store that is a folder: on this machine's CPU, and on its GPU where there is one."""

import gc
import resource
import shutil
import socket
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.trainer.states import TrainerStatus
from safetensors.torch import save_file

from data_shards.errors import UserError
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from pipeline import commit, pace, snapshot
from pipeline.batchnorm import GroupBatchNorm
from pipeline.commit import Place
from pipeline.config import Config
from pipeline.journal import read_events, read_metrics
from pipeline.loader import Loader
from pipeline.module import SwAV
from pipeline.net import Net
from pipeline.ranks import Ranks
from pipeline.regnet import RegNet
from pipeline.run import open_data
from pipeline.signals import StopRequest
from pipeline.train import Launch, Session, _join
from pipeline.weights import fill, fill_all
from tests.photos import write_tiles
from tests.pipeline import distributed, wandb_file
from tests.real import ranks

STEPS = 12
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("set")
    pack(write_tiles(folder / "photos", 96), Store(f"file://{folder}/shards"), PackSettings(shard_bytes=150_000))
    return f"file://{folder}/shards"


def config(tiles: str, folder: Path, **efficiency: Any) -> dict[str, Any]:
    crops = [{"size": 32, "count": 2, "scale": [0.3, 1.0]}, {"size": 16, "count": 2, "scale": [0.1, 0.3]}]
    return {
        "store": f"file://{folder}/runs",
        "data": {"url": tiles, "batch": 16, "lanes": 2, "chunk_samples": 8, "window_chunks": 4},
        "augment": {"crops": crops},
        "model": {"trunk": "custom", "w_0": 16, "w_a": 16, "w_m": 2.0, "depth": 2, "group_width": 8, "stem_width": 8},
        "swav": {"prototypes": 24, "head": [32, 16], "freeze_prototypes_steps": 3},
        "optim": {"lr": 10.0, "warmup_steps": 4},
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 5},
        "monitor": {"wandb": "disabled"},
        "efficiency": efficiency,
    }


def alone(values: dict[str, Any], folder: str) -> Session:
    """A start of the run with that folder, of one rank."""
    return Session(Config.model_validate(values), launched(values, folder), StopRequest())


def launched(values: dict[str, Any], folder: str, rank: int = 0, world_size: int = 1) -> Launch:
    """On a node a rank."""
    store, host = f"{values['store']}/{Path(folder).name}", f"node{rank}"
    return Launch(folder, store, rank, 0, 1, world_size, "127.0.0.1", 0, host)


def finish(session: Session) -> None:
    with closing(session.watchdog):
        assert session.train() == "finished"


def statuses_at_saves(rank: int, values: dict[str, Any], folder: str) -> list[str]:
    """What Lightning is about whenever the state is asked for, in a run that ends between two checkpoints."""
    seen, state = [], SwAV.state

    def watched(module: SwAV) -> dict[str, torch.Tensor]:
        seen.append(str(module.trainer.state.status.value))
        return state(module)

    SwAV.state = watched  # type: ignore[method-assign]
    finish(alone(values, folder))
    return seen


@pytest.mark.slow
def test_every_save_is_made_while_lightning_holds_the_weights_on_their_device(tiles: str, tmp_path: Path) -> None:
    """After its end they are on the host, where NCCL reaches none of them."""
    values = config(tiles, tmp_path)
    (seen,) = distributed.run(1, statuses_at_saves, values, str(tmp_path / "first"))
    assert seen == [TrainerStatus.RUNNING.value] * 3  # steps 5, 10 and 12
    assert len(Store(f"{values['store']}/first").list("checkpoints/step-000000012-a1")) > 2


def with_a_slow_rank(rank: int, values: dict[str, Any], folder: str) -> None:
    """A run of two ranks, of which the second takes longer for each layer of its trunk."""
    pace.WINDOW = 6
    if rank == 1:
        torch.nn.Conv2d.forward = slow_forward  # type: ignore[method-assign]
    finish(Session(Config.model_validate(values), launched(values, folder, rank, 2), StopRequest()))


def slow_forward(layer: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.05)
    return layer._conv_forward(x, layer.weight, layer.bias)


@pytest.mark.slow
def test_a_rank_that_is_slow_and_does_not_fail_is_named_while_training_goes_on(tiles: str, tmp_path: Path) -> None:
    values = config(tiles, tmp_path)
    distributed.run(2, with_a_slow_rank, values, str(tmp_path / "first"))
    run = Store(f"{values['store']}/first")
    (alarm,) = [event for event in read_events(run) if event["event"] == "alarm"]
    assert alarm["reason"].startswith("rank 1 on node1 is slow, ")
    assert alarm["step"] >= 6
    parts = [row["run"] for row in read_metrics(run)]
    assert [part["slow_rank"] for part in parts] == [1] * STEPS
    assert min(part["slow_factor"] for part in parts) > 1.3


def order_of_a_step(rank: int, values: dict[str, Any], folder: str) -> list[str]:
    """What is done in the third step, up to the batch of the fourth."""
    done = list[str]()

    def noted(kind: type, name: str, what: str) -> None:
        original = getattr(kind, name)
        setattr(kind, name, lambda self, *args, **more: done.append(what) or original(self, *args, **more))

    noted(Net, "finish_backward", "backward")
    noted(Loader, "_make", "batch")
    noted(torch.optim.AdamW, "step", "optimizer")
    noted(Net, "forward", "forward")
    finish(alone(values, folder))
    steps = " ".join(done).split("forward")
    assert len(steps) == 13
    return steps[3].split()


@pytest.mark.slow
def test_the_next_batch_is_made_between_backward_and_the_optimizers_step(tiles: str, tmp_path: Path) -> None:
    """There a GPU still works on what it has been given, and the host has nothing else to do."""
    values = config(tiles, tmp_path) | {"optim": {"name": "adamw", "lr": 0.001}}
    (done,) = distributed.run(1, order_of_a_step, values, str(tmp_path / "first"))
    assert done == ["batch", "backward", "optimizer"]


def garbage_of_a_rank(rank: int, values: dict[str, Any], folder: str) -> tuple[bool, int]:
    """Whether garbage is collected after a run that began without, and how many objects are left out of it."""
    gc.disable()
    finish(alone(values, folder))
    return gc.isenabled(), gc.get_freeze_count()


@pytest.mark.slow
def test_garbage_is_collected_while_training_and_not_looked_for_among_libraries(tiles: str, tmp_path: Path) -> None:
    (told,) = distributed.run(1, garbage_of_a_rank, config(tiles, tmp_path), str(tmp_path / "first"))
    collects, left_out = told
    assert collects
    assert left_out > 100_000


def finished_again(rank: int, values: dict[str, Any], folder: str) -> tuple[list[str], list[str]]:
    """What lies on the disk, and the events, when a run that has finished is started once more."""
    for _ in range(2):
        session = alone(values, folder)
        finish(session)
    left = [str(path) for path in Path(folder).rglob("*.safetensors")]
    return left, [event["event"] for event in read_events(session.store) if event["attempt"] == 2]


@pytest.mark.slow
def test_a_start_of_a_finished_run_leaves_no_checkpoint_on_the_disk_and_is_no_resume(
    tiles: str, tmp_path: Path
) -> None:
    ((left, told),) = distributed.run(1, finished_again, config(tiles, tmp_path), str(tmp_path / "again"))
    assert left == []
    assert told == ["finished"]


@dataclass(frozen=True)
class Recording(Ranks):
    """Ranks that note what they tell each other."""

    told: list[Any] = field(default_factory=list)

    def exchange(self, value: Any) -> list[Any]:
        self.told.append(value)
        return super().exchange(value)


def quarantines(rank: int, values: dict[str, Any], folder: str) -> list[Any]:
    """The quarantine at the end of a start and at that of the next, and what was exchanged in this one."""
    first = alone(values, folder)
    first.request.preempted = True
    with closing(first.watchdog):
        assert first.train() == "preempted"
    second = alone(values, folder)
    second.ranks = Recording(0, 1, None)
    with closing(second.watchdog):
        known = second.checkpoints.newest()
        assert second.train() == "finished"
    last = second.checkpoints.newest()
    assert known is not None
    assert last is not None
    return [known.extra["quarantine"], second.ranks.told, last.extra["quarantine"]]


def starts_with_wandb(rank: int, values: dict[str, Any], folder: str) -> None:
    """One that is preempted, one that finishes, and of another run one that breaks off."""
    preempted = alone(values, folder)
    preempted.request.preempted = True
    with closing(preempted.watchdog):
        assert preempted.train() == "preempted"
    finish(alone(values, folder))
    broken = alone(values | {"optim": {"name": "adamw", "lr": 1e30}}, f"{folder}-broken")
    with closing(broken.watchdog), pytest.raises(UserError, match="not finite for 3 steps"):
        broken.train()


@pytest.mark.slow
def test_wandb_shows_a_preempted_start_as_that_a_finished_one_as_finished_and_a_broken_one_as_failed(
    tiles: str, tmp_path: Path
) -> None:
    values = config(tiles, tmp_path) | {"monitor": {"wandb": "offline"}}
    distributed.run(1, starts_with_wandb, values, str(tmp_path / "run"))
    ends = [wandb_file.end(path) for path in sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))]
    assert ends == [(True, [1]), (False, [0])]
    (broken,) = (tmp_path / "run-broken").glob("wandb/offline-run-*/*.wandb")
    assert wandb_file.end(broken) == (False, [1])


def told_by_saves(rank: int, values: dict[str, Any], folder: str) -> list[Any]:
    """What is exchanged at the saves of a run that finds a bad image at its first step, and its last quarantine."""
    session = alone(values, folder)
    session.ranks = recording = Recording(0, 1, None)
    finish(session)
    last = session.checkpoints.newest()
    assert last is not None
    return [recording.told, last.extra["quarantine"]]


@pytest.mark.slow
def test_a_bad_sample_is_told_to_the_other_ranks_at_one_save_and_kept_by_all(tiles: str, tmp_path: Path) -> None:
    values = config(tiles, tmp_path)
    values["data"]["url"], sample = spoilt(tiles, tmp_path / "spoilt", values)
    ((told, last),) = distributed.run(1, told_by_saves, values, str(tmp_path / "once"))
    assert [[entry[0] for entry in save] for save in told] == [[sample], [], []]  # at steps 5, 10 and 12
    assert [entry[0] for entry in last] == [sample]


def spoilt(tiles: str, folder: Path, values: dict[str, Any]) -> tuple[str, int]:
    """A copy of the set in which an image of the first step is damaged, and its id."""
    shutil.copytree(tiles.removeprefix("file://"), folder)
    shards, order, _ = open_data(Config.model_validate(values))
    sample = int(order.batch(0)[0, 0])
    row, path = shards.table().slice(sample, 1).to_pylist()[0], folder / shards.tar(shards.locate(sample)[0])[1]
    with path.open("rb+") as tar:
        tar.seek(row["offset"])
        tar.write(b"damaged")
    return f"file://{folder}", sample


@pytest.mark.slow
def test_a_resumed_run_tells_of_no_bad_sample_twice_and_forgets_none(tiles: str, tmp_path: Path) -> None:
    values = config(tiles, tmp_path)
    values["data"]["url"], sample = spoilt(tiles, tmp_path / "spoilt", values)
    ((known, told, last),) = distributed.run(1, quarantines, values, str(tmp_path / "bad"))
    assert [entry[0] for entry in known] == [sample]
    assert told == [[]] * 3  # the saves at steps 5, 10 and 12
    assert last == known


class CountingStore(Store):
    """A store that counts the bytes that it gives."""

    given = 0

    def get(self, path: str) -> bytes:
        data = super().get(path)
        self.given += len(data)
        return data

    def download(self, path: str, local: Path) -> None:
        super().download(path, local)
        self.given += local.stat().st_size


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_two_ranks(rank: int, values: dict[str, Any], folder: str) -> dict[str, Any]:
    """What the tests below need of two ranks whose shell allows them hardly a file more, in one go."""
    port = Ranks(rank, 2, None).exchange(free_port())[0]
    dist.destroy_process_group()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 4, hard))
    launch = Launch(f"{folder}/two", f"{values['store']}/two", rank, rank, 2, 2, "127.0.0.1", port)
    parsed = Config.model_validate(values)
    _join(parsed, launch)
    session = Session(parsed, launch, StopRequest())
    with closing(session.watchdog):
        joined = session.ranks.exchange(rank)
    module = SwAV(session.config, session.lanes, rank, 2, STEPS)
    groups = [session.control, *{norm.group for norm in module.modules() if isinstance(norm, GroupBatchNorm)}]
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    return {"joined": joined, "timeouts": timeouts} | forked(session.ranks, Path(folder))


def forked(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A rank's view of a fork: what it began with, what it read, the error when a tensor does not fit."""
    store, place = CountingStore(f"file://{folder}/origin"), Place(7, 1)
    state = {"weight": torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last), "count": torch.tensor(0)}
    fill_all(lambda tensors: fill(store, place, tensors, folder), state, ranks)
    head = {"head": torch.zeros(1)}
    try:
        fill_all(lambda tensors: fill(store, place, tensors, folder), head, ranks)
    except UserError as error:
        return {"state": state, "given": store.given, "error": str(error)}
    return {}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of step 7 in `origin`, and its tensors."""
    state = {"weight": torch.arange(48.0).reshape(4, 3, 2, 2), "count": torch.tensor(5), "more": torch.ones(10_000)}
    file = folder / "rank-0.safetensors"
    snapshot.write(state, file)
    store, place = Store(f"file://{folder}/origin"), Place(7, 1)
    store.upload(file, f"{place.path}/{file.name}")
    commit.put_manifest(store, place, [commit.Part(0, 1, "f", (commit.File.of(file),))], lambda: None)
    return state


@pytest.fixture(scope="module")
def two_ranks(tiles: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    state, values = saved(folder), config(tiles, folder, timeout_s=777.0)
    return state, distributed.run(2, as_two_ranks, values, str(folder))


@pytest.mark.slow
def test_ranks_join_where_the_soft_limit_of_open_files_is_small(two_ranks: tuple[Any, list[Any]]) -> None:
    assert [seen["joined"] for seen in two_ranks[1]] == [[0, 1]] * 2


@pytest.mark.slow
def test_every_group_has_the_timeout_of_the_config(two_ranks: tuple[Any, list[Any]]) -> None:
    for seen in two_ranks[1]:
        assert len(seen["timeouts"]) > 1
        assert set(seen["timeouts"]) == {777.0}


@pytest.mark.slow
def test_a_fork_is_read_by_one_rank_for_all(two_ranks: tuple[dict[str, torch.Tensor], list[Any]]) -> None:
    state, seen = two_ranks
    for rank in seen:
        assert all(torch.equal(tensor, state[name]) for name, tensor in rank["state"].items())
        assert rank["state"]["weight"].is_contiguous(memory_format=torch.channels_last)
    assert seen[0]["given"] > 40_000
    assert seen[1]["given"] == 0


@pytest.mark.slow
def test_a_fork_that_does_not_fit_is_refused_on_all_ranks(two_ranks: tuple[Any, list[Any]]) -> None:
    assert all("it has no tensor head" in seen["error"] for seen in two_ranks[1])
    assert two_ranks[1][1]["error"].startswith("rank 0: ")


def test_more_ranks_than_a_process_may_open_files_for_are_refused_in_words(tiles: str, tmp_path: Path) -> None:
    launch = Launch("", "", 0, 0, 1, 10**9, "127.0.0.1", 0)
    with pytest.raises(UserError, match=r"3,000,000,512 open files, .* \(ulimit -Hn\)"):
        _join(Config.model_validate(config(tiles, tmp_path)), launch)


def one_step(rank: int, values: dict[str, Any], folder: str) -> None:
    finish(alone(values, folder))


@pytest.mark.slow
def test_a_run_begins_with_the_trunk_of_a_file_and_with_a_head_of_its_own(tiles: str, tmp_path: Path) -> None:
    """Seen after a step, whose rate is 0 as long as the warm-up has not begun."""
    values, origin = config(tiles, tmp_path), f"file://{tmp_path}/trunk.safetensors"
    values["train"] = {"steps": 1, "start_from": origin}
    parsed = Config.model_validate(values)
    trunk = RegNet(parsed.model)
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    distributed.run(1, one_step, values, str(tmp_path / "new"))
    store = Store(f"{values['store']}/new")
    (event,) = [event for event in read_events(store) if event["event"] == "forked"]
    assert (event["origin"], event["weights"]) == (origin, "trunk")
    torch.manual_seed(parsed.train.seed)
    fresh = Net(parsed)
    found = {name: torch.empty_like(parameter) for name, parameter in fresh.named_parameters()}
    fill(store, Place(1, 1), {f"model.{name}": tensor for name, tensor in found.items()})
    assert all(torch.equal(found[f"trunk.{name}"], parameter) for name, parameter in trunk.named_parameters())
    others = [(name, parameter) for name, parameter in fresh.named_parameters() if not name.startswith("trunk.")]
    assert all(torch.equal(found[name], parameter) for name, parameter in others)
    assert not torch.equal(found["trunk.stem.conv.weight"], fresh.trunk.stem.conv.weight)


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB\nof which 1 is free."


def out_of_memory(rank: int, values: dict[str, Any], folder: str) -> list[str]:
    """What is said of a GPU that is full at the second step, without and with activation checkpointing."""

    def full(module: SwAV, crops: list[torch.Tensor]) -> Any:
        if module.step == 1:
            raise torch.OutOfMemoryError(FULL)  # as torch does; there need be no GPU here
        return loss(module, crops)

    loss, SwAV.loss = SwAV.loss, full  # type: ignore[method-assign]
    said = []
    for checkpointing in (False, True):
        efficiency = {"activation_checkpointing": checkpointing}
        session = alone({**values, "efficiency": efficiency}, folder)
        with closing(session.watchdog), pytest.raises(UserError) as error:
            session.train()
        assert error.value.passing  # what else is on that GPU may have gone by the next start
        said.append(str(error.value))
    return said


@pytest.mark.slow
def test_a_gpu_that_is_full_is_told_in_one_line_with_what_needs_less(tiles: str, tmp_path: Path) -> None:
    ((plain, checkpointing),) = distributed.run(1, out_of_memory, config(tiles, tmp_path), str(tmp_path / "full"))
    begin, end = "the GPU is full; each of these takes less of it: ", "more ranks: " + FULL.replace("\n", " ")
    sharded = 'SET="efficiency.sharded=true"'
    assert checkpointing == f"{begin}{sharded}, {end}"
    assert plain == f'{begin}SET="efficiency.activation_checkpointing=true", {sharded}, {end}'


def rows(values: dict[str, Any], name: str, part: str = "result") -> list[dict[str, Any]]:
    return [row[part] for row in read_metrics(Store(f"{values['store']}/{name}"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision", "sharded"),
    [
        ("cpu", "fp32", False),
        *(pytest.param("cuda", p, s, marks=needs_gpu) for p in ("fp32", "bf16") for s in (False, True)),
    ],
)
def test_a_run_that_was_killed_goes_on_with_the_same_crops(
    tiles: str, tmp_path: Path, device: str, precision: str, sharded: bool
) -> None:
    values = config(tiles, tmp_path, sharded=sharded)
    values["train"]["precision"] = precision
    for name, kill in (("straight", False), ("killed", True)):
        started = ranks.start(values, tmp_path / name, 1, gpus=device == "cuda")
        if kill:
            manifest = tmp_path / "runs" / name / "checkpoints" / "step-000000005-a1" / "MANIFEST.json"
            started.wait_until(manifest.exists)
            started.kill()
            started = ranks.start(values, tmp_path / name, 1, gpus=device == "cuda")
        assert started.wait() == [0], started.tails()
    straight, killed = rows(values, "straight"), rows(values, "killed")
    assert [row["step"] for row in straight] == [row["step"] for row in killed] == list(range(1, STEPS + 1))
    for key in ("batch_hash", "crop_hash"):
        assert [row[key] for row in straight] == [row[key] for row in killed]
    losses = torch.tensor([[row["loss"] for row in run] for run in (straight, killed)])
    torch.testing.assert_close(losses[0], losses[1], rtol=0 if device == "cpu" else 0.02, atol=0)
    for spent in rows(values, "straight", "run"):
        assert spent["rss_bytes"] > 0
        assert spent.get("gpu_bytes", 0) > 0 if device == "cuda" else "gpu_bytes" not in spent
