"""The SwAV module in a real Lightning trainer: what a step changes, what it must not, and that a copy goes on alike."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.batchnorm import GroupBatchNorm
from pipeline.config import Config
from pipeline.loader import Batch
from pipeline.module import StepResult, SwAV
from pipeline.optim import lr_at
from pipeline.signals import StopRequest
from pipeline.train import Launch
from pipeline.trainer import build_trainer

B, LANES, K = 8, 4, 24
STEPS = 12
FROZEN = 3
State = dict[str, Tensor]


def config(**changed: Any) -> Config:
    sections: dict[str, Any] = {
        "data": {"url": "memory://set", "batch": B, "lanes": LANES, "chunk_samples": 4, "window_chunks": 2},
        "augment": {
            "crops": [{"size": 32, "count": 2, "scale": [0.3, 1.0]}, {"size": 16, "count": 2, "scale": [0.1, 0.3]}]
        },
        "model": {
            "trunk": "custom",
            "w_0": 16,
            "w_a": 16,
            "w_m": 2.0,
            "depth": 2,
            "group_width": 8,
            "stem_width": 8,
            "batch_norm_lanes": 2,
        },
        "swav": {
            "prototypes": K,
            "head": [32, 16],
            "queue": 16,
            "queue_from_step": 4,
            "freeze_prototypes_steps": FROZEN,
        },
        "optim": {"name": "adamw", "lr": 0.1, "warmup_steps": 4, "weight_decay": 1e-2},
        "train": {"steps": STEPS},
        "efficiency": {"deterministic": True},
        "monitor": {"log_every": 5},
    }
    for name, values in changed.items():
        sections[name] = {**sections[name], **values}
    return Config.model_validate(sections)


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def batch(step: int) -> Batch:
    random = torch.Generator().manual_seed(step)
    crops = [torch.randn(B, 2, size, size, 3, generator=random).movedim(-1, 2) for size in (32, 16)]
    lanes, ids = np.arange(B) // (B // LANES), np.arange(B)
    return Batch(step, crops, ids, lanes, ids, torch.zeros(B, dtype=torch.int64), replaced=0)


class Batches:
    """Has no length, like the loader."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Record(pl.Callback):
    """What each step gave, and a copy of the state after it (before the first one: at -1)."""

    def __init__(self, resume: tuple[int, State] | None, stop_after: int | None) -> None:
        self.resume, self.stop_after = resume, stop_after
        self.results: list[StepResult] = []
        self.rates: list[float] = []
        self.states: list[State] = []
        self.before: State = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SwAV)
        if self.resume is not None:
            pl_module.step, saved = self.resume
            fill(pl_module.state(), saved)
        self.before = copy(pl_module.state())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, SwAV)
        assert pl_module.result is not None
        self.results.append(pl_module.result)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.states.append(copy(pl_module.state()))
        pl_module.stop = pl_module.step == self.stop_after


