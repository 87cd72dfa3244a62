"""How long a start took to bring its run forward again, told once, when it has come to a step that is new.

In: the rows that earlier attempts left on the shared disk. A start at another site, which has none of them, tells
nothing.
"""

from pathlib import Path
from typing import Any

from pipeline.journal import attempt_folders, last_line


class Recovery:
    """folder: the run's on the shared disk. attempt: this one. start: the step that it goes on from."""

    def __init__(self, folder: Path, attempt: int, start: int) -> None:
        earlier = [path / "metrics.jsonl" for number, path in attempt_folders(folder).items() if number < attempt]
        last = [row for row in map(last_line, earlier) if row is not None]
        self._start = start
        self._reached = max((row["result"]["step"] for row in last), default=None)
        self._heard = max((row["run"]["time"] for row in last), default=0.0)

    def step(self, step: int, time: float) -> dict[str, Any] | None:
        """A step has ended, at that time; what to tell if it is the first new one."""
        if self._reached is None or step <= self._reached:
            return None
        redone, self._reached = max(0, self._reached - self._start), None
        return {"step": step, "seconds": round(time - self._heard, 1), "redone": redone}
