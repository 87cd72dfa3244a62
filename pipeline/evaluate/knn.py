"""Nearest neighbours by cosine similarity: what they say an image shows, and whether a copy finds its original."""

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.07  # of the votes
_QUERIES = 512  # at a time
_LOW = 2**31 - 1  # all bits of a float32 but its sign; where that is set, the others order it backwards
_BLOCK = 8192  # images of the bank that they are compared with at once


def nearest(bank: Tensor, queries: Tensor, k: int, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """The k images of the bank most similar to each query, best first; equal ones in the order of the bank.

    bank: (N, C), queries: (Q, C), any scale, on one device; features are not centred. Returns similarities (Q, k) and
    places in the bank (Q, k), with k at most N. leave_one_out: query i is image i of the bank and does not find itself.
    Takes no memory for more than a block of the bank beside it.
    """
    k = min(k, len(bank) - leave_one_out)
    numbers = torch.arange(len(queries), device=queries.device)
    parts = [
        _best(bank, functional.normalize(_wide(part), dim=1), k, own if leave_one_out else None)
        for part, own in zip(torch.split(queries, _QUERIES), torch.split(numbers, _QUERIES), strict=True)
    ]
    return torch.cat([similarities for similarities, _ in parts]), torch.cat([places for _, places in parts])


def _best(bank: Tensor, unit: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each of these queries, which have length 1. own: their places in the bank, where they are not to be found."""
    keys = torch.empty(len(unit), 0, dtype=torch.long, device=unit.device)
    for first in range(0, len(bank), _BLOCK):
        similarity = unit @ functional.normalize(_wide(bank[first : first + _BLOCK]), dim=1).T
        places = torch.arange(first, first + similarity.shape[1], device=unit.device)
        if own is not None:
            similarity = similarity.masked_fill(places == own[:, None], -torch.inf)
        keys = torch.cat([keys, _keys(similarity, places)], 1)
        keys = keys.topk(min(k, keys.shape[1]), dim=1).values
    return _of_keys(keys)


def _keys(similarity: Tensor, places: Tensor) -> Tensor:
    """One number for both, all of them different: the larger, the more similar; of equal ones, the earlier.

    To take the largest of them is a quarter of the work of a stable sort, and there is no tie to break as it likes.
    """
    bits = (similarity.float() + 0.0).view(torch.int32)  # 0.0: there is a zero with a sign
    bits ^= (bits >> 31) & _LOW
    return bits.long().mul_(2**32).add_(2**32 - 1 - places)


def _of_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The similarities and places that they were made of."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _LOW)).view(torch.float32), 2**32 - 1 - keys.remainder(2**32)


def _wide(features: Tensor) -> Tensor:
    """Features that are kept in half precision are compared in fp32."""
    return features.float() if features.dtype == torch.float16 else features


def vote(similarities: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The label with most weight; a neighbour weighs exp(similarity / TEMPERATURE).

    similarities: (Q, k); labels: (Q, k), of the neighbours, whole numbers below `classes`. Returns (Q,); of equal
    labels the smallest. Source: Wu et al. (arXiv 1805.01978), section 3.4.
    """
    nearest_first = similarities[:, :1]
    weights = ((similarities - nearest_first) / TEMPERATURE).double().exp()  # one factor for all: the winner stays
    scores = weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)
    return scores.argmax(dim=1)


def found(originals: Tensor, copies: Tensor) -> Tensor:
    """Whether copy i is more similar to original i than to any other. Both (N, C), returns (N,) bool."""
    _, places = nearest(originals, copies, k=1)
    return places[:, 0] == places.new_tensor(range(len(copies)))
