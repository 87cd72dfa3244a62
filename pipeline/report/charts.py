"""Charts as inline SVG and a little HTML: curves over steps, and grouped bars.

A curve's drawing stretches with the page; its lines keep their width, and its words are HTML at percentages, so that
they keep their size. The drawing's own coordinates are percentages too, from the upper left corner.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.figures import number
from pipeline.report.markup import Markup, element, join

MOST_POINTS = 600  # of a curve; more are averaged, a screen does not show them


@dataclass(frozen=True)
class Series:
    """A curve. kind is its look: trend, raw (faint, behind the others), second; run-0, run-1, ... of several runs."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    kind: str = "trend"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: preempted, resumed, ..."""

    step: int
    what: str


@dataclass(frozen=True)
class Axis:
    """From low to high, with ticks at round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, low: float, high: float, ticks: int = 5, tight: bool = False) -> "Axis":
        """Wide enough for both; ends at a tick unless it is tight."""
        if not high > low:
            low, high = low - 0.5, low + 0.5
        step = _round_step((high - low) / ticks)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        marks = [round(n * step, 12) for n in range(first, last + 1)]
        if tight:
            return cls(low, high, tuple(tick for tick in marks if low <= tick <= high))
        return cls(marks[0], marks[-1], tuple(marks))

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Frame:
    """Where steps and values lie in a drawing, in per cent from its upper left corner."""

    x: Axis
    y: Axis

    def along(self, step: float) -> float:
        return round(100 * self.x.share(step), 3)

    def down(self, value: float) -> float:
        return round(100 * (1 - self.y.share(value)), 3)

    def level(self, kind: str, value: float) -> Markup:
        """A horizontal line."""
        return element("line", class_=kind, x1=0, x2=100, y1=self.down(value), y2=self.down(value))

    def post(self, mark: Mark) -> Markup:
        """A vertical line."""
        at = self.along(mark.step)
        return element("line", class_=f"mark {mark.what}", data_step=mark.step, x1=at, x2=at, y1=0, y2=100)

    def curve(self, series: Series) -> Markup:
        points = [*zip(map(self.along, series.steps), map(self.down, series.values), strict=True)]
        look = series.kind
        if len(points) == 1:
            points, look = points * 2, f"{series.kind} dot"  # a line to itself is drawn, a point alone is not
        return element("polyline", class_=f"curve {look}", points=" ".join(f"{x},{y}" for x, y in points))


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    last_step: int,
    marks: Sequence[Mark] = (),
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    unit: str = "",
    size: str = "small",
    about: str = "",
    legend: bool = True,
) -> Markup:
    """Curves over steps 0 to last_step.

    marks: vertical lines. reference: a value and its name, a horizontal line. unit: behind each number. about: a
    sentence below. size: small or large. legend: the names of several curves.
    """
    series = [thinned(one) for one in series if one.values]
    if not series:
        return figure(title, "Not measured.")
    values = [value for one in series for value in one.values] + [
        value for value, _ in ([reference] if reference else [])
    ]
    y = Axis.over(0, max(values), ticks=4) if from_zero else _around(values)
    frame = Frame(Axis.over(0, last_step, ticks=5, tight=True), y)
    shown = [one for one in series if one.kind != "raw"]
    plot = element(
        "div",
        _drawing(frame, title, series, marks, reference),
        *(tick("y", frame.down(at), f"{at:,.10g}{unit}") for at in frame.y.ticks),
        *(tick("x", frame.along(at), f"{at:,.10g}") for at in frame.x.ticks),
        *_mark_labels(frame, marks),
        _reference_label(frame, *reference) if reference else "",
        element("div", element("output"), class_="cursor", hidden=True, aria_hidden="true"),
        class_=f"plot {size}",
    )
    keys = (key(one.name, one.kind) for one in (shown if legend and len(shown) > 1 else ()))
    return figure(title, about, plot, keys=keys, data=_hover_data(frame, shown, unit))


def figure(title: str, about: str, *inside: Markup, keys: Iterable[Markup] = (), data: str = "") -> Markup:
    """A chart with its title above, and a sentence about it below. keys: of its curves. data: for the script."""
    caption = element("figcaption", element("span", title, class_="name"), *keys)
    below = element("p", about, class_="about") if about else ""
    return element("figure", caption, *inside, below, data, class_="chart")


def tick(axis: str, percent: float, text: str) -> Markup:
    """A number beside an axis, y or x; percent: of the drawing's height or width."""
    side = "top" if axis == "y" else "left"
    return element("span", text, class_=f"tick {axis}", style=f"{side}:{percent}%")


def key(name: str, kind: str) -> Markup:
    """A name beside the look of its curves."""
    return element("span", name, class_=f"key {kind}")


def bars(groups: Sequence[tuple[str, str, Sequence[tuple[str, float]], float]]) -> Markup:
    """Groups of bars for shares from 0 to 1: (title, note, (kind, share) for each bar, what guessing gives)."""
    return element("div", *(_bar_group(*group) for group in groups), class_="bars")


