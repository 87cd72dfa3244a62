"""A linear probe: multinomial logistic regression on standardised features, solved to its optimum.

Minimises mean cross-entropy + decay / 2 * |weights|^2 (the bias is free) by L-BFGS: no learning rate, no random number.
The decay is chosen on a fifth of the bank that the first fits leave out, never on what the probe is tested on. Features
are read a block at a time and may lie on a GPU in half precision, so that a bank takes no memory but its own.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_LEFT_OUT_OF = 5
_GRADIENT = 1e-5  # a fit ends below this; those that only choose the decay, ten times earlier
_CURVATURE = 0.1  # p (1 - p) of a softmax is 0.25 at most; of 0.2, 0.1, 1/29 and 0.01 the quickest at a like precision
_ROWS = 8192  # of a block
_HISTORY = 20  # steps that L-BFGS remembers, each two weights large
_ROUNDING = 1e-9  # of a mean of float64, and far below what half precision can tell apart
_SMALL = 2**22  # numbers; what threads are worth above


@dataclass(frozen=True)
class Probe:
    """mean, std: (C,) of the features; weight: (C, classes); bias: (classes,)."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    decay: float

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) -> (N, classes)."""
        return (features.to(self.mean.dtype) - self.mean) / self.std @ self.weight + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """(N, C) -> (N,) labels."""
        return self.logits(features).argmax(dim=1)


def fit(features: Tensor, labels: Tensor, classes: int) -> Probe:
    """Choose the decay, then fit on the whole bank. features: (N, C); labels: (N,), whole numbers below `classes`.

    Both on one device: in float64 on a CPU, in float32 on a GPU.
    """
    with _one_thread(features.numel()):
        return _fit(features, labels, classes)


def _fit(features: Tensor, labels: Tensor, classes: int) -> Probe:
    left_out = _every_fifth_of_each_class(labels)
    if not left_out.any():
        return solve(features, labels, classes, DECAYS[len(DECAYS) // 2])
    problem, best, lowest = _Problem(features, labels, classes, (~left_out).nonzero()[:, 0]), None, math.inf
    asked = left_out.nonzero()[:, 0]
    for decay in DECAYS:  # each starts where the stronger one before it ended
        probe = problem.solve(decay, best, gradient=10 * _GRADIENT)
        loss = _mean_loss(probe, features, labels, asked)
        if not loss < lowest:  # weaker ones fit the rest ever closer, and take longest
            break
        lowest, best = loss, probe
    assert best is not None
    return _Problem(features, labels, classes).solve(best.decay, best)


def solve(features: Tensor, labels: Tensor, classes: int, decay: float) -> Probe:
    """The optimum at one decay."""
    return _Problem(features, labels, classes).solve(decay)


def _mean_loss(probe: Probe, features: Tensor, labels: Tensor, rows: Tensor) -> float:
    losses = (
        functional.cross_entropy(probe.logits(features[part]), labels[part], reduction="sum").double()
        for part in torch.split(rows, _ROWS)
    )
    return float(sum(losses)) / len(rows)


class _Problem:
    """Standardised features of some rows, and their principal axes, by which L-BFGS is told where the loss is steep.

    axes: (C, C), one a row; sizes: (C,), the variance along each; kind: of the numbers that it is solved in.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        rows: Tensor | None = None,
        kind: torch.dtype | None = None,
    ) -> None:
        self.features, self.labels, self.classes = features, labels, classes
        self.rows = torch.arange(len(features), device=features.device) if rows is None else rows
        self.kind = kind or (torch.float32 if features.is_cuda else torch.float64)
        mean, std, correlation = self._moments()
        self.mean, self.std = mean.to(self.kind), std.to(self.kind)
        sizes, axes = torch.linalg.eigh(correlation)
        self.sizes, self.axes = sizes.clamp(min=0), axes.T.to(self.kind)

    def solve(self, decay: float, start: Probe | None = None, gradient: float = _GRADIENT) -> Probe:
        """Each axis is scaled by about the root of its curvature: the optimum stays, correlated features reach it."""
        scale = (_CURVATURE * self.sizes + decay).sqrt()[:, None].to(self.kind)
        weight, bias = self.mean.new_zeros(len(scale), self.classes), self.mean.new_zeros(self.classes)
        if start is not None:
            weight, bias = scale * (self.axes @ start.weight), start.bias.clone()

        def objective() -> Tensor:
            loss, by_weight, by_bias = self._loss(self.axes.T @ (weight / scale), bias)
            weight.grad = (self.axes @ by_weight) / scale + decay * weight / scale.square()
            bias.grad = by_bias
            penalty: Tensor = decay / 2 * (weight / scale).double().square().sum()
            return loss + penalty

        _minimise(objective, [weight, bias], gradient)
        return Probe(self.mean, self.std, self.axes.T @ (weight / scale), bias, decay)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation of each feature, (C,), and the correlations, (C, C), all float64."""
        width, parts = self.features.shape[1], torch.split(self.rows, _ROWS)
        mean = torch.zeros(width, dtype=torch.float64, device=self.rows.device)
        for rows in parts:
            mean += self.features[rows].double().sum(0) / len(self.rows)
        covariance = mean.new_zeros(width, width)
        for rows in parts:
            centred = self.features[rows].double() - mean
            covariance.addmm_(centred.T, centred, alpha=1 / len(self.rows))
        std = covariance.diagonal().sqrt()
        std = torch.where(std > _ROUNDING * mean.abs(), std, 1.0)  # a feature that never changes says nothing
        return mean, std, covariance / std / std[:, None]

    def _loss(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean cross-entropy and its gradients. weight: (C, classes), of the standardised features."""
        total = torch.zeros((), dtype=torch.float64, device=bias.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for part in torch.split(self.rows, _ROWS):
            labels, x = self.labels[part], (self.features[part].to(self.kind) - self.mean) / self.std
            likely = torch.addmm(bias, x, weight).log_softmax(1)
            total -= likely.gather(1, labels[:, None]).double().sum()
            error = likely.exp_().scatter_add_(1, labels[:, None], -torch.ones_like(likely[:, :1]))
            by_weight.addmm_(x.T, error)
            by_bias += error.sum(0)
        return total / len(self.rows), by_weight / len(self.rows), by_bias / len(self.rows)


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor], gradient: float) -> None:
    """objective: the value, with the gradients put into the parameters' `grad`."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1000,
        tolerance_grad=gradient,
        tolerance_change=1e-14 if parameters[0].dtype == torch.float64 else 1e-8,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(objective)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _one_thread(numbers: int) -> Iterator[None]:
    """Hundreds of products of small matrices: threads that wait for each other cost ten times the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if numbers < _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _every_fifth_of_each_class(labels: Tensor) -> Tensor:
    """(N,) bool: of each class's images, in the order of the bank, the third, the eighth, ..."""
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    earlier = torch.empty_like(labels)
    earlier[by_class] = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[by_class]]
    return earlier % _LEFT_OUT_OF == 2
