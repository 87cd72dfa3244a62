"""What came of an exam, as it lies in the run's folder. Needs no torch: what looks at runs is there at once."""

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import dataclass

from data_shards.store import Store

TITLES = {
    "knn1": "1 neighbour",
    "knn20": "20 neighbours",
    "knn200": "200 neighbours",
    "probe": "linear probe",
    "probe_top5": "probe, first 5",
}


@dataclass(frozen=True)
class Score:
    """Shares of held-out images that come out right, 0 to 1, under the keys of TITLES. size: pixels.

    bank, held_out: how many images. decay: the probe's, as the bank chose it.
    """

    run: str
    step: int
    bank_url: str
    held_out_url: str
    size: int
    bank: int
    held_out: int
    classes: int
    decay: float
    right: dict[str, float]


def read_scores(run: Store, name: str = "*") -> list[Score]:
    """The scores in a run's folder, the oldest step first. name: an exam's, by default those of all."""
    paths = sorted(entry.path for entry in run.list("eval"))
    return [Score(**json.loads(run.get(path))) for path in fnmatch.filter(paths, score_path("*", name))]


def score_path(step: str, exam: str) -> str:
    """In the run's folder."""
    return f"eval/step-{step}/score-{exam}.json"


def lines(score: Score, history: Iterable[Score]) -> list[str]:
    """For a terminal: what was asked, and a row for each step that was asked so."""
    rows = [["step", *TITLES.values()]]
    rows += [[f"{one.step:,}", *(f"{one.right[key]:.1%}" for key in TITLES)] for one in history]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        f"{score.run}: {score.bank:,} images of {score.bank_url} to learn {score.classes:,} classes from, "
        f"{score.held_out:,} of {score.held_out_url} to tell apart, at {score.size} pixels; guessing: "
        f"{1 / score.classes:.1%}",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
    ]
