"""What an evaluation gives: rows of figures, and the neighbours of a few tiles. Plain values, as JSON takes them."""

from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = ("trained", "untrained", "histogram", "pixels")


@dataclass(frozen=True)
class Row:
    """One evaluation. scores: column -> share that is right, 0 to 1, of `tiles` tiles; chance: what guessing gives."""

    key: str
    title: str
    tiles: int
    chance: float
    scores: dict[str, float]

    def ahead(self) -> list[str]:
        """Columns that are better than the trained trunk, the best first."""
        better = [name for name, score in self.scores.items() if score > self.scores["trained"]]
        return sorted(better, key=lambda name: -self.scores[name])


@dataclass(frozen=True)
class Neighbours:
    """A distorted held-out tile and what of the bank is nearest to it.

    query: its place in the held-out tiles; shown: its place in Views.distorted. nearest: column -> places in the bank,
    best first; similarity: column -> their cosine similarities.
    """

    query: int
    shown: int
    nearest: dict[str, list[int]]
    similarity: dict[str, list[float]]


@dataclass(frozen=True)
class Evaluation:
    """All rows, neighbours of tiles that were chosen by rule, and what the figures rest on."""

    columns: tuple[str, ...]
    rows: list[Row]
    neighbours: list[Neighbours]
    facts: dict[str, Any]

    def row(self, key: str) -> Row:
        """Raises KeyError when that evaluation was not made (those of cut-outs, where there are none)."""
        return {row.key: row for row in self.rows}[key]

    def text(self) -> list[str]:
        """The table for a terminal, in per cent; the best of each row has a star."""
        width = max(len(row.title) for row in self.rows)
        lines = [" " * width + "".join(f"{name:>12}" for name in self.columns)]
        for row in self.rows:
            best = max(row.scores.values())
            cells = (f"{row.scores[name]:.1%}" + ("*" if row.scores[name] == best else " ") for name in self.columns)
            lines.append(f"{row.title:{width}}" + "".join(f"{cell:>12}" for cell in cells))
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