def copy(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def fill(state: State, saved: State) -> None:
    assert list(state) == list(saved)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(saved[name])


def train(
    module: SwAV,
    batches: Sequence[Batch],
    resume: tuple[int, State] | None = None,
    stop_after: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Record:
    """Train as pipeline.train does."""
    record, launch = Record(resume, stop_after), Launch("", "", 0, 0, 1, 1, "127.0.0.1", 0)
    settings = module.config.train.model_copy(update={"precision": precision})
    config = module.config.model_copy(update={"train": settings})
    build_trainer(config, launch, StopRequest(), record).fit(module, Batches(batches))
    return record


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are compared, and the process group is gloo's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def swav(**changed: Any) -> SwAV:
    return SwAV(config(**changed), range(LANES), rank=0, world_size=1, steps=STEPS)


def different(one: State, other: State) -> list[str]:
    """Names of the tensors that are not bit for bit equal."""
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(bits(one[name]), bits(other[name]))]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_in_bf16_the_prototypes_learn_in_fp32_all_the_same() -> None:
    module, seen = swav(swav={"freeze_prototypes_steps": 0}), list[Tensor]()
    module.net.prototypes.weight.register_hook(seen.append)
    train(module, [batch(step) for step in range(2)], precision="bf16")
    rounded = [(gradient == gradient.bfloat16().float()).float().mean() for gradient in seen]
    assert len(rounded) == 2
    assert max(rounded) < 0.1, "a product in bf16 has no more bits than that"


@pytest.mark.parametrize(("lanes", "groups"), [(1, 4), (2, 2), (None, 1)])
def test_batch_norm_sees_as_many_lanes_as_the_config_says(lanes: int | None, groups: int) -> None:
    norms = [part for part in swav(model={"batch_norm_lanes": lanes}).modules() if isinstance(part, GroupBatchNorm)]
    assert {norm.parts for norm in norms} == {groups}


def test_crops_made_on_the_host_go_to_the_device_in_their_layout() -> None:
    moved = swav().transfer_batch_to_device(batch(0), torch.device("meta"), 0)
    assert all(crops.is_meta for crops in moved.crops)
    assert all(crops.flatten(0, 1).is_contiguous(memory_format=torch.channels_last) for crops in moved.crops)


LARC = {"name": "larc", "lr": 30.0, "warmup_steps": 4, "weight_decay": 1e-6}


@pytest.fixture(scope="module", params=["adamw", "larc"])
def optim(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"optim": LARC} if request.param == "larc" else {}


@pytest.fixture(scope="module")
def straight(optim: dict[str, Any], process_group: None) -> Record:
    """All steps of an undisturbed run."""
    return train(swav(**optim), [batch(step) for step in range(STEPS)])


# ---- a step


def test_every_step_changes_weights_optimizer_statistics_and_queue(straight: Record) -> None:
    assert [result.step for result in straight.results] == list(range(1, STEPS + 1))
    assert all(result.finite and np.isfinite(result.loss) for result in straight.results)
    for earlier, later in zip(straight.states[FROZEN:], straight.states[FROZEN + 1 :], strict=False):
        assert different(earlier, later) == list(later)


def test_the_learning_rate_of_each_step_is_that_of_the_schedule(straight: Record, optim: dict[str, Any]) -> None:
    settings = config(**optim).optim
    expected = [lr_at(step, settings, B, STEPS) for step in range(STEPS)]
    assert [result.lr for result in straight.results] == straight.rates == expected
    assert len(set(expected)) >= STEPS - 1  # the warm-up ends where the cosine begins


def test_usage_is_measured_at_the_steps_that_the_config_says(straight: Record) -> None:
    measured = [result.step for result in straight.results if result.prototypes_used is not None]
    assert measured == [5, 10]
    for step in measured:
        result = straight.results[step - 1]
        assert 0 < result.prototypes_used <= 1
        assert 0 < result.code_entropy <= 1


def test_frozen_prototypes_do_not_move_and_then_they_do(straight: Record) -> None:
    weights = [state["model.prototypes.weight"] for state in (straight.before, *straight.states)]
    for number in range(1, FROZEN + 1):
        assert torch.equal(weights[number], weights[0])
    assert not torch.equal(weights[FROZEN + 1], weights[0])
    momenta = [state for state in straight.states[FROZEN - 1] if state.startswith("optim.prototypes")]
    assert momenta
    assert not any(straight.states[FROZEN - 1][name].any() for name in momenta)


def test_the_rows_of_the_prototypes_have_length_1_at_each_forward(optim: dict[str, Any]) -> None:
    module = swav(**optim)
    lengths: list[Tensor] = []
    module.net.prototypes.register_forward_pre_hook(lambda layer, _: lengths.append(layer.weight.norm(dim=1)))
    train(module, [batch(step) for step in range(STEPS)])
    assert len(lengths) >= STEPS
    torch.testing.assert_close(torch.stack(lengths), torch.ones(len(lengths), K), rtol=0, atol=1e-6)


def test_after_a_stop_no_further_batch_is_trained() -> None:
    module = swav()
    record = train(module, [batch(step) for step in range(STEPS)], stop_after=2)
    assert [result.step for result in record.results] == [1, 2]
    assert module.step == 2
    assert different(record.states[-1], copy(module.state())) == []


# ---- activation checkpointing

CHECKPOINTED = {"efficiency": {"activation_checkpointing": True}}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_activation_checkpointing_changes_no_bit(optim: dict[str, Any], precision: Literal["fp32", "bf16"]) -> None:
    batches = [batch(step) for step in range(STEPS)]
    plain = train(swav(**optim), batches, precision=precision)
    again = train(swav(**optim, **CHECKPOINTED), batches, precision=precision)
    assert again.results == plain.results
    assert different(again.states[-1], plain.states[-1]) == []


def test_activation_checkpointing_keeps_what_enters_the_blocks_and_nothing_from_inside_them() -> None:
    def kept(module: SwAV) -> set[tuple[int, ...]]:
        shapes = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.add(tuple(t.shape)) or t, lambda t: t):
            module.net(batch(0).crops)
        return shapes

    block = swav().net.trunk.get_submodule("s2").b1.conv1
    inside = (2 * B, block.conv.out_channels, 8, 8)
    assert inside in kept(swav())
    assert inside not in kept(swav(**CHECKPOINTED))


