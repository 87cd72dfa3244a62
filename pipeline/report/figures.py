"""Numbers from a run's rows and events, and how numbers are written."""

import datetime
import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.report.data import ReportData
from pipeline.report.rows import Rows

Points = tuple[list[int], list[float]]  # steps, and a value at each


def column(data: ReportData, key: str, scale: float = 1.0) -> Points:
    """A result, where it was measured."""
    return _measured(data.rows, scale * data.rows[key])


def pace(data: ReportData) -> Points:
    """Images a second, as of `settled`."""
    rows = settled(data.rows)
    return _measured(rows, rows["images_s"])


def waits(data: ReportData) -> Points:
    """`wait_percent`, as of `settled`."""
    rows = settled(data.rows)
    return _measured(rows, wait_percent(rows))


def _measured(rows: Rows, values: NDArray[np.float64]) -> Points:
    there = ~np.isnan(values)
    return rows["step"][there].tolist(), values[there].tolist()


def settled(rows: Rows) -> Rows:
    """Without the first row of each attempt, whose time is that of starting up."""
    others: Rows = rows[1:][(np.diff(rows["attempt"]) == 0) & (rows["step_s"][1:] > 0)]
    return others


def wait_percent(rows: Rows) -> NDArray[np.float64]:
    """Of each step's time, how much the model waited for images."""
    share: NDArray[np.float64] = rows["wait_s"] / rows["step_s"]
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
    return max([1, done(data), *planned[-1:]])


def done(data: ReportData) -> int:
    """The last step that the run has done, 0 before the first."""
    return int(data.rows["step"][-1]) if data.rows.size else 0


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
