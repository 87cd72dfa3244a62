"""What benchmarks are asked on the command line, and what they found.

That is one flat file of names and numbers, var/bench.json, to which each adds its own.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / "var" / "bench.json"


def options(description: str | None, **defaults: int) -> argparse.Namespace:
    """A number for each name: the default, or what the command line says, as `--rounds 8`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def keep(figures: Mapping[str, float]) -> None:
    FIGURES.parent.mkdir(exist_ok=True)
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps({**known, **figures}, indent=1) + "\n")