def test_where_nothing_is_learned_nothing_is_computed_again() -> None:
    module = swav(**CHECKPOINTED)
    with torch.no_grad():
        assert not module.net(batch(0).crops).requires_grad


# ---- a step that is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [0, 1])
def test_a_step_that_is_not_finite_leaves_all_state_bit_for_bit_and_training_goes_on(
    straight: Record, optim: dict[str, Any], value: float, size: int
) -> None:
    planted = 6  # prototypes move and the queue is in use
    batches = [batch(step) for step in range(planted + 3)]
    batches[planted].crops[size][3, 1, 2, 5, 7] = value
    record = train(swav(**optim), batches)
    assert different(record.states[planted - 1], straight.states[planted - 1]) == []
    skipped = record.results[planted]
    assert not skipped.finite
    assert not np.isfinite(skipped.grad_norm)
    assert different(record.states[planted], record.states[planted - 1]) == []
    later = record.results[planted + 1 :]
    assert all(result.finite and np.isfinite(result.loss) for result in later)
    assert [result.step for result in later] == [planted + 2, planted + 3]
    assert "model.prototypes.weight" in different(record.states[planted + 1], record.states[planted])
    assert all(torch.isfinite(tensor).all() for tensor in record.states[-1].values())


# ---- a checkpoint's view


def test_a_module_filled_with_a_copy_of_the_state_goes_on_bit_for_bit(straight: Record, optim: dict[str, Any]) -> None:
    for at in (2, 7):  # before and after the queue and the prototypes come in
        other = swav(**optim, train={"seed": 5})  # nothing of it may come from the initial weights
        rest = train(other, [batch(step) for step in range(at, STEPS)], resume=(at, straight.states[at - 1]))
        assert different(rest.before, straight.states[at - 1]) == []
        assert rest.results == straight.results[at:]
        assert different(rest.states[-1], straight.states[-1]) == []


def test_the_state_has_a_name_for_everything_that_is_learned_and_the_queue_by_lane(straight: Record) -> None:
    names = list(straight.before)
    assert len(names) == len(set(names))
    assert {name.split(".")[0] for name in names} == {"model", "optim", "queue"}
    assert [name for name in names if name.startswith("queue")] == [f"queue.lane-{lane:03d}" for lane in range(LANES)]
    module = swav()
    learned = {f"model.{name}" for name, _ in module.net.named_parameters()}
    buffers = {f"model.{name}" for name, _ in module.net.named_buffers()}
    assert any("running_var" in name for name in buffers)
    assert learned | buffers == {name for name in names if name.startswith("model")}


# ---- the loss as a whole


def reference_codes(scores: np.ndarray[Any, Any], epsilon: float, iterations: int) -> np.ndarray[Any, Any]:
    """Appendix A of the paper, in float64: (n, K) scores -> (n, K) codes."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * K
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def test_the_loss_is_the_papers_over_the_modules_embeddings_with_the_queue_joined(straight: Record) -> None:
    module = swav()
    queue = module.queue.state()
    fill(queue, {name: straight.states[6][name] for name in queue})
    module.step = 6
    crops = batch(6).crops
    with torch.no_grad():
        loss, assigning, _, codes = module.loss(crops)
        embeddings = module.net(crops).double().numpy()
    prototypes = module.net.prototypes.weight.detach().double().numpy()
    settings = module.config.swav
    scores = embeddings @ prototypes.T
    predictions = scores / settings.temperature
    log_p = predictions - np.log(np.exp(predictions).sum(-1, keepdims=True))
    terms = []
    for view in (0, 1):
        queued = np.concatenate([lane[view] for lane in queue.values()]).astype(np.float64)
        joined = np.concatenate([scores[:, view], queued @ prototypes.T])
        assert len(joined) == B + 16
        code = reference_codes(joined, settings.epsilon, settings.iterations)[:B]
        np.testing.assert_allclose(codes[view].numpy(), code, atol=1e-5)
        terms += [-(code * log_p[:, other]).sum(-1).mean() for other in range(4) if other != view]
    assert float(loss) == pytest.approx(np.mean(terms), abs=1e-5)
    np.testing.assert_allclose(assigning.numpy(), embeddings[:, :2], atol=1e-6)
