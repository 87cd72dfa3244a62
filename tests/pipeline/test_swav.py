"""Codes, loss, head, prototypes and queue against the paper's formulas in float64, in one process and on two ranks."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pipeline.snapshot import is_own
from pipeline.swav import Head, Prototypes, Queue, SwAVSettings, prototype_usage, sinkhorn, swav_loss
from tests.pipeline import distributed

Floats = npt.NDArray[np.float64]
SMALL = SwAVSettings(prototypes=12, head=(16, 8), queue=24, queue_from_step=3, freeze_prototypes_steps=2)


def cosines(rows: int, prototypes: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    samples, directions = torch.randn(rows, 8, generator=random), torch.randn(prototypes, 8, generator=random)
    return functional.normalize(samples, dim=1) @ functional.normalize(directions, dim=1).T


def codes_by_formula(scores: Tensor, epsilon: float, iterations: int) -> Floats:
    """Section 3.1: Q = exp(C^T Z / epsilon), rows then columns normalised in turn. (B, K) -> (B, K)."""
    scaled = scores.double().numpy().T / epsilon
    q = np.exp(scaled - scaled.max())
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= prototypes * q.sum(axis=1, keepdims=True)
        q /= samples * q.sum(axis=0, keepdims=True)
    return (q * samples).T


def loss_by_formula(scores: Floats, codes: list[Floats], temperature: float) -> float:
    """Equation 2 for several views: the cross-entropy of each code with each other view's softmax, averaged."""
    exponentials = np.exp(scores / temperature)
    p = exponentials / exponentials.sum(axis=2, keepdims=True)
    total, terms = 0.0, 0
    for assigning, code in enumerate(codes):
        for view in range(scores.shape[1]):
            if view != assigning:
                total += float(np.mean(-np.sum(code * np.log(p[:, view]), axis=1)))
                terms += 1
    return total / terms


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_codes_are_those_of_the_paper_on_ordinary_scores(epsilon: float, iterations: int) -> None:
    scores = cosines(64, 30)
    codes = sinkhorn(scores, epsilon, iterations)
    np.testing.assert_allclose(codes.numpy(), codes_by_formula(scores, epsilon, iterations), atol=1e-6)


def test_codes_come_in_float32_without_a_gradient_and_leave_the_scores_alone() -> None:
    scores = cosines(8, 5).bfloat16().requires_grad_()
    before = scores.detach().clone()
    codes = sinkhorn(scores, 0.05, 3)
    assert (codes.dtype, codes.requires_grad) == (torch.float32, False)
    assert torch.equal(scores, before)
    np.testing.assert_allclose(codes.numpy(), codes_by_formula(before.float(), 0.05, 3), atol=1e-6)


@given(
    scale=st.sampled_from([1.0, 100.0, 1e4]),
    epsilon=st.sampled_from([0.01, 0.03, 0.5]),
    seed=st.integers(0, 1000),
    prototypes=st.integers(2, 40),
)
@settings(max_examples=25)
def test_every_sample_gives_the_mass_1_however_far_the_scores_are(
    scale: float, epsilon: float, seed: int, prototypes: int
) -> None:
    codes = sinkhorn(cosines(16, prototypes, seed) * scale, epsilon, 3)
    torch.testing.assert_close(codes.sum(1), torch.ones(16))


def test_a_single_far_sample_at_a_small_epsilon_does_not_make_codes_nan() -> None:
    scores = torch.cat([torch.full((15, 6), 0.99), torch.full((1, 6), -1.0)]) + 1e-3 * cosines(16, 6)
    codes = sinkhorn(scores, 0.01, 3)
    torch.testing.assert_close(codes.sum(1), torch.ones(16))


