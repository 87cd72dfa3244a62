"""What a rank's device has to hold, found by a step on tensors without memory (torch's fake ones)."""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import Config
from pipeline.net import Net
from pipeline.optim import build_optimizer, optimizer_tensors
from pipeline.swav import ASSIGNING

GATHERED = 4  # units at a time where a model is sharded: the one at work and the next, each twice or with its gradient


@dataclass(frozen=True)
class Held:
    """Bytes, as torch's allocator hands them out; what DALI, cuDNN and NCCL take comes on top.

    checkpoint: weights, optimizer, queue, of all ranks where they are parted. model: what a rank has of the same and of
    the gradients. step: what a step adds to that at most: activations, or the copy of the gradients that the optimizer
    makes. weights: of the whole net, which each rank draws in host memory before they go to its device.
    """

    checkpoint: int
    model: int
    step: int
    weights: int

    @property
    def device(self) -> int:
        return self.model + self.step


def held_bytes(config: Config, ranks: int) -> Held:
    """Of each of so many ranks. Nothing is computed, and no memory taken."""
    with FakeTensorMode():
        net = Net(config)
        optimizer = optimizer_tensors(net, build_optimizer(net, config.optim))
        checkpoint = _bytes([*net.state_dict().values(), *optimizer.values()])
        checkpoint += 4 * ASSIGNING * config.swav.queue * net.head.width
        gradients, parts = _bytes(net.parameters()), ranks if config.efficiency.sharded else 1
        step = _working_bytes(net, config, max(1, config.data.batch // ranks))
        if config.efficiency.sharded:
            step += GATHERED * max(_unit_bytes(net))
    return Held(checkpoint, (checkpoint + gradients) // parts, max(gradients // parts, step), weights=gradients)


def _working_bytes(net: Net, config: Config, images: int) -> int:
    """The most that is there at once of what a forward and a backward over so many images make."""
    gradients = [torch.empty_like(parameter) for parameter in net.parameters()]
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient  # DDP's, which are there all the time
    half = config.train.precision == "bf16"
    with _Living([*net.state_dict().values(), *gradients]) as living:
        crops = [torch.empty(images, c.count, c.size, c.size, 3).movedim(-1, 2) for c in config.augment.crops]
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            loss = net.prototypes(net(crops)).float().log_softmax(-1).mean()
        loss.backward()
        net.finish_backward()
    return int(living.most)


def _unit_bytes(net: Net) -> Iterator[int]:
    """Of each unit, without what is in a smaller one."""
    parted: set[Tensor] = set()
    for unit_and_inner in net.units():
        for unit in reversed(unit_and_inner):
            own = set(unit.parameters()) - parted
            parted |= own
            yield _bytes(own)


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch's __init_subclass__
    """Bytes of the tensors that are made under it, while they are there; `most`: the most of them at once.

    there: tensors of before, whose memory is not counted when something is made that lies in it.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._known = {weakref.ref(tensor.untyped_storage()): 0 for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.most = max(self.most, self._now)
        return made

    def _add(self, storage: UntypedStorage) -> None:
        known = weakref.ref(storage, self._drop)
        if known not in self._known:
            self._known[known] = storage.nbytes()
            self._now += storage.nbytes()

    def _drop(self, gone: weakref.ref[UntypedStorage]) -> None:
        self._now -= self._known.pop(gone, 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
