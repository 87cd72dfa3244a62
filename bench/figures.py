"""What benchmarks found: one flat file of names and numbers, var/bench.json, to which each adds its own."""

import json
from collections.abc import Mapping
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / "var" / "bench.json"


def keep(figures: Mapping[str, float]) -> None:
    FIGURES.parent.mkdir(exist_ok=True)
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps({**known, **figures}, indent=1) + "\n")