def test_many_iterations_give_every_prototype_the_same_mass() -> None:
    codes = sinkhorn(cosines(60, 10), 0.05, 300)
    torch.testing.assert_close(codes.sum(0), torch.full((10,), 6.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_score_that_is_not_finite_makes_every_code_nan(bad: float) -> None:
    scores = cosines(6, 4)
    scores[2, 1] = bad
    assert sinkhorn(scores, 0.05, 3).isnan().all()


def test_problems_stacked_in_front_are_solved_each_for_itself() -> None:
    stacked = torch.stack([cosines(10, 6, seed) for seed in range(2)])
    for problem, codes in zip(stacked, sinkhorn(stacked, 0.05, 3), strict=True):
        assert torch.equal(sinkhorn(problem, 0.05, 3), codes)


def test_the_loss_and_its_gradient_are_those_of_the_paper() -> None:
    samples, views, prototypes, temperature = 7, 5, 9, 0.1
    scores = torch.stack([cosines(samples, prototypes, seed) for seed in range(views)], dim=1).double()
    codes = [sinkhorn(scores[:, view], 0.05, 3).double() for view in range(2)]
    leaf = scores.float().requires_grad_()
    loss = swav_loss(leaf, [code.float() for code in codes], temperature)
    loss.backward()
    expected = loss_by_formula(scores.numpy(), [code.numpy() for code in codes], temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # d/ds of -sum q log softmax(s / T) is (softmax(s / T) - q) / T
    p = (scores / temperature).softmax(-1)
    slope = torch.zeros_like(scores)
    for assigning, code in enumerate(codes):
        for view in range(views):
            if view != assigning:
                slope[:, view] += (p[:, view] - code) / temperature / samples / (2 * (views - 1))
    torch.testing.assert_close(leaf.grad, slope.float(), rtol=1e-5, atol=1e-7)


def test_scores_that_say_nothing_cost_ln_k() -> None:
    even = torch.zeros(4, 3, 50)
    assert swav_loss(even, [sinkhorn(even[:, view], 0.05, 3) for view in range(2)], 0.1).item() == pytest.approx(
        math.log(50)
    )


def test_projections_have_length_1_and_the_widths_of_the_settings() -> None:
    torch.manual_seed(2)
    head = Head(20, SMALL)
    projected = head(torch.randn(6, 20))
    assert (head.width, projected.shape) == (8, (6, 8))
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(6))
    assert [m.out_features for m in head.modules() if isinstance(m, nn.Linear)] == [16, 8]


def test_a_head_without_norm_has_no_batch_norm() -> None:
    kinds = [type(m) for m in Head(20, SwAVSettings(head=(16, 16, 8), head_norm=False)).layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_prototypes_start_with_length_1_and_return_to_it() -> None:
    prototypes = Prototypes(8, SMALL)
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(12))
    with torch.no_grad():
        prototypes.weight.mul_(torch.arange(1.0, 13.0)[:, None])
    directions = prototypes.weight.detach() / torch.arange(1.0, 13.0)[:, None]
    prototypes.normalise_()
    torch.testing.assert_close(prototypes.weight.detach(), directions)


def test_scores_are_cosines_in_float32_even_under_autocast() -> None:
    prototypes = Prototypes(8, SMALL)
    embeddings = functional.normalize(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    expected = embeddings.double() @ prototypes.weight.detach().double().T
    with torch.autocast("cpu", torch.bfloat16):
        scores = prototypes(embeddings)
    torch.testing.assert_close(scores.detach(), expected.float(), rtol=1e-6, atol=1e-6)


def test_prototypes_do_not_move_while_they_are_frozen() -> None:
    prototypes = Prototypes(8, SMALL)
    optimizer = torch.optim.SGD(prototypes.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    moved = []
    for step in range(4):
        before = prototypes.weight.detach().clone()
        optimizer.zero_grad()
        prototypes(torch.ones(3, 8)).sum().backward()
        prototypes.freeze_(step)
        optimizer.step()
        moved.append(not torch.equal(before, prototypes.weight))
    assert moved == [False, False, True, True]


def numbered(batch: int, lanes: range, per_lane: int = 2) -> Tensor:
    """(B, 2, 8) of a batch: view v of sample i of a lane holds 1000 batch + 100 lane + 10 i + v + 1."""
    rows = [
        [1000 * batch + 100 * lane + 10 * i + view + 1 for view in range(2)] for lane in lanes for i in range(per_lane)
    ]
    return torch.tensor(rows, dtype=torch.float32)[..., None].expand(-1, -1, 8)


def test_the_queue_gives_the_newest_samples_of_each_lane_once_full_and_its_step_has_come() -> None:
    lanes = range(2, 4)
    queue = Queue(SMALL, lanes, 4, 8)  # 24 samples, 4 lanes: 6 a lane, 3 batches of 2
    given = []
    for step in range(5):
        given.append(queue.samples(1, step)[:, 0].tolist())
        queue.push(numbered(step, lanes))
    assert given[:3] == [[], [], []]
    for step in (3, 4):
        newest = [
            1000 * (step - age) + 100 * lane + 10 * i + 2 for lane in lanes for age in (3, 2, 1) for i in range(2)
        ]
        assert given[step] == newest


def test_the_queue_waits_for_its_step_though_it_is_full() -> None:
    queue = Queue(SMALL, range(4), 4, 8)
    for step in range(3):
        queue.push(numbered(step, range(4)))
    assert len(queue.samples(0, 2)) == 0
    assert len(queue.samples(0, 3)) == 24


def test_a_batch_larger_than_the_queue_leaves_its_last_samples() -> None:
    queue = Queue(SwAVSettings(queue=4), range(2), 2, 8)
    queue.push(numbered(7, range(2), per_lane=5))
    assert queue.samples(0, 0)[:, 0].tolist() == [7031, 7041, 7131, 7141]


def test_two_ranks_go_on_with_the_queue_of_one() -> None:
    one = Queue(SMALL, range(4), 4, 8)
    for step in range(3):
        one.push(numbered(step, range(4)))
    saved = {name: tensor.clone() for name, tensor in one.state().items()}
    assert list(saved) == ["queue.lane-000", "queue.lane-001", "queue.lane-002", "queue.lane-003"]
    two = [Queue(SMALL, lanes, 4, 8) for lanes in (range(2), range(2, 4))]
    for queue in two:
        assert len(queue.samples(0, 5)) == 0
        for name, tensor in queue.state().items():
            tensor.copy_(saved[name])
    for view in range(2):
        assert torch.equal(torch.cat([queue.samples(view, 5) for queue in two]), one.samples(view, 5))


def test_a_lane_s_queue_is_known_by_its_name_as_its_rank_s_own() -> None:
    assert all(map(is_own, Queue(SwAVSettings(queue=12), range(6), 6, 8).state()))


def test_without_a_queue_nothing_is_kept_and_nothing_joins() -> None:
    queue = Queue(SwAVSettings(), range(2), 2, 8)
    queue.push(numbered(0, range(2)))
    assert (len(queue.samples(0, 9)), queue.state(), queue.state_dict()) == (0, {}, {})


def test_usage_counts_the_first_choices_of_scores_and_the_entropy_of_each_code() -> None:
    one, sure, torn = torch.tensor([[0.9, 0.1, 0.2, 0.3]]).expand(2, 3, 4), torch.eye(4), torch.full((4, 4), 0.25)
    assert prototype_usage(one, sure[:3].expand(2, 3, 4)) == (0.25, 0.0)
    assert prototype_usage(sure, torn) == (1.0, pytest.approx(1.0))
    assert prototype_usage(sure[:2], torch.stack([sure[0], torn[0]])) == (0.5, pytest.approx(0.5))


def near(directions: Tensor, noise: float, rows: int, random: torch.Generator) -> Tensor:
    """Unit rows at random directions out of those given, with noise."""
    chosen = directions[torch.randint(len(directions), (rows,), generator=random)]
    return functional.normalize(chosen + noise * torch.randn(chosen.shape, generator=random), dim=1)


def test_usage_tells_a_collapse_of_embeddings_and_one_of_prototypes_from_what_is_healthy() -> None:
    random = torch.Generator().manual_seed(4)
    spread, one = (functional.normalize(torch.randn(n, 128, generator=random), dim=1) for n in (300, 1))
    states = {
        "healthy": near(spread[:200], 0.05, 512, random) @ spread.T,
        "embeddings": near(one, 1e-3, 512, random) @ spread.T,
        "prototypes": near(spread, 0.05, 512, random) @ near(one, 1e-4, 300, random).T,
    }
    told = {name: prototype_usage(scores, sinkhorn(scores, 0.02, 3)) for name, scores in states.items()}
    used, entropy = told["healthy"]
    assert used > 0.5
    assert entropy < 0.4
    used, entropy = told["embeddings"]
    assert used < 0.05
    assert entropy > 0.98
    used, entropy = told["prototypes"]
    assert used > 0.5
    assert entropy > 0.98


def on_a_rank(rank: int) -> dict[str, Any]:
    """What the tests below need of two ranks, in one go."""
    scores = cosines(64, 30).chunk(2)[rank]
    broken = scores.clone()
    if rank == 1:
        broken[3, 4] = math.nan
    codes = sinkhorn(scores, 0.02, 3)
    return {"codes": codes, "broken": sinkhorn(broken, 0.02, 3), "usage": prototype_usage(scores, codes)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return distributed.run(2, on_a_rank)


@pytest.mark.slow
def test_two_ranks_give_the_codes_of_the_whole_batch(two_ranks: list[dict[str, Any]]) -> None:
    codes = torch.cat([results["codes"] for results in two_ranks])
    np.testing.assert_allclose(codes.numpy(), codes_by_formula(cosines(64, 30), 0.02, 3), atol=1e-6)
    torch.testing.assert_close(codes, sinkhorn(cosines(64, 30), 0.02, 3), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_score_that_is_not_finite_makes_the_codes_of_all_ranks_nan(two_ranks: list[dict[str, Any]]) -> None:
    assert all(results["broken"].isnan().all() for results in two_ranks)


@pytest.mark.slow
def test_usage_is_that_of_the_whole_batch_on_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    whole = prototype_usage(cosines(64, 30), sinkhorn(cosines(64, 30), 0.02, 3))
    assert [results["usage"] for results in two_ranks] == [pytest.approx(whole), pytest.approx(whole)]