def trend(values: Sequence[float]) -> list[float]:
    """A moving mean over a fortieth of the curve, at least five values; shorter at the ends, where there are fewer."""
    half = max(5, len(values) // 40) // 2
    sums = np.cumsum([0.0, *values])
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    smooth: list[float] = ((sums[end] - sums[first]) / (end - first)).tolist()
    return smooth


def thinned(series: Series) -> Series:
    """At most MOST_POINTS points, each the mean of its neighbours, at their last step."""
    count = len(series.steps)
    if count <= MOST_POINTS:
        return series
    ends = [round((n + 1) * count / MOST_POINTS) for n in range(MOST_POINTS)]
    parts = list(zip([0, *ends[:-1]], ends, strict=True))
    values = [sum(series.values[first:end]) / (end - first) for first, end in parts]
    return Series(series.name, [series.steps[end - 1] for _, end in parts], values, series.kind)


def _around(values: Sequence[float]) -> Axis:
    margin = 0.04 * (max(values) - min(values))
    return Axis.over(min(values) - margin, max(values) + margin, ticks=6, tight=True)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least * (1 - 1e-9))


def _drawing(
    frame: Frame, title: str, series: Sequence[Series], marks: Sequence[Mark], reference: tuple[float, str] | None
) -> Markup:
    behind_first = sorted(series, key=lambda one: one.kind != "raw")
    return element(
        "svg",
        *(frame.level("grid", at) for at in frame.y.ticks),
        *map(frame.post, marks),
        frame.level("reference", reference[0]) if reference else "",
        *map(frame.curve, behind_first),
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        role="img",
        aria_label=_in_words(title, series, marks),
    )


def _in_words(title: str, series: Sequence[Series], marks: Sequence[Mark]) -> str:
    curves = [
        f"{one.name} from {number(one.values[0])} to {number(one.values[-1])}"
        for one in series
        if one.kind != "raw" and one.values
    ]
    return "; ".join([f"{title}: {', '.join(curves)}", *(f"{mark.what} at step {mark.step}" for mark in marks)])


def _mark_labels(frame: Frame, marks: Sequence[Mark]) -> Iterator[Markup]:
    """Words above the lines: what stopped the run to the left of its line, what went on to the right.

    Near an edge, and of lines near each other, all in one label. Of many marks none has words: they would cover each
    other.
    """
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: mark.step):
        if groups and frame.along(mark.step) - frame.along(groups[-1][0].step) < _LABEL:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    for group in groups if len(groups) <= 3 else ():
        at, here = frame.along(group[0].step), [mark.what for mark in group]
        if not _LABEL < at < 100 - _LABEL or group[0].step != group[-1].step:
            yield _mark_label(" · ".join(here), here[-1], "before" if at > 50 else "behind", at)
            continue
        for what in here:
            yield _mark_label(what, what, "behind" if what == "resumed" else "before", at)


def _mark_label(text: str, what: str, side: str, at: float) -> Markup:
    return element("span", text, class_=f"mark-label {what} {side}", style=f"left:{at}%")


def _reference_label(frame: Frame, value: float, name: str) -> Markup:
    return element("span", name, class_="reference-label", style=f"top:{frame.down(value)}%")


def _hover_data(frame: Frame, shown: Sequence[Series], unit: str) -> Markup:
    """For the script: the steps and the values as they are printed. `<` cannot end the element."""
    curves = [[list(one.steps), [number(value) + unit for value in one.values], one.name] for one in shown]
    text = json.dumps({"last": frame.x.high, "series": curves}, separators=(",", ":"))
    return element("script", Markup(text.replace("<", "\\u003c")), type="application/json")


_LABEL = 15  # per cent of the width that a word takes
_BAR, _GAP, _FULL = 14, 4, 86  # pixels, pixels, the percentage of the width that stands for 1


def _bar_group(title: str, note: str, values: Sequence[tuple[str, float]], chance: float) -> Markup:
    rows = []
    for place, (kind, share) in enumerate(values):
        top, width = place * (_BAR + _GAP), f"{_FULL * share:.2f}%"
        rows.append(element("rect", class_=f"bar {kind}", x=0, y=top, width=width, height=_BAR, rx=2))
        rows.append(element("text", f"{100 * share:.1f}", x=width, dx=6, y=top + _BAR - 3, class_=f"value {kind}"))
    height = len(values) * (_BAR + _GAP) - _GAP
    guess = f"{_FULL * chance:.2f}%"
    rows.append(element("line", class_="chance", x1=guess, x2=guess, y1=-2, y2=height + 2))
    told = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in values)
    drawing = element("svg", *rows, height=height, role="img", aria_label=f"{title}: {told}")
    return element("div", element("h4", join(title, " ", element("small", note))), drawing, class_="group")
