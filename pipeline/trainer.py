"""Lightning's Trainer as a rank of a run has it: what is ours, such as saves, logs and signals, it leaves alone."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from pipeline.config import Config
from pipeline.signals import RankEnvironment, StopRequest, own_signals

if TYPE_CHECKING:
    from pipeline.train import Launch

NOTHING_TO_DO = (
    "The `srun` command is available",
    "`broadcast_buffers` is deprecated",
    "`isinstance\\(treespec",
    "`torch.distributed.all_gather_into_tensor` is deprecated",  # what follows it is not in each torch that we take
    "FSDP2-wrapped module .* returned a view",  # which would be wrong to change in place, and nobody does
)


def build_trainer(config: Config, launch: "Launch", request: StopRequest, callback: pl.Callback) -> pl.Trainer:
    """Of one rank, for one `fit`; takes the signals that `request` listens to. The process group must be there."""
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        **(_sharded(launch) if config.efficiency.sharded else _replicated(config, launch)),
        precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=not config.efficiency.deterministic,  # crops have few sizes: cuDNN's fastest way for each
    )
    own_signals(trainer, request)
    return trainer


def _replicated(config: Config, launch: "Launch") -> dict[str, Any]:
    strategy = DDPStrategy(
        cluster_environment=RankEnvironment(launch),
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=config.efficiency.deterministic,
    )
    nodes = launch.world_size // launch.local_world_size
    return {"strategy": strategy, "devices": launch.local_world_size, "num_nodes": nodes}


def _sharded(launch: "Launch") -> dict[str, Any]:
    """The module's own hooks speak with the other ranks, of which Lightning need not know."""
    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    devices = [launch.local_rank] if torch.cuda.is_available() else 1
    return {"strategy": SingleDeviceStrategy(device), "devices": devices}


def quieten() -> None:
    """What Lightning and torch say at each start and nobody can act on stays out of the ranks' logs."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in NOTHING_TO_DO:
        warnings.filterwarnings("ignore", text)
