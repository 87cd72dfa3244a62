"""What a run learns: a trunk, a projection head, prototypes, and the way of crops through them.

Needs no Lightning, so that a step's memory can be reckoned before anything is spent (jobs.device_memory).
"""

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pipeline.config import Config
from pipeline.regnet import RegNet
from pipeline.swav import Head, Prototypes

LARGE_LAYER = 2**26  # parameters


class Net(nn.Module):
    """What is learned: trunk, projection head, prototypes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.trunk = RegNet(config.model, config.efficiency.activation_checkpointing)
        self.head = Head(self.trunk.width, config.swav)
        self.prototypes = Prototypes(self.head.width, config.swav)
        self._cuts = config.efficiency.sharded
        self._cut: list[tuple[Tensor, Tensor]] = []  # features, and what the head has got in their place

    def units(self) -> list[list[nn.Module]]:
        """What is gathered at a time where the net is sharded, in the order of the forward.

        Each with those of its layers that are large by themselves, and gathered by themselves.
        """
        blocks = [
            [block, *(layer for layer in block.children() if _size(layer) > LARGE_LAYER)]
            for block in self.trunk.blocks()
        ]
        return [[self.trunk.stem], *blocks, [self.head], [self.prototypes]]

    @record_function("forward")
    def forward(self, crops: list[Tensor]) -> Tensor:
        """crops: one (B, n, 3, s, s) for each size -> (B, V, D), L2-normalised, views in the order of the crops."""
        features = [self.trunk(c.flatten(0, 1)) for c in crops]
        if self._cuts and torch.is_grad_enabled():
            given = [feature.detach().requires_grad_() for feature in features]
            self._cut, features = list(zip(features, given, strict=True)), given
        views = torch.cat([f.unflatten(0, c.shape[:2]) for f, c in zip(features, crops, strict=True)], dim=1)
        embeddings: Tensor = self.head(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return embeddings

    def finish_backward(self) -> None:
        """The trunk's part of backward where the net is sharded, after the loss's; else it is done already.

        One size of crops after the other: in a single backward autograd holds the gradients of one size, as large as
        the whole model, until those of the other have come.
        """
        while self._cut:
            features, given = self._cut.pop()
            features.backward(given.grad)  # type: ignore[no-untyped-call]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
