"""The probe is at the optimum of its formula, chooses its decay without the test tiles, and repeats itself."""

import numpy as np
import pytest
import torch

from pipeline.evaluate import probe as probing
from pipeline.evaluate.probe import _every_fifth_of_each_class, fit, solve


def problem(seed: int, samples: int = 150, noise: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes of clouds in 10 dimensions, of very different scales, the last of which never changes."""
    drawn = np.random.default_rng(seed)
    labels = drawn.integers(0, 4, samples)
    centres = np.random.default_rng(99).normal(size=(4, 10))
    x = (centres[labels] + noise * drawn.normal(size=(samples, 10))) * np.logspace(-3, 3, 10)
    x[:, -1] = 7.0
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def test_the_gradient_of_the_formula_is_zero_at_the_solution() -> None:
    x, y = problem(0)
    for decay in (0.3, 0.01):
        probe = solve(x, y, classes=4, decay=decay)
        features = x.double().numpy()
        spread = features.std(axis=0)
        standard = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
        scores = standard @ probe.weight.numpy() + probe.bias.numpy()
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        error = chances - np.eye(4)[y.numpy()]
        assert np.abs(standard.T @ error / len(x) + decay * probe.weight.numpy()).max() < 1e-4
        assert np.abs(error.mean(axis=0)).max() < 1e-4


def test_the_probe_is_equal_to_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = problem(1)
    probe = solve(x, y, classes=4, decay=0.03)
    standard = ((x.double() - probe.mean) / probe.std).numpy()
    other = LogisticRegression(C=1 / (0.03 * len(x)), tol=1e-10, max_iter=5000).fit(standard, y.numpy())
    unseen = problem(2)[0]
    theirs = other.predict_proba(((unseen.double() - probe.mean) / probe.std).numpy())
    assert np.abs(torch.softmax(probe.logits(unseen), dim=1).numpy() - theirs).max() < 1e-3


def test_noisy_features_get_a_strong_decay_and_clear_ones_a_weak_one() -> None:
    noisy, clear = fit(*problem(0, noise=6.0), classes=4), fit(*problem(0, noise=0.2), classes=4)
    assert noisy.decay > 10 * clear.decay


def test_of_each_class_the_third_the_eighth_and_so_on_are_left_out() -> None:
    labels = torch.tensor(np.random.default_rng(3).integers(0, 7, 200))
    seen: dict[int, int] = {}
    for label, left_out in zip(labels.tolist(), _every_fifth_of_each_class(labels).tolist(), strict=True):
        assert left_out == (seen.get(label, 0) % 5 == 2)
        seen[label] = seen.get(label, 0) + 1
    assert not _every_fifth_of_each_class(labels[:0]).any()


def test_a_bank_of_a_million_is_parted_without_a_square_of_its_size() -> None:
    assert 0.19e6 < int(_every_fifth_of_each_class(torch.arange(10**6) % 1000).sum()) < 0.21e6


def test_fitting_twice_gives_the_same_bits() -> None:
    x, y = problem(5)
    once, again = fit(x, y, classes=4), fit(x, y, classes=4)
    assert torch.equal(once.weight, again.weight)
    assert once.decay == again.decay


def test_a_bank_too_small_to_leave_anything_out_still_gives_a_probe() -> None:
    x = torch.eye(4)
    assert fit(x, torch.arange(4), classes=4).predict(x).tolist() == [0, 1, 2, 3]


def test_a_bank_in_blocks_and_in_half_precision_gives_the_same_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(6, samples=500)
    whole = fit(x, y, classes=4)
    monkeypatch.setattr(probing, "_ROWS", 64)
    in_blocks = fit(x, y, classes=4)
    assert in_blocks.decay == whole.decay
    assert torch.allclose(in_blocks.weight, whole.weight, atol=1e-9)
    halved = x.half()
    assert torch.allclose(fit(halved, y, classes=4).weight, fit(halved.double(), y, classes=4).weight, atol=1e-9)


def test_a_feature_that_rounding_alone_moves_says_nothing_of_images_where_it_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probing, "_ROWS", 7)
    x, y = problem(7)
    x[:, -1] = 0.1  # no fraction of two: a mean of a hundred is off by a bit
    probe = fit(x, y, classes=4)
    moved = x.clone()
    moved[:, -1] = 0.2
    assert torch.allclose(probe.logits(moved), probe.logits(x), atol=1e-6)


def test_on_a_gpu_it_is_solved_in_single_precision_to_the_same_optimum() -> None:
    """Here on a CPU, told to be as precise as a GPU is."""
    x, y = problem(8, samples=2000)
    exact = solve(x, y, classes=4, decay=0.01)
    coarse = probing._Problem(x, y, 4, kind=torch.float32).solve(0.01)
    assert coarse.weight.dtype == torch.float32
    assert torch.allclose(coarse.weight.double(), exact.weight, atol=1e-3)
    assert (coarse.predict(x) == exact.predict(x)).double().mean() > 0.999
