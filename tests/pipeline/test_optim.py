"""Schedule and optimizers against their formulas in float64; state filled in place; sharded parameters."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pipeline.optim import Larc, OptimSettings, build_optimizer, lr_at, optimizer_tensors
from pipeline.swav import Prototypes, SwAVSettings
from tests.pipeline import distributed

SETTINGS = {
    "larc": OptimSettings(name="larc", weight_decay=0.01, trust=0.02),
    "adamw": OptimSettings(name="adamw", weight_decay=0.01),
}


def test_the_rate_is_that_of_the_official_schedule_at_every_step() -> None:
    settings = OptimSettings(lr=0.3, start_lr=0.01, final_lr=0.0003, warmup_steps=7)
    warm_up = np.linspace(0.01 * 4, 0.3 * 4, 7)
    t = np.arange(43)
    cosine = 0.0003 * 4 + 0.5 * (0.3 * 4 - 0.0003 * 4) * (1 + np.cos(np.pi * t / 43))
    rates = [lr_at(step, settings, 1024, 50) for step in range(50)]
    np.testing.assert_allclose(rates, np.concatenate([warm_up, cosine]), rtol=1e-12)


def test_the_rates_of_seer_come_out_at_its_batch() -> None:
    settings = OptimSettings(lr=0.3, start_lr=0.0046875, final_lr=0.0003, warmup_steps=8000)
    rates = [lr_at(step, settings, 8192, 122_000) for step in (0, 7999, 65_000, 122_000)]
    assert rates == pytest.approx([0.15, 9.6, (9.6 + 0.0096) / 2, 0.0096])


def test_a_cosine_from_the_start_of_the_run_has_gone_on_below_the_warm_up() -> None:
    """VISSL's composite of a rescaled warm-up and a fixed cosine."""
    settings = OptimSettings(lr=0.3, start_lr=0.0046875, final_lr=0.0003, warmup_steps=8000, cosine_from="start")
    rates = [lr_at(step, settings, 8192, 122_000) for step in (0, 7999, 8000, 61_000, 122_000)]
    at_its_end = 0.0096 + 0.5 * (9.6 - 0.0096) * (1 + np.cos(np.pi * 8 / 122))
    assert rates == pytest.approx([0.15, 9.6, at_its_end, (9.6 + 0.0096) / 2, 0.0096])


def test_without_a_warm_up_the_peak_comes_first() -> None:
    assert lr_at(0, OptimSettings(lr=0.6, final_lr=0.0, start_lr=0.1), 256, 10) == pytest.approx(0.6)


def test_a_run_shorter_than_its_warm_up_still_has_rates() -> None:
    rates = [lr_at(step, OptimSettings(lr=0.3, warmup_steps=20), 256, 5) for step in range(5)]
    assert rates == pytest.approx([0.3 * step / 19 for step in range(5)])


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with torch.no_grad():
        net.get_parameter("1.bias").zero_()  # a parameter of norm 0
    return net


