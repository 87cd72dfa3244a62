"""Which of several sets each chunk of a stream is from, so that each has its share: known for any chunk at once.

Shares are whole numbers of the chunks of a *period*; a table of one period answers for the endless stream, both ways.
Within it, chunk j of a set with p of P chunks must come at or after floor(jP/p) and before ceil((j+1)P/p), and of those
that may come the one whose time runs out first does. So at every place of the stream each set has had its share to
within less than one chunk.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

PERIOD = 10_000  # chunks at most: a share is exact to 0.01 %


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as the smallest whole numbers in the same ratio; those that add up to more than PERIOD are rounded.

    Raises ValueError when a weight is too small beside the others to have a chunk in a period.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    factor = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * factor) for weight in exact]
    if sum(shares) // gcd(*shares) > PERIOD:
        shares = _rounded(shares)
    if 0 in shares:
        weight = weights[shares.index(0)]
        raise ValueError(f"a weight of {weight:g} is less than one in {PERIOD:,} of {sum(weights):g}; leave it out")
    return tuple(share // gcd(*shares) for share in shares)


def _rounded(shares: Sequence[int]) -> list[int]:
    """Of PERIOD chunks: rounded down, what is left to those that lost most."""
    total = sum(shares)
    whole = [share * PERIOD // total for share in shares]
    lost = sorted(range(len(shares)), key=lambda k: -(shares[k] * PERIOD % total))
    for k in lost[: PERIOD - sum(whole)]:
        whole[k] += 1
    return whole


class Schedule:
    """The stream of sets with these shares. Memory: a period."""

    def __init__(self, shares: Sequence[int]) -> None:
        self.shares = np.array(shares, dtype=np.int64)
        self.period = sum(shares)
        self._set = np.array(_dealt(shares), dtype=np.int64)
        self._slots = [np.flatnonzero(self._set == k) for k in range(len(shares))]
        self._before = np.empty(self.period, dtype=np.int64)  # chunks of the same set that come earlier in the period
        for slots in self._slots:
            self._before[slots] = np.arange(len(slots))

    def chunk(self, slot: ArrayLike) -> tuple[Ints, Ints]:
        """Of slots of the stream: the set, and which chunk of that set's own stream it is."""
        period, place = np.divmod(np.asarray(slot, dtype=np.int64), self.period)
        which = self._set[place]
        return which, period * self.shares[which] + self._before[place]

    def slot(self, which: int, chunk: int) -> int:
        """Where the stream has that chunk of a set: the inverse of `chunk`."""
        period, place = divmod(chunk, len(self._slots[which]))
        return period * self.period + int(self._slots[which][place])

    def count(self, which: int, slots: int) -> int:
        """How many of the first `slots` chunks of the stream are of a set."""
        period, rest = divmod(slots, self.period)
        return period * len(self._slots[which]) + int(np.searchsorted(self._slots[which], rest))


@lru_cache(maxsize=8)
def schedule(shares: tuple[int, ...]) -> Schedule:
    return Schedule(shares)


def _dealt(shares: Sequence[int]) -> list[int]:
    """The set of each slot of a period."""
    period, had = sum(shares), [0] * len(shares)
    dealt = []
    for slot in range(1, period + 1):
        due = [k for k, share in enumerate(shares) if had[k] * period < share * slot]
        first = min(due, key=lambda k: -(-(had[k] + 1) * period // shares[k]))
        had[first] += 1
        dealt.append(first)
    return dealt
