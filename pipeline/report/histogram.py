"""How often values occur: bars over a logarithmic axis, and shares of named kinds."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.charts import Axis, figure, tick
from pipeline.report.figures import number, percent
from pipeline.report.markup import Markup, element

BINS = 48
MOST_TICKS = 7

_ROUND = [digit * 10.0**power for power in range(10) for digit in (1, 2, 5)]
_RATIOS = [1 / 10, 1 / 5, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 2, 3, 5, 10]


def histogram(
    title: str, values: NDArray[Any], write: Callable[[float], str], about: str, ratios: bool = False
) -> Markup:
    """Counts of positive values. write: a value in words. ratios: of two sides, so 1 is in the middle."""
    low, high = _limits(values, ratios)
    edges = np.geomspace(low, high, BINS + 1)
    counts = np.histogram(values, edges)[0]
    y = Axis.over(0, float(counts.max()), ticks=4)
    bars = (
        element(
            "g",
            element("title", f"{write(first)} to {write(last)}: {count:,}"),
            # a bar's whole column answers to the pointer
            element("rect", class_="column", x=_at(n), y=0, width=_at(1), height=100),
            element("rect", class_="count", x=_at(n + 0.08), y=_down(y, count), width=_at(0.84), height=_up(y, count)),
        )
        for n, (first, last, count) in enumerate(zip(edges[:-1], edges[1:], counts.tolist(), strict=True))
        if count
    )
    grid = (element("line", class_="grid", x1=0, x2=100, y1=_down(y, at), y2=_down(y, at)) for at in y.ticks)
    words = f"{title}: {about}"
    drawing = element(
        "svg", *grid, *bars, viewBox="0 0 100 100", preserveAspectRatio="none", role="img", aria_label=words
    )
    ticks = [
        *(tick("y", round(_down(y, at), 2), number(at)) for at in y.ticks),
        *(tick("x", round(100 * where, 2), write(at)) for at, where in _ticks(low, high, ratios)),
    ]
    return figure(title, about, element("div", drawing, *ticks, class_="plot small"))


def shares(title: str, counts: Mapping[str, int], total: int, about: str = "") -> Markup:
    """A bar for each kind, in the order given; the longest has the full width."""
    most = max(counts.values(), default=1)
    rows = (
        element(
            "li",
            element("span", name, class_="kind", title=name),
            element("span", element("i", style=f"width:{100 * count / most:.2f}%"), class_="rail"),
            element("span", f"{count:,}", " ", element("small", percent(count / total)), class_="many"),
        )
        for name, count in counts.items()
    )
    return figure(title, about, element("ul", *rows, class_="shares"))


def ratio(value: float) -> str:
    """1.5 -> 3:2, 0.5 -> 1:2; what no small numbers give is 1.62:1."""
    simple = Fraction(value).limit_denominator(5)
    if abs(float(simple) / value - 1) < 0.01 and simple.numerator <= 10:
        return f"{simple.numerator}:{simple.denominator}"
    return f"{value:.3g}:1" if value >= 1 else f"1:{1 / value:.3g}"


def size(count: float) -> str:
    """Bytes in words: 84 kB."""
    power = min(4, max(0, int(math.log10(max(count, 1)) / 3)))
    return f"{number(count / 1000**power)}\u00a0{('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _limits(values: NDArray[Any], ratios: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if ratios:  # the same on both sides of 1, so that lying and standing images can be compared
        high = max(high, 1 / low, 2.0)
        low = 1 / high
    margin = 1.02 if high / low > 2 else 2.0
    return low / margin, high * margin


def _ticks(low: float, high: float, ratios: bool) -> Sequence[tuple[float, float]]:
    """Round values and where they lie from 0 to 1, not too many: powers of ten first, and 1 to 1."""
    span = math.log(high / low)
    order = sorted(_RATIOS, key=lambda r: (r != 1, -abs(math.log(r)) % 10)) if ratios else _by_roundness()
    found: list[tuple[float, float]] = []
    for value in order:
        where = math.log(value / low) / span
        if 0 <= where <= 1 and all(abs(where - other) > 1 / (MOST_TICKS + 1) for _, other in found):
            found.append((value, where))
    return sorted(found)


def _by_roundness() -> list[float]:
    return sorted(_ROUND, key=lambda value: (round(value / 10 ** math.floor(math.log10(value) + 1e-9)), value))


def _at(bin_: float) -> float:
    return round(100 * bin_ / BINS, 3)


def _down(axis: Axis, count: float) -> float:
    return round(100 * (1 - axis.share(count)), 3)


def _up(axis: Axis, count: float) -> float:
    return round(100 * axis.share(count), 3)
