"""A linear probe: multinomial logistic regression on standardised features, solved to its optimum.

Minimises mean cross-entropy + decay / 2 * |weights|^2 (the bias is free) by L-BFGS in float64. The decay is chosen on a
fifth of the bank that the first fits leave out, never on what the probe is tested on. No random numbers.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_LEFT_OUT_OF = 5
_GRADIENT = 1e-5  # a fit ends below this; those that only choose the decay, ten times earlier
_CURVATURE = 0.1  # p (1 - p) of a softmax is 0.25 at most; of 0.2, 0.1, 1/29 and 0.01 the quickest at a like precision


@dataclass(frozen=True)
class Probe:
    """mean, std: (C,) of the features; weight: (C, classes); bias: (classes,); all float64."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    decay: float

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) -> (N, classes)."""
        return (features.double() - self.mean) / self.std @ self.weight + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """(N, C) -> (N,) labels."""
        return self.logits(features).argmax(dim=1)


def fit(features: Tensor, labels: Tensor, classes: int, decays: Sequence[float] = DECAYS) -> Probe:
    """Choose the decay, then fit on the whole bank. features: (N, C); labels: (N,), whole numbers below `classes`."""
    with _one_thread():
        return _fit(features, labels, classes, decays)


def _fit(features: Tensor, labels: Tensor, classes: int, decays: Sequence[float]) -> Probe:
    left_out = _every_fifth_of_each_class(labels)
    if not left_out.any():
        return solve(features, labels, classes, sorted(decays)[len(decays) // 2])
    problem, best, lowest = _Problem(features[~left_out], labels[~left_out], classes), None, math.inf
    for decay in sorted(decays, reverse=True):  # each starts where the stronger one before it ended
        probe = problem.solve(decay, best, gradient=10 * _GRADIENT)
        loss = functional.cross_entropy(probe.logits(features[left_out]), labels[left_out]).item()
        if not loss < lowest:  # weaker ones fit the rest ever closer, and take longest
            break
        lowest, best = loss, probe
    assert best is not None
    return _Problem(features, labels, classes).solve(best.decay, best)


def solve(features: Tensor, labels: Tensor, classes: int, decay: float) -> Probe:
    """The optimum at one decay."""
    return _Problem(features, labels, classes).solve(decay)


class _Problem:
    """Standardised features on their principal axes: (N, C) = left * sizes @ axes, at most min(N, C) of them."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        features = features.double()
        self.mean, std = features.mean(0), features.std(0, correction=0)
        self.std = torch.where(std > 0, std, 1.0)  # a feature that never changes says nothing
        self.left, self.sizes, self.axes = torch.linalg.svd((features - self.mean) / self.std, full_matrices=False)
        self.labels, self.classes = labels, classes

    def solve(self, decay: float, start: Probe | None = None, gradient: float = _GRADIENT) -> Probe:
        """Each axis is scaled by about the root of its curvature: the optimum stays, correlated features reach it."""
        scale = (_CURVATURE * self.sizes.square() / len(self.labels) + decay).sqrt()[:, None]
        x = self.left * self.sizes
        weight, bias = x.new_zeros(len(scale), self.classes), x.new_zeros(self.classes)
        if start is not None:
            weight, bias = scale * (self.axes @ start.weight), start.bias.clone()

        def objective() -> Tensor:
            on_axes = weight / scale
            loss: Tensor = functional.cross_entropy(x @ on_axes + bias, self.labels)
            penalty: Tensor = decay / 2 * on_axes.square().sum()
            return loss + penalty

        _minimise(objective, [weight.requires_grad_(), bias.requires_grad_()], gradient)
        return Probe(self.mean, self.std, self.axes.T @ (weight.detach() / scale), bias.detach(), decay)


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor], gradient: float) -> None:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1000, tolerance_grad=gradient, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def evaluated() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(evaluated)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Hundreds of products of small matrices: threads that wait for each other cost ten times the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _every_fifth_of_each_class(labels: Tensor) -> Tensor:
    """(N,) bool: of each class's images, in the order of the bank, the third, the eighth, ..."""
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    earlier = torch.empty_like(labels)
    earlier[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return earlier % _LEFT_OUT_OF == 2
