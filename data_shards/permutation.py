"""Keyed permutations of 0..n-1 that are computed place by place, and their inverses: no memory, whatever n.

A Feistel network on bit_length(n - 1) bits, its two sides as equal as the bits allow; whatever comes out at n or above
goes through again (cycle walking). A round XORs one side with a function of the other, which undoes itself: so the
network is a bijection of its 2^bits values for any function, and the walk makes it one of 0..n-1 for every n. Over the
keys a value goes to each place equally often (below nine elements: to a tenth).
The numbers are part of ORDER_VERSION: changing anything here changes what running jobs would see.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Unsigned = NDArray[Any]

ROUNDS = 6
MAX_SIZE = 2**53

_ROUND_ODD = np.array([0x85EBCA6B, 0xC2B2AE35], dtype=np.uint32)
_ROUND_SHIFT = np.array([13, 16], dtype=np.uint32)
_MIX_ODD = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
_MIX_SHIFT = np.array([30, 27, 31], dtype=np.uint64)


class Permutations:
    """R permutations at once: row r is one of 0..sizes[r]-1.

    sizes: (R,), each 1 to 2^53. keys: (ROUNDS, R) words, well mixed.
    """

    def __init__(self, sizes: Ints, keys: Words) -> None:
        low, high = int(sizes.min()), int(sizes.max())
        if low < 1 or high > MAX_SIZE:
            raise ValueError(f"permutations of {low} to {high} elements; 1 to 2^53 can be")
        self.sizes = sizes
        self._shape = _shape(sizes[:1] if low == high else sizes, np.uint32 if high <= 2**32 else np.uint64)
        self._keys = keys.astype(np.uint32)

    def forward(self, row: Ints, values: Ints) -> Ints:
        """Where values (n,) of the permutations row (n,) go."""
        return self._walk(row, values, range(ROUNDS))

    def inverse(self, row: Ints, values: Ints) -> Ints:
        """What goes to values (n,) in the permutations row (n,)."""
        return self._walk(row, values, range(ROUNDS - 1, -1, -1))

    def _walk(self, row: Ints, values: Ints, rounds: Sequence[int]) -> Ints:
        if values.size and (values.min() < 0 or (values >= self.sizes.take(row)).any()):
            raise ValueError(f"values {values.min()} to {values.max()} in permutations of {self.sizes.min()} elements")
        shape, keys = _columns(self._shape, row), _columns(self._keys, row)
        moved = _feistel(values.astype(shape.dtype), shape, keys, rounds)
        outside = np.flatnonzero(moved > shape[0])
        while outside.size:
            some = _columns(shape, outside)
            moved[outside] = again = _feistel(moved[outside], some, _columns(keys, outside), rounds)
            outside = outside[again > some[0]]
        return moved.astype(np.int64)


class Permutation:
    """One permutation of 0..n-1 by a key of 64 bytes; takes and gives integers or arrays of them."""

    def __init__(self, n: int, key: bytes) -> None:
        self._one = Permutations(np.array([n], dtype=np.int64), mix(words(key)[:ROUNDS, None]))

    def __call__(self, values: ArrayLike) -> Ints:
        return self._each(self._one.forward, values)

    def inverse(self, values: ArrayLike) -> Ints:
        return self._each(self._one.inverse, values)

    def _each(self, walk: Callable[[Ints, Ints], Ints], values: ArrayLike) -> Ints:
        given = np.asarray(values, dtype=np.int64)
        return walk(np.zeros(given.size, np.int64), given.reshape(-1)).reshape(given.shape)


def words(key: bytes) -> Words:
    """Eight words, of a key of 64 bytes."""
    return np.frombuffer(key, dtype="<u8").astype(np.uint64)


def mix(word: Words) -> Words:
    """A bijection of words that spreads each bit over all (the finalizer of splitmix64)."""
    word = (word ^ (word >> _MIX_SHIFT[0])) * _MIX_ODD[0]
    word = (word ^ (word >> _MIX_SHIFT[1])) * _MIX_ODD[1]
    return np.asarray(word ^ (word >> _MIX_SHIFT[2]))


def _shape(sizes: Ints, word: type[np.unsignedinteger[Any]]) -> Unsigned:
    """(4, n): size - 1 (which fits a word), bits of the low side, mask of the low side, mask of the high side."""
    bits = np.array([(size - 1).bit_length() for size in sizes.tolist()])
    low = bits // 2
    return np.stack([sizes - 1, low, (1 << low) - 1, (1 << (bits - low)) - 1]).astype(word)


def _columns(part: Unsigned, which: Ints) -> Unsigned:
    """Some columns; one column stands for any."""
    return part if part.shape[1] == 1 else part.take(which, axis=1)


def _feistel(values: Unsigned, shape: Unsigned, keys: Unsigned, rounds: Sequence[int]) -> Unsigned:
    """Once through the network: even rounds change the high side, odd ones the low side; 27 bits a side at most.

    values: (n,). shape: (4, n or 1), of their type. keys: (ROUNDS, n or 1), 32 bits each.
    """
    low, high = (values & shape[2]).astype(np.uint32), (values >> shape[1]).astype(np.uint32)
    low_mask, high_mask = shape[2].astype(np.uint32), shape[3].astype(np.uint32)
    for number in rounds:
        if number % 2:
            low ^= _round(high, keys[number]) & low_mask
        else:
            high ^= _round(low, keys[number]) & high_mask
    return np.asarray((high.astype(values.dtype) << shape[1]) | low)


def _round(side: Unsigned, key: Unsigned) -> Unsigned:
    """32 bits that depend on all bits of a side and of the key (after the finalizer of MurmurHash3)."""
    word = side + key
    word *= _ROUND_ODD[0]
    word ^= word >> _ROUND_SHIFT[0]
    word *= _ROUND_ODD[1]
    word ^= word >> _ROUND_SHIFT[1]
    return word
