"""How much of a run's time brought it forward, how often it began again, and what was done twice.

In: a run's events, and of each attempt the first and the last row of its metrics. A pure function of these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Event = Mapping[str, Any]


class End(NamedTuple):
    """What an attempt's first row says, or its last. time: seconds since 1970, at the end of that step."""

    step: int
    time: float
    step_s: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "End":
        return cls(row["result"]["step"], row["run"]["time"], row["run"].get("step_s", 0.0))


@dataclass(frozen=True)
class Goodput:
    """productive_s: time of the steps that the run stands on; elapsed_s: from the first start on, pauses included."""

    restarts: int
    lost_steps: int  # done, and done again or still to be done again
    productive_s: float
    elapsed_s: float

    @property
    def share(self) -> float:
        """0 to 1."""
        return min(1.0, self.productive_s / self.elapsed_s) if self.elapsed_s > 0 else 0.0


def goodput(events: Sequence[Event], ends: Mapping[int, tuple[End, End]], until: float | None = None) -> Goodput | None:
    """ends: of each attempt that has rows, the first and the last one. until: by default the time of the last row.

    None for a run that never started. A later start that goes on from an older step takes back what lies between.
    """
    starts = sorted((event for event in events if event["event"] in ("started", "resumed")), key=_time)
    if not starts:
        return None
    lost, productive = 0, 0.0
    for number, start in enumerate(starts):
        if start["attempt"] not in ends:
            continue
        first, last = ends[start["attempt"]]
        done, begun = last.step, start["step"]
        stands = max(begun, min([done, *(later["step"] for later in starts[number + 1 :])]))
        lost += done - stands
        productive += (stands - begun) * _step_seconds(first, last)
    over = until if until is not None else max([_time(starts[-1]), *(last.time for _, last in ends.values())])
    return Goodput(len(starts) - 1, lost, productive, over - _time(starts[0]))


def _step_seconds(first: End, last: End) -> float:
    """Of a step of this attempt, on average; the first one's own time holds the start, too."""
    steps = last.step - first.step
    return (last.time - first.time) / steps if steps else last.step_s


def _time(event: Event) -> float:
    return float(event["time"])
