"""Neighbours and votes against plain loops in float64."""

import math

import numpy as np
import pytest
import torch

from pipeline.evaluate import knn
from pipeline.evaluate.knn import nearest, vote


def cosines(bank: np.ndarray, query: np.ndarray) -> list[float]:
    return [float(query @ row / (math.sqrt(query @ query) * math.sqrt(row @ row))) for row in bank]


def plain_knn(bank: np.ndarray, labels: list[int], query: np.ndarray, k: int, temperature: float) -> int:
    """The label by the formula, one query at a time."""
    similar = cosines(bank, query)
    best = sorted(range(len(bank)), key=lambda i: -similar[i])[:k]
    weights: dict[int, float] = {}
    for i in best:
        weights[labels[i]] = weights.get(labels[i], 0.0) + math.exp(similar[i] / temperature)
    return max(sorted(weights), key=lambda label: weights[label])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_vote_of_neighbours_is_that_of_a_plain_loop_over_the_formula(k: int) -> None:
    drawn = np.random.default_rng(3)
    bank, queries = drawn.normal(size=(60, 8)) + 0.5, drawn.normal(size=(40, 8))
    labels = drawn.integers(0, 7, 60)
    similarity, places = nearest(torch.tensor(bank), torch.tensor(queries), k)
    voted = vote(similarity, torch.tensor(labels)[places], classes=7)
    assert voted.tolist() == [plain_knn(bank, labels.tolist(), query, k, 0.07) for query in queries]


def test_neighbours_come_best_first_and_do_not_depend_on_the_scale_of_features() -> None:
    drawn = np.random.default_rng(4)
    bank, queries = drawn.normal(size=(30, 5)), drawn.normal(size=(3, 5))
    similarity, places = nearest(torch.tensor(bank) * 1000, torch.tensor(queries) * 0.01, k=30)
    assert (similarity < 0).any()  # also those that lie on the other side
    for query, row, found in zip(queries, similarity.tolist(), places.tolist(), strict=True):
        expected = cosines(bank, query)
        assert found == sorted(range(30), key=lambda i: -expected[i])
        assert row == pytest.approx([expected[i] for i in found], abs=1e-6)


def test_leaving_one_out_never_finds_the_query_itself_but_finds_its_twin() -> None:
    bank = torch.eye(6).repeat(2, 1)  # image i and image i + 6 are the same
    similarity, places = nearest(bank, bank, k=1, leave_one_out=True)
    assert places[:, 0].tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]
    assert similarity[:, 0].tolist() == pytest.approx([1.0] * 12)


def test_more_neighbours_than_the_bank_has_are_all_of_it() -> None:
    bank = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert nearest(bank, bank, k=20)[1].shape == (4, 4)
    assert nearest(bank, bank, k=20, leave_one_out=True)[1].shape == (4, 3)


def test_two_near_neighbours_outweigh_three_far_ones() -> None:
    similarity = torch.tensor([[0.9, 0.88, 0.3, 0.29, 0.28]])
    assert vote(similarity, torch.tensor([[1, 1, 0, 0, 0]]), classes=2).item() == 1


def test_many_queries_give_what_each_gives_alone() -> None:
    drawn = torch.Generator().manual_seed(1)
    bank, queries = torch.randn(20, 4, generator=drawn), torch.randn(1500, 4, generator=drawn)
    _, together = nearest(bank, queries, k=3)
    for i in (0, 1023, 1024, 1499):
        assert together[i].tolist() == nearest(bank, queries[i : i + 1], k=3)[1][0].tolist()


def test_a_bank_in_blocks_gives_the_same_neighbours_and_equal_ones_in_its_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)  # exact in any order of adding them up
    bank, queries = signs.repeat(3, 1), signs  # image i, i + 16 and i + 32 are the same
    whole, left_out = nearest(bank, queries, k=7), nearest(bank, bank, k=7, leave_one_out=True)
    monkeypatch.setattr(knn, "_BLOCK", 11)
    similarities, places = nearest(bank, queries, k=7)
    assert torch.equal(places, whole[1])
    assert torch.equal(similarities, whole[0])
    assert torch.equal(places[:, :3], torch.arange(16)[:, None] + torch.tensor([0, 16, 32]))
    assert nearest(bank, bank, k=7, leave_one_out=True)[1].tolist() == left_out[1].tolist()


def test_features_in_half_precision_are_compared_in_single() -> None:
    bank = torch.randn(50, 300, generator=torch.Generator().manual_seed(3)).half()
    similarities, places = nearest(bank, bank[:9], k=5)
    assert similarities.dtype == torch.float32
    assert places.tolist() == nearest(bank.float(), bank[:9].float(), k=5)[1].tolist()


def test_a_copy_is_found_when_no_other_original_is_nearer() -> None:
    drawn = np.random.default_rng(0)
    originals = drawn.normal(size=(50, 6))
    copies = originals + 0.8 * drawn.normal(size=(50, 6))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    expected = [
        all(cosine(copies[i], originals[i]) > cosine(copies[i], originals[j]) for j in range(50) if j != i)
        for i in range(50)
    ]
    assert 5 < sum(expected) < 45  # neither nothing nor everything
    assert knn.found(torch.tensor(originals), torch.tensor(copies)).tolist() == expected


def test_features_that_say_nothing_find_one_copy_in_all() -> None:
    assert knn.found(torch.ones(40, 3), torch.ones(40, 3)).sum() == 1
