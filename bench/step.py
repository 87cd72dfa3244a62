"""A training step beside one in the manner of SwAV's published script, and what activation checkpointing costs.

    python -m bench.step [--rounds 8]

The same RegNetY-400MF, head and prototypes, 8 images in crops of 2 x 224 + 6 x 96, fp32, one thread on one core. Ours
is the whole step, with Lightning and DDP around it; the other is a bare loop: prototypes normalised before it, one
forward for each size of crop, Sinkhorn by exponentials, a loss term at a time, and LARC parameter by parameter. They
take turns, a step each, in one process; counted is its processor time, as a busy machine changes it little.

Writes step_vs_original (the median of the rounds' ratios), step_cpu_s, original_step_cpu_s, checkpointing_cpu_time and
checkpointing_memory (with activation checkpointing, as a share of without) into var/bench.json.
"""

import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # processor time is counted; torch reads it once

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from bench.figures import keep, options
from jobs.device_memory import held_bytes
from pipeline.config import Config
from pipeline.loader import Batch
from pipeline.module import SwAV
from pipeline.net import Net
from pipeline.signals import StopRequest
from pipeline.train import Launch
from pipeline.trainer import build_trainer, quieten

IMAGES, LANES = 8, 4
LR, MOMENTUM, DECAY, TRUST, SMALL = 0.1, 0.9, 1e-6, 1e-3, 1e-8


def main() -> None:
    figures = compare(options(__doc__, rounds=8).rounds)
    keep(figures)
    sys.stdout.write(
        f"a step takes {figures['step_cpu_s']} s, one in the original manner {figures['original_step_cpu_s']} s, ratio "
        f"{figures['step_vs_original']}; activation checkpointing takes {figures['checkpointing_cpu_time']} of the time"
        f" and {figures['checkpointing_memory']} of a step's memory\n"
    )


def compare(rounds: int) -> dict[str, float]:
    """The figures, from so many steps of each."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        plain, again = config_with(False), config_with(True)
        ours, original = by_turns(plain, rounds)
        checkpointed, beside = by_turns(again, rounds)
        dist.destroy_process_group()
    slower = [each / other for each, other in zip(checkpointed, beside, strict=True)]
    ratios = [other / each for each, other in zip(ours, original, strict=True)]
    return {
        "step_vs_original": round(statistics.median(ratios), 2),
        "step_cpu_s": round(statistics.median(ours), 3),
        "original_step_cpu_s": round(statistics.median(original), 3),
        "checkpointing_cpu_time": round(statistics.median(slower) * statistics.median(ratios), 2),
        "checkpointing_memory": round(held_bytes(again, 1).step / held_bytes(plain, 1).step, 2),
    }


def config_with(checkpointing: bool) -> Config:
    return Config.model_validate(
        {
            "data": {"url": "memory://none", "batch": IMAGES, "lanes": LANES},
            "model": {"trunk": "regnety_004"},
            "swav": {"prototypes": 3000, "freeze_prototypes_steps": 0},
            "optim": {"name": "larc", "lr": LR * 256 / IMAGES, "final_lr": LR * 256 / IMAGES, "weight_decay": DECAY},
            "train": {"steps": 10_000},
            "efficiency": {"activation_checkpointing": checkpointing},
        }
    )


def by_turns(config: Config, rounds: int) -> tuple[list[float], list[float]]:
    """Processor seconds of our steps and of those of the original manner, without the first two."""
    request, launch = StopRequest(), Launch("", "", 0, 0, 1, 1, "127.0.0.1", 0)
    module = SwAV(config, range(LANES), rank=0, world_size=1, steps=10_000)
    torch.manual_seed(config.train.seed)
    turns = Turns(Original(Net(config_with(False))))
    build_trainer(config, launch, request, turns).fit(module, Batches(config, rounds + 3))
    assert module.result is not None
    assert abs(turns.original.loss - module.result.loss) < 0.05, "they do not learn alike"
    return turns.ours[2:], turns.theirs[2:-1]


class Batches:
    """The same crops again and again. Has no length, like the loader."""

    def __init__(self, config: Config, count: int) -> None:
        random = torch.Generator().manual_seed(0)
        sizes = [(crop.count, crop.size) for crop in config.augment.crops]
        crops = [torch.randn(IMAGES, n, size, size, 3, generator=random).movedim(-1, 2) for n, size in sizes]
        ids = np.arange(IMAGES)
        self.batch = Batch(0, crops, ids, ids // (IMAGES // LANES), ids, torch.zeros(IMAGES, dtype=torch.int64), 0)
        self.count = count

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.count)


class Turns(pl.Callback):
    """Between two of our steps, one of the other; `ours`: from the start of a step to that of the next, without it."""

    def __init__(self, original: "Original") -> None:
        self.original = original
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._begun: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        now = time.process_time()
        if self._begun is not None:
            self.ours.append(now - self._begun - self.theirs[-1])
        self._begun = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        begun = time.process_time()
        self.original.step(batch.crops)
        self.theirs.append(time.process_time() - begun)


class Original:
    """A step as SwAV's script takes it, on the same network."""

    def __init__(self, net: Net) -> None:
        self.net = copy.deepcopy(net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LR, momentum=MOMENTUM)
        self.loss = 0.0

    def step(self, crops: list[Tensor]) -> None:
        weight = self.net.prototypes.weight
        with torch.no_grad():
            weight.copy_(functional.normalize(weight.clone(), dim=1))
        features = [self.net.trunk(views.transpose(0, 1).flatten(0, 1).contiguous()) for views in crops]
        embeddings = self.net.head(torch.cat(features))
        scores = functional.linear(embeddings, weight).chunk(sum(views.shape[1] for views in crops))
        loss = torch.zeros(())
        for assigning in (0, 1):
            codes = by_exponentials(scores[assigning].detach())
            others = [view for place, view in enumerate(scores) if place != assigning]
            terms = [-(codes * functional.log_softmax(view / 0.1, dim=1)).sum(1).mean() for view in others]
            loss = loss + sum(terms) / len(terms) / 2
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.larc()
        self.optimizer.step()
        self.loss = loss.item()

    @torch.no_grad()
    def larc(self) -> None:
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            size, slope = parameter.norm(), parameter.grad.norm()
            if size != 0 and slope != 0:
                rate = TRUST * size / (slope + size * DECAY + SMALL)
                parameter.grad.add_(parameter, alpha=DECAY).mul_(rate)


@torch.no_grad()
def by_exponentials(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    codes = (scores / epsilon).exp().t()
    codes /= codes.sum()
    for _ in range(iterations):
        codes /= codes.sum(1, keepdim=True) * len(codes)
        codes /= codes.sum(0, keepdim=True) * codes.shape[1]
    return (codes * codes.shape[1]).t()


if __name__ == "__main__":
    main()
