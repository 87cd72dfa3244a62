"""SwAV on a RegNet as a Lightning module: one training step, read from top to bottom like the paper's pseudo-code.

Its state is a dict of named tensors (weights, optimizer, queue by lane), the same on any number of ranks.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.profiler import record_function

from pipeline.batchnorm import average_running_statistics, commit_statistics, convert
from pipeline.config import Config
from pipeline.loader import Batch
from pipeline.net import Net
from pipeline.optim import build_optimizer, lr_at, optimizer_tensors, total_norm
from pipeline.sharding import gather_ahead, shard
from pipeline.swav import ASSIGNING, Queue, prototype_usage, sinkhorn, swav_loss


@dataclass(frozen=True)
class StepResult:
    """What one step gave on this rank; gradients, and with them the norm and `finite`, are equal on all ranks."""

    step: int  # counted from 1
    loss: float
    lr: float
    grad_norm: float
    finite: bool
    prototypes_used: float | None = None  # share of the prototypes, 0 to 1; None where it was not measured
    code_entropy: float | None = None  # mean of the codes', as a share of ln K


class SwAV(pl.LightningModule):
    """lanes: those of this rank; steps: of the whole run. The process group must be there."""

    def __init__(self, config: Config, lanes: range, rank: int, world_size: int, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.steps = config, steps
        torch.manual_seed(config.train.seed)
        self.net = Net(config)
        group_lanes = config.model.batch_norm_lanes or config.data.lanes
        timeout = config.efficiency.timeout
        convert(self.net, lanes=len(lanes), rank=rank, world_size=world_size, group_lanes=group_lanes, timeout=timeout)
        if config.efficiency.sharded:
            units = self.net.units()
            shard(self.net, units, world_size)
            gather_ahead(units[:-2], self.net.head)
        else:
            self.net.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub has it not
        self.queue = Queue(config.swav, lanes, config.data.lanes, self.net.head.width)
        self.step = 0  # steps done
        self.stop = False  # set at a batch boundary: the next batch is not trained
        self.result: StepResult | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.net, self.config.optim)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.stop else None

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return replace(batch, crops=[crops.to(device, non_blocking=True) for crops in batch.crops])

    def loss(self, crops: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss (section 3.1), the assigning views' embeddings (B, 2, D), scores (B, 2, K) and codes (2, B, K)."""
        settings, prototypes = self.config.swav, self.net.prototypes
        embeddings = self.net(crops)
        scores = prototypes(embeddings)
        assigning = embeddings[:, :ASSIGNING].detach()
        with torch.no_grad():
            views = range(ASSIGNING)
            earlier = [prototypes(self.queue.samples(view, self.step)) for view in views]
            joined = torch.stack([torch.cat([scores[:, view], earlier[view]]) for view in views])
            codes = sinkhorn(joined, settings.epsilon, settings.iterations)[:, : len(scores)]
        loss = swav_loss(scores, list(codes), settings.temperature)
        return loss, assigning, scores[:, :ASSIGNING].detach(), codes

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step; a step whose gradients are not finite leaves everything as it was before."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        lr = lr_at(self.step, self.config.optim, self.config.data.batch, self.steps)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss, assigning, scores, codes = self.loss(batch.crops)
        # Lightning's autocast would take the prototypes' backward to bf16
        with record_function("backward"), torch.autocast(loss.device.type, enabled=False):
            self.manual_backward(loss)
            self.net.finish_backward()
        self.net.prototypes.freeze_(self.step)
        norm = total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
        loss_value, norm_value = torch.stack([loss.detach().float(), norm.float()]).tolist()
        finite = norm_value < float("inf")  # False for nan too; ranks agree, since gradients are all-reduced
        if finite:
            with record_function("optimizer"):
                optimizer.step()
            if self.net.prototypes.weight.grad is not None:  # moved; a second normalisation is not the same to the bit
                self.net.prototypes.normalise_()
            self.queue.push(assigning)
        commit_statistics(self.net, keep=finite)
        self.step += 1
        measured = self.step % self.config.monitor.log_every == 0
        used, entropy = prototype_usage(scores, codes) if measured else (None, None)
        self.result = StepResult(self.step, loss_value, lr, norm_value, finite, used, entropy)

    def weights(self) -> dict[str, Tensor]:
        """The part of `state` that is the network: parameters and running statistics."""
        return {f"model.{name}": tensor for name, tensor in self.net.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Named tensors that a checkpoint holds and a resume fills in place; running statistics are averaged first."""
        average_running_statistics(self.net)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return self.weights() | optimizer_tensors(self.net, optimizer) | self.queue.state()
