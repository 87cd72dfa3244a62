"""What a report shows. All of it may come from outside: the page escapes whatever it prints."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_shards.merge import Refusal
from pipeline.evaluate.score import Score
from pipeline.evaluate.table import Evaluation
from pipeline.report.rows import Rows


@dataclass(frozen=True)
class Neighbour:
    """An image of the bank. image: JPEG; right: whether it is of the same photograph as the query."""

    image: bytes
    label: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A held-out tile, the distorted form in which it was asked about, and what each trunk found nearest. JPEGs."""

    label: str
    clean: bytes
    distorted: bytes
    found: dict[str, Sequence[Neighbour]]  # column -> the nearest first


@dataclass(frozen=True)
class ReportData:
    """rows: one a step. events: as a run keeps them. config: as Config.dump gives it, all defaults filled in.

    scores: of evaluations on sets of any size, the oldest step first. crops: WebP pictures, the crops of one image
    each. environments: of each attempt, the first one first.
    """

    run: str
    config: dict[str, Any]
    rows: Rows
    events: Sequence[dict[str, Any]]
    evaluation: Evaluation | None = None
    scores: Sequence[Score] = ()
    crops: Sequence[bytes] = ()
    examples: Sequence[Example] = ()
    refused: Sequence[Refusal] = ()
    environments: Sequence[dict[str, Any]] = ()
    authors: Sequence[str] = ()
    facts: dict[str, str] = field(default_factory=dict)  # more lines for the run's facts
