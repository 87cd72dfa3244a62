"""Numbers from a run's rows and events, and how numbers are written."""

import datetime
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from pipeline.report.data import ReportData

Row = dict[str, Any]
Points = tuple[list[int], list[float]]  # steps, and a value at each


def column(data: ReportData, key: str, scale: float = 1.0) -> Points:
    """A result, where it was measured."""
    told = [(row["result"]["step"], row["result"][key]) for row in data.rows if row["result"].get(key) is not None]
    return [step for step, _ in told], [scale * value for _, value in told]


def pace(data: ReportData) -> Points:
    """Images a second, as of `settled`."""
    rows = settled(data.rows)
    return [row["result"]["step"] for row in rows], [row["run"]["images_s"] for row in rows]


def waits(data: ReportData) -> Points:
    """`wait_percent`, as of `settled`."""
    rows = settled(data.rows)
    return [row["result"]["step"] for row in rows], [wait_percent(row) for row in rows]


def settled(rows: Sequence[Row]) -> list[Row]:
    """Without the first row of each attempt, whose time is that of starting up."""
    return [
        row
        for before, row in itertools.pairwise(rows)
        if before["run"]["attempt"] == row["run"]["attempt"] and row["run"]["step_s"]
    ]


def wait_percent(row: Row) -> float:
    """Of the step's time, how much the model waited for images."""
    share: float = row["run"]["wait_s"] / row["run"]["step_s"]
    return 100 * share


def last_loss(data: ReportData) -> float:
    """The mean of the last 20 steps that have one."""
    _, losses = column(data, "loss")
    return statistics.fmean(losses[-20:]) if losses else math.nan


def ln_k(data: ReportData) -> float:
    """The loss of a model that gives all prototypes the same probability."""
    return math.log(data.config["swav"]["prototypes"])


def last_step(data: ReportData) -> int:
    """As planned, or as far as the run got."""
    planned: list[int] = [event["steps"] for event in data.events if isinstance(event.get("steps"), int)]
    done: list[int] = [row["result"]["step"] for row in data.rows[-1:]]
    return max([1, *done, *planned[-1:]])


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """0.414 -> 41.4 %, with a space that does not break."""
    return f"{100 * share:.1f}\u00a0%"


def times(count: int, what: str, many: str = "") -> str:
    """2 of it, in words: `2 images`."""
    return f"{count:,} {what if count == 1 else many or what + 's'}"


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def date(time: float) -> str:
    """Of seconds since 1970: 23 November 2026."""
    return f"{_utc(time):%-d %B %Y}"


def clock(time: float) -> str:
    """Of seconds since 1970, to the second."""
    return f"{_utc(time):%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float) -> str:
    """In the two units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _utc(time: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time, datetime.UTC)