def gradients(net: nn.Module, step: int) -> list[Tensor | None]:
    """For each parameter; none for the last before step 2 (frozen), zeros for the first at step 1."""
    random = torch.Generator().manual_seed(100 + step)
    drawn: list[Tensor | None] = [torch.randn(p.shape, generator=random) for p in net.parameters()]
    if step == 1:
        drawn[0] = torch.zeros_like(next(net.parameters()))
    if step < 2:
        drawn[-1] = None
    return drawn


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
        for parameter, gradient in zip(net.parameters(), gradients(net, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def larc_by_formula(net: nn.Module, steps: range, settings: OptimSettings) -> list[Tensor]:
    """SEER's rule in float64: scale by trust |p| / (|g| + wd |p| + eps), then plain SGD with momentum."""
    parameters = [p.detach().double() for p in net.parameters()]
    velocities = [torch.zeros_like(p) for p in parameters]
    for step in steps:
        lr = 0.5 / (1 + step)
        for i, gradient in enumerate(gradients(net, step)):
            if gradient is None:
                continue
            g, p, wd = gradient.double(), parameters[i], settings.weight_decay
            if p.norm() > 0 and g.norm() > 0:
                g = (g + wd * p) * (settings.trust * p.norm() / (g.norm() + wd * p.norm() + 1e-8))
            velocities[i] = settings.momentum * velocities[i] + g
            parameters[i] = p - lr * velocities[i]
    return parameters


def adamw_by_formula(net: nn.Module, steps: range, settings: OptimSettings) -> list[Tensor]:
    """Algorithm 2 of arXiv 1711.05101 in float64, with the usual betas."""
    parameters = [p.detach().double() for p in net.parameters()]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    seen = [0] * len(parameters)
    for step in steps:
        lr = 0.5 / (1 + step)
        for i, gradient in enumerate(gradients(net, step)):
            if gradient is None:
                continue
            g, seen[i] = gradient.double(), seen[i] + 1
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            mean, square = first[i] / (1 - 0.9 ** seen[i]), second[i] / (1 - 0.999 ** seen[i])
            parameters[i] = parameters[i] * (1 - lr * settings.weight_decay) - lr * mean / (square.sqrt() + 1e-8)
    return parameters


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_follow_the_formula_also_where_a_norm_is_zero_or_a_gradient_missing(name: str) -> None:
    net = small_net()
    expected = {"larc": larc_by_formula, "adamw": adamw_by_formula}[name](net, range(6), SETTINGS[name])
    train(net, build_optimizer(net, SETTINGS[name]), range(6))
    for (parameter, tensor), reference in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(
            tensor.detach().double(), reference, rtol=1e-5, atol=1e-6, msg=lambda m, name=parameter: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fresh_optimizer_filled_in_place_goes_on_bit_for_bit(name: str) -> None:
    straight = small_net()
    train(straight, build_optimizer(straight, SETTINGS[name]), range(6))
    first = small_net()
    optimizer = build_optimizer(first, SETTINGS[name])
    optimizer_tensors(first, optimizer)  # a save before the first step changes nothing
    train(first, optimizer, range(3))
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors(first, optimizer).items()}
    second = small_net(seed=9)
    second.load_state_dict(first.state_dict())
    optimizer = build_optimizer(second, SETTINGS[name])
    filled = optimizer_tensors(second, optimizer)
    assert filled.keys() == saved.keys()
    for key, tensor in filled.items():
        tensor.copy_(saved[key])
    train(second, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_state_is_named_after_the_parameter_it_belongs_to() -> None:
    net = small_net()
    larc = optimizer_tensors(net, build_optimizer(net, SETTINGS["larc"]))
    assert list(larc)[:2] == ["optim.0.weight.momentum_buffer", "optim.0.bias.momentum_buffer"]
    adamw = optimizer_tensors(net, build_optimizer(net, SETTINGS["adamw"]))
    assert {key for key in adamw if key.startswith("optim.2.bias.")} == {
        "optim.2.bias.exp_avg",
        "optim.2.bias.exp_avg_sq",
        "optim.2.bias.step",
    }


@pytest.mark.parametrize(
    ("mistake", "said"),
    [({"name": "sgd"}, "'larc' or 'adamw'"), ({"lr": 0}, "greater than 0"), ({"momentum": 1.0}, "less than 1")],
)
def test_a_mistake_in_the_settings_is_answered_with_what_is_right(mistake: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        OptimSettings.model_validate(mistake)


def on_a_rank(rank: int) -> dict[str, Any]:
    """LARC on parameters of which each rank holds a part, and prototypes normalised so."""
    mesh = init_device_mesh("cpu", (2,))
    net = small_net()
    parts = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in net.parameters()]
    optimizer = Larc(parts, momentum=0.9, weight_decay=0.01, trust=0.02)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
        for part, gradient in zip(parts, gradients(net, step), strict=True):
            part.grad = None if gradient is None else distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
    prototypes = Prototypes(4, SwAVSettings(prototypes=6))
    prototypes.weight = nn.Parameter(distribute_tensor(5 * prototypes.weight.detach(), mesh, [Shard(0)]))
    prototypes.normalise_()
    lengths = prototypes.weight.detach().full_tensor().norm(dim=1)
    return {"parameters": [part.detach().full_tensor() for part in parts], "lengths": lengths}


@pytest.mark.slow
def test_sharded_parameters_move_as_whole_ones() -> None:
    whole = small_net()
    train(whole, build_optimizer(whole, SETTINGS["larc"]), range(4))
    for results in distributed.run(2, on_a_rank):
        for sharded, parameter in zip(results["parameters"], whole.parameters(), strict=True):
            torch.testing.assert_close(sharded, parameter.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(results["lengths"], torch.ones(6))
