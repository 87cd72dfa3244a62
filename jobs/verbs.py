"""What every verb of the program is made of: its options, what it says, and how it shows that it goes on."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

Verb = Callable[[argparse.Namespace], int]


def add_verb(verbs: Any, name: str, function: Verb, text: str) -> argparse.ArgumentParser:
    options: argparse.ArgumentParser = (
        verbs.add_parser(name) if text == argparse.SUPPRESS else verbs.add_parser(name, help=text, description=text)
    )
    options.set_defaults(run_verb=function)
    return options


def site_option(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--site", default=os.environ.get("SITE") or "local", help="conf/sites/<name>.yaml, or its path"
    )


def json_option(options: argparse.ArgumentParser) -> None:
    options.add_argument("--json", action="store_true", help="for scripts")


def progress() -> Callable[[str, int, int], None] | None:
    """A line on stderr that is written over, where a terminal shows it."""
    if not sys.stderr.isatty():
        return None

    def show(what: str, done: int, total: int) -> None:
        sys.stderr.write(f"\r\x1b[2K{what} {done:,}/{total:,}" + ("\n" if done == total else ""))
        sys.stderr.flush()

    return show


def table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
