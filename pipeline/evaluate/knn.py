"""Nearest neighbours by cosine similarity, and what they say an image shows."""

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 1024  # queries at a time, so that the similarities of a large set fit into memory


def nearest(bank: Tensor, queries: Tensor, k: int, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """The k images of the bank most similar to each query, best first; equal ones in the order of the bank.

    bank: (N, C), queries: (Q, C), any scale; features are not centred. Returns similarities (Q, k) and places in the
    bank (Q, k), with k at most N. leave_one_out: query i is image i of the bank and does not find itself.
    """
    unit = functional.normalize(bank, dim=1)
    k = min(k, len(bank) - leave_one_out)
    similarities, places = [], []
    for first in range(0, len(queries), _ROWS):
        similarity = functional.normalize(queries[first : first + _ROWS], dim=1) @ unit.T
        if leave_one_out:
            similarity[torch.arange(len(similarity)), torch.arange(first, first + len(similarity))] = -torch.inf
        ordered, order = similarity.sort(dim=1, descending=True, stable=True)
        similarities.append(ordered[:, :k])
        places.append(order[:, :k])
    return torch.cat(similarities), torch.cat(places)


def vote(similarities: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """The label with most weight; a neighbour weighs exp(similarity / temperature).

    similarities: (Q, k); labels: (Q, k), of the neighbours, whole numbers below `classes`. Returns (Q,); of equal
    labels the smallest. Source: Wu et al. (arXiv 1805.01978), section 3.4.
    """
    nearest_first = similarities[:, :1]
    weights = ((similarities - nearest_first) / temperature).double().exp()  # one factor for all: the winner stays
    scores = torch.zeros(len(labels), classes, dtype=torch.float64).scatter_add_(1, labels, weights)
    return scores.argmax(dim=1)
