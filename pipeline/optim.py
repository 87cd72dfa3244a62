"""The optimizers and the learning rate of each step.

Rates in the settings are for 256 images and grow with the batch. Sources: SwAV (arXiv 2006.09882), LARC
(arXiv 1708.03888), decoupled weight decay (arXiv 1711.05101).
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.profiler import record_function

from data_shards.section import Section
from pipeline.sharding import is_parted, norm_of_parts, part


class OptimSettings(Section):
    """LARC over SGD, as in SwAV and SEER; AdamW for small trunks, which leave the plateau at ln K sooner with it."""

    name: Literal["larc", "adamw"] = "larc"
    lr: PositiveFloat = 0.3  # the peak; like the two others per 256 images, multiplied by the global batch / 256
    start_lr: NonNegativeFloat = 0.0  # at step 0, when there is a warm-up
    final_lr: NonNegativeFloat = 0.0003  # at the end of the cosine
    warmup_steps: NonNegativeInt = 0
    cosine_from: Literal["warmup", "start"] = "warmup"  # its end, as official SwAV; start: the run's, as SEER
    weight_decay: NonNegativeFloat = 1e-6  # on all parameters, batch norm and biases too
    momentum: float = Field(0.9, ge=0, lt=1)  # larc only
    trust: PositiveFloat = 1e-3  # larc only: its eta


def lr_at(step: int, settings: OptimSettings, batch: int, steps: int) -> float:
    """The learning rate of a step (counted from 0) in a run of `steps` steps with `batch` images a step, all ranks'.

    Linear from the first to the last step of the warm-up, then a cosine that would reach the final rate at `steps`. One
    from the run's start has gone on below the warm-up: the rate drops where that ends.
    """
    start, peak, final = (rate * batch / 256 for rate in (settings.start_lr, settings.lr, settings.final_lr))
    if step < settings.warmup_steps:
        return start + (peak - start) * step / max(1, settings.warmup_steps - 1)
    begun = settings.warmup_steps if settings.cosine_from == "warmup" else 0
    done = (step - begun) / max(1, steps - begun)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * done))


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of all parameters of the module, in one group whose "lr" is set from `lr_at` before each step."""
    if settings.name == "larc":
        return Larc(module.parameters(), settings.momentum, settings.weight_decay, settings.trust)
    return torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=settings.weight_decay)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under the names of the module's parameters, `optim.<parameter>.<what>`, to save or to fill.

    State that the first step would make is made here, as that step would find it, so that a fresh optimizer has all
    the tensors that a resume fills in place.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state.update(_fresh_state(optimizer, parameter))
        tensors.update({f"optim.{name}.{what}": tensor for what, tensor in sorted(state.items())})
    return tensors


class Larc(torch.optim.Optimizer):
    """SGD with momentum, each parameter at its own rate: layer-wise adaptive rate control without clipping.

    The gradient with weight decay is scaled by trust |p| / (|g| + weight_decay |p| + 1e-8); where a norm is 0, the
    gradient stays as it is. Nothing is left out. Norms of sharded parameters are those of the whole, and no step waits
    for the device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float, weight_decay: float, trust: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure, which would evaluate the loss again
        """Moves the parameters that have a gradient."""
        for group in self.param_groups:
            if moving := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._move(moving, [parameter.grad for parameter in moving], group)

    def _move(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, float]) -> None:
        """Of all at once: a kernel for each small operation on each parameter would keep a GPU waiting for the host.

        Only the products with LARC's own numbers, which never leave the device, are made parameter by parameter.
        """
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(_fresh_state(self, parameter))
        decays, rates = _larc(parameters, gradients, group["weight_decay"], group["trust"])
        held = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        weights, slopes, velocities = (list(map(part, tensors)) for tensors in (parameters, gradients, held))
        scaled = torch._foreach_mul(weights, decays)
        torch._foreach_add_(scaled, slopes)
        torch._foreach_mul_(scaled, rates)
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, scaled)
        torch._foreach_add_(weights, velocities, alpha=-group["lr"])


def _larc(
    parameters: list[Tensor], gradients: list[Tensor], weight_decay: float, trust: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each parameter the weight decay that applies to it, and its rate."""
    sizes, slopes = _norms(parameters), _norms(gradients)
    adapts = (sizes > 0) & (slopes > 0)
    rates = torch.where(adapts, trust * sizes / (slopes + weight_decay * sizes + 1e-8), 1.0)
    return list((weight_decay * adapts).unbind()), list(rates.unbind())


@record_function("gradient norm")
def total_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, (), on the device. A collective where they are parted."""
    norm = nn.utils.get_total_norm([part(gradient) for gradient in gradients])
    return norm_of_parts(norm) if is_parted(gradients[0]) else norm


def _norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norms, of the whole tensors where a rank holds a part."""
    norms = torch.stack(torch._foreach_norm(list(map(part, tensors))))
    return norm_of_parts(norms) if is_parted(tensors[0]) else norms


def _fresh_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, Larc):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(0.0), **averages}
