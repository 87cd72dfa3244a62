"""`farseer config`: every key that a config, a site or a packing may have, with its default and its meaning."""

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from jobs.verbs import add_verb, json_option, say_found

if TYPE_CHECKING:
    from jobs.keys import Group

INDENT, NAME = 2, 38
DEFAULT = 22  # columns; a longer one pushes what it means to the next line
RUN = "A RUN: conf/*.yaml, SET="
SITE = "A SITE: conf/sites/*.yaml"
PACKING = "PACKING: SET= of make shards"


def config_verb(verbs: Any) -> None:
    options = add_verb(verbs, "config", config, "every key of a config: its default, and what it means")
    options.add_argument("--key", default="", help="only keys with this in their name, such as optim")
    json_option(options)


def config(options: argparse.Namespace) -> int:
    every = _every()
    found = {title: _named(groups, options.key) for title, groups in every.items()}
    if not any(found.values()):
        names = [key.name for groups in every.values() for group in groups for key in group.keys]
        near = ", ".join(difflib.get_close_matches(options.key, names, n=3, cutoff=0.4))
        raise UserError(f"KEY={options.key}: no key has that in its name" + (f"; near it: {near}" if near else ""))
    as_json = [
        {"of": title.partition(":")[0].lower(), "affects_results": group.affects_results, **key._asdict()}
        for title, groups in found.items()
        for group in groups
        for key in group.keys
    ]
    say_found(options, as_json, _lines(found))
    return 0


def _every() -> "dict[str, list[Group]]":
    from data_shards.pack import PackSettings, SourceOptions
    from jobs.keys import groups
    from jobs.site import Site
    from pipeline.config import Config

    return {
        RUN: list(groups(Config)),
        SITE: list(groups(Site)),
        PACKING: [*groups(PackSettings), *groups(SourceOptions)],
    }


def _named(groups: "list[Group]", part: str) -> "list[Group]":
    kept = (group._replace(keys=tuple(key for key in group.keys if part in key.name)) for group in groups)
    return [group for group in kept if group.keys]


def _lines(found: "dict[str, list[Group]]") -> Iterator[str]:
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    for title, groups in found.items():
        if groups:
            yield from ("", title)
        for group in groups:
            kept = " A run keeps what it began with." if group.affects_results else ""
            yield from ("", *textwrap.wrap(f"{group.name}: {group.about}{kept}".removeprefix(": "), width))
            for key in group.keys:
                default = "needed" if key.default is None else key.default
                yield from _key_lines(key.name, default, key.note, width)


def _key_lines(name: str, default: str, note: str, width: int) -> Iterator[str]:
    start = f"{'':{INDENT}}{name:{NAME}}{default:{DEFAULT}}".rstrip()
    margin = INDENT + NAME + DEFAULT + 2
    notes = textwrap.wrap(note, width - margin) or [""]
    if len(start) > margin - 2:
        yield start
    else:
        yield f"{start:{margin}}{notes.pop(0)}".rstrip()
    yield from (f"{'':{margin}}{line}" for line in notes if line)
