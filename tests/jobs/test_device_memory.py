"""What is said of a device's memory, against what torch's allocator hands out in a real step."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jobs.device_memory import GATHERED, held_bytes
from pipeline.config import Config, load
from pipeline.net import Net
from pipeline.sharding import gather_ahead, shard
from tests.pipeline import distributed

IMAGES = 16


def config(**changed: str) -> Config:
    sets = {"data.batch": IMAGES, "data.lanes": 4, "swav.queue": 0, **changed}
    return load("conf/demo.yaml", [f"{key}={value}" for key, value in sets.items()])


def most_allocated(config: Config) -> int:
    """Bytes at once, of what a step makes on this machine's CPU."""
    torch.manual_seed(0)
    net = Net(config)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return most_in_a_step(net, config, IMAGES)


def most_in_a_step(net: Net, config: Config, images: int) -> int:
    crops = [torch.rand(images, c.count, c.size, c.size, 3) for c in config.augment.crops]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        taken = [each.clone().movedim(-1, 2) for each in crops]
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16", cache_enabled=False):
            loss = net.prototypes(net(taken)).float().log_softmax(-1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        net.finish_backward()
    now = most = 0
    events: Any = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_step_takes_what_was_said(precision: str, checkpointing: str) -> None:
    changed = config(**{"train.precision": precision, "efficiency.activation_checkpointing": checkpointing})
    native = precision == "fp32" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    near = 0.03 if native else 0.1  # an older CPU's convolutions of bf16 work on copies in fp32
    assert held_bytes(changed, 1).step == pytest.approx(most_allocated(changed), rel=near)


@pytest.mark.slow
def test_ranks_share_the_images_and_not_the_model() -> None:
    alone, shared = held_bytes(config(), 1), held_bytes(config(), 4)
    assert (shared.checkpoint, shared.model) == (alone.checkpoint, alone.model)
    assert shared.step == pytest.approx(alone.step / 4, rel=0.1)


@pytest.mark.slow
def test_the_optimizer_copies_the_gradients_where_that_is_more_than_a_step_takes() -> None:
    few = config(**{"swav.prototypes": "100000"})
    assert held_bytes(few, IMAGES).step >= 4 * 100_000 * 128


@pytest.mark.slow
def test_where_a_model_is_sharded_each_rank_has_its_part_and_some_units_at_a_time() -> None:
    plain, sharded = held_bytes(config(), 2), held_bytes(config(**{"efficiency.sharded": "true"}), 2)
    assert sharded.checkpoint == plain.checkpoint
    assert sharded.model == pytest.approx(plain.model / 2, rel=0.01)
    units = [sum(4 * p.numel() for p in unit.parameters()) for (unit,) in Net(config()).units()]
    assert GATHERED * max(units) < sharded.step < plain.step + GATHERED * max(units)


def of_a_sharded_step(rank: int, sets: dict[str, str]) -> int:
    """Bytes at once of what a step makes on this rank, its part of the gradients among them."""
    torch.set_num_threads(1)
    changed = config(**sets)
    net = Net(changed)
    units = net.units()
    shard(net, units, 2)
    gather_ahead(units[:-2], net.head)
    for _ in range(2):  # the first forward finds out in which order units come
        for parameter in net.parameters():
            parameter.grad = None
        most = most_in_a_step(net, changed, IMAGES // 2)
    return most


@pytest.mark.slow
def test_a_sharded_step_takes_no_more_than_was_said_and_not_much_less() -> None:
    sets = {"train.precision": "bf16", "efficiency.sharded": "true", "model.depth": "10"}
    said = held_bytes(config(**sets), 2)
    gradients = sum(2 * parameter.numel() for parameter in Net(config(**sets)).parameters())
    for measured in distributed.run(2, of_a_sharded_step, sets):
        assert 0.75 * said.step < measured - gradients < said.step
