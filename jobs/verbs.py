"""What every verb of the program is made of: its options, what it says, and how it shows that it goes on."""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TextIO

from data_shards.errors import UserError

Verb = Callable[[argparse.Namespace], int]

# what of the AWS chain says whose keys, or which store's: a region or a bundle of certificates does not
NAMES_KEYS = re.compile(
    "AWS_(ACCESS_KEY_ID|CONFIG_FILE|CONTAINER_|DEFAULT_PROFILE|ENDPOINT_URL|PROFILE|ROLE_ARN|SHARED_CREDENTIALS_FILE|"
    "WEB_IDENTITY_TOKEN_FILE)"
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line, as everything else is said."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; make help, or {self.prog} --help, says what there is")


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


def use_keys(site: str | None) -> None:
    """Take the keys of a site; without one those that the environment names, else the local site's if it is up."""
    from jobs.site import LOCAL, load_site

    named = any(map(NAMES_KEYS.match, os.environ))
    if site or (LOCAL.exists() and not named):
        load_site(site or "local").activate()


def positive(text: str) -> int:
    """A number of an option that is no switch: 0 would mean something else than it says."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def above_zero(text: str) -> float:
    """A number that something is divided by."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def output(to: str | None, name: str) -> Path:
    """Where the user wants it, else in `var`."""
    from jobs.site import ROOT

    return Path(to or ROOT / "var" / name)


def output_file(to: str | None, name: str) -> Path:
    """The same for a file: under its own name where the user names a folder."""
    path = output(to, name)
    return path / Path(name).name if path.is_dir() else path


def json_option(options: argparse.ArgumentParser) -> None:
    options.add_argument("--json", action="store_true", help="for scripts")


class ProgressLine:
    """How a verb that takes a while shows that it goes on: a line on stderr, how far, how fast, how long it will take.

    On a terminal it is written over, a few times a second; elsewhere there is a new one every EVERY_S, the first after
    so long. Speed and time left are of what was done since the first call for the same `what`.
    """

    EVERY_S = 30.0
    TERMINAL_S = 0.1

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out or sys.stderr, clock
        self._terminal = self._out.isatty()
        self._what = ""
        self._began, self._first, self._told = 0.0, 0, 0.0

    def __call__(self, what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        now = self._clock()
        if what != self._what:
            self._what, self._began, self._first = what, now, done
            self._told = -math.inf if self._terminal else now
        if now - self._told < (self.TERMINAL_S if self._terminal else self.EVERY_S) and not (
            self._terminal and done == total
        ):
            return
        self._told = now
        text = _progress_text(what, done, total, bytes, refused, done - self._first, now - self._began)
        self._out.write(f"\r\x1b[2K{text}" + ("\n" if done == total else "") if self._terminal else f"{text}\n")
        self._out.flush()


def _progress_text(what: str, done: int, total: int, size: int, refused: int, new: int, seconds: float) -> str:
    parts = [f"{what} {done:,}" + (f"/{total:,} ({done / total:.0%})" if total else "")]
    if seconds > 0 and new:
        parts.append(f"{new / seconds:,.0f}/s")
    if seconds > 0 and size:
        parts.append(f"{size / seconds / 1e6:,.1f} MB/s")
    if refused:
        parts.append(f"{refused:,} refused")
    if new and done < total:
        parts.append(f"{duration((total - done) * seconds / new)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """In words, to two figures: 41 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), list[str]()
    for name, length in units:
        if left >= length or (name == "s" and not parts):
            parts.append(f"{left // length} {name}")
            left %= length
        elif parts:
            break
    return " ".join(parts[:2])


def bytes_text(number: float) -> str:
    """In words, to three figures: 17.2 GB."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def say_found(options: argparse.Namespace, found: Any, lines: Iterable[str]) -> None:
    """With --json what was found (plain values and dataclasses), else lines for people."""
    say(*([json.dumps(found, indent=2, default=asdict)] if options.json else lines))


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def complain(line: str) -> None:
    """What a user should know of, beside what was asked for."""
    sys.stderr.write(f"farseer: {line}\n")
