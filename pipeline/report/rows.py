"""What pages show of the rows of a run, as columns: 88 bytes a row, where one of JSON takes some 5,000 in memory.

A long run has a hundred megabytes of rows, and a page that is kept up to date looks at them twice a minute: what was
read stays read.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.store import Store
from pipeline.goodput import End
from pipeline.journal import standing, whole_lines

RESULT = ("loss", "lr", "grad_norm", "prototypes_used", "code_entropy")
RUN = ("time", "step_s", "wait_s", "images_s")
ROW = np.dtype([("attempt", np.int64), ("step", np.int64), *((name, np.float64) for name in (*RESULT, *RUN))])
Rows = NDArray[np.void]  # of ROW


def columns(rows: Iterable[dict[str, Any]]) -> Rows:
    """Rows as a run keeps them; what one has no number for is NaN."""
    return np.fromiter(map(_values, rows), ROW)


def in_order(rows: Rows) -> Rows:
    """One row a step, of the rows of all attempts: where one began again, the rows of those before it end."""
    return rows[standing(zip(rows["attempt"].tolist(), rows["step"].tolist(), strict=True))]


def ends(rows: Rows) -> dict[int, tuple[End, End]]:
    """Of each attempt, what its first and its last row say."""
    own = {int(a): np.sort(rows[rows["attempt"] == a], order="step") for a in np.unique(rows["attempt"])}
    return {attempt: (_end(some[0]), _end(some[-1])) for attempt, some in own.items()}


class RowReader:
    """Reads all rows that a run has by now, those of before from memory. One run each."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[int, Rows]] = {}  # of each file or segment: how many bytes, and what they hold

    def on_disk(self, files: Iterable[Path]) -> Rows:
        """Of the files of a run's attempts, which grow."""
        grown = {}
        for path in files:
            with suppress(FileNotFoundError):  # put aside meanwhile, for a later run of the same name
                name, part = self._grown(path)
                grown[name] = part
        self._parts = grown
        return self._all()

    def in_store(self, store: Store) -> Rows:
        """Of the segments in a run's folder, which stay as they are once they are there."""
        paths = [entry.path for entry in store.list("metrics")]
        waiting = {path: store.submit(store.read(path)) for path in paths if path not in self._parts}
        new = {path: (0, _read(segment.result().splitlines())) for path, segment in waiting.items()}
        self._parts = {path: new.get(path) or self._parts[path] for path in paths}
        return self._all()

    def _grown(self, path: Path) -> tuple[str, tuple[int, Rows]]:
        with path.open("rb") as file:
            name = f"{path}:{os.fstat(file.fileno()).st_ino}"  # a later run of the same name has another file there
            end, known = self._parts.get(name, (0, _NONE))
            file.seek(end)

            def ended() -> Iterator[bytes]:
                nonlocal end
                for line in file:
                    if line.endswith(b"\n"):  # else it is on its way
                        end += len(line)
                        yield line

            rows = np.concatenate([known, _read(ended())])
        return name, (end, rows)

    def _all(self) -> Rows:
        return np.concatenate([_NONE, *(rows for _, rows in self._parts.values())])


_NONE = np.empty(0, ROW)


def _end(row: np.void) -> End:
    return End(int(row["step"]), float(row["time"]), float(row["step_s"]))


def _read(lines: Iterable[bytes]) -> Rows:
    return columns(row for _, row in whole_lines(lines))


def _values(row: dict[str, Any]) -> tuple[Any, ...]:
    result, run = row["result"], row["run"]
    return run["attempt"], result["step"], *map(result.get, RESULT), *map(run.get, RUN)
