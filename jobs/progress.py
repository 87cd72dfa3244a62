"""A run's progress, followed on the shared disk: the newest row, and a line of it for a terminal."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.start import attempt_files
from jobs.verbs import say
from pipeline.journal import read_lines

RECENT = 20  # rows over which rates are taken
EVERY = 50  # steps between lines, where they are not written over
CLEAR = "\r\x1b[2K"  # a terminal's line
TAIL_BYTES = 16 * 1024


@dataclass
class Progress:
    """Follows a run's rows over all its attempts. `steps`: of the whole run; `prototypes`: K."""

    run_dir: Path
    steps: int
    prototypes: int
    _shown: int = field(default=0, init=False)

    def rows(self) -> list[dict[str, Any]]:
        """The newest rows of the newest attempt that has some, oldest first."""
        files = reversed(attempt_files(self.run_dir, "metrics.jsonl"))
        found: Iterator[list[dict[str, Any]]] = (read_lines(file, TAIL_BYTES)[-RECENT:] for file in files)
        return next((rows for rows in found if rows), [])

    def line(self, rows: Sequence[dict[str, Any]]) -> str:
        """Step, loss against ln K, images/s, data wait, time left; empty before the first."""
        if not rows:
            return ""
        result = rows[-1]["result"]
        seconds = sum(row["run"]["step_s"] for row in rows)
        waited = sum(row["run"]["wait_s"] for row in rows) / seconds
        images = len(rows) * rows[-1]["run"]["images_s"] * rows[-1]["run"]["step_s"] / seconds
        left = (self.steps - result["step"]) * seconds / len(rows)
        loss = "not finite" if result["loss"] is None else f"{result['loss']:.3f}"
        return (
            f"step {result['step']}/{self.steps}  loss {loss} (ln K {math.log(self.prototypes):.3f})  "
            f"{images:.0f} images/s  data wait {waited:.0%}  {int(left) // 60}:{int(left) % 60:02d} left"
        )

    def show(self) -> int:
        """One line that is written over on a terminal, elsewhere a new one now and then; returns the last step done."""
        rows = self.rows()
        step = int(rows[-1]["result"]["step"]) if rows else 0
        if sys.stdout.isatty():
            sys.stdout.write(f"{CLEAR}  {self.line(rows)}")
        elif step // EVERY > self._shown // EVERY:
            sys.stdout.write(f"  {self.line(rows)}\n")
        self._shown = step
        sys.stdout.flush()
        return step

    def tell(self, text: str) -> None:
        """A line of its own, above the progress."""
        say(f"{CLEAR if sys.stdout.isatty() else ''}  {text}")
