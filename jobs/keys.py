"""Every key that a config may have: its default, and what it means in the words beside it in its section."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from data_shards.section import Section
from pipeline.config import section_in

_FOR_TOOLS = re.compile(r"noqa|type: ignore")


class Key(NamedTuple):
    """`name`: dotted, [] for what a list holds. `default`: as YAML has it; None where one has to be given."""

    name: str
    default: str | None
    note: str


class Group(NamedTuple):
    """The keys of a section, and what it is for. affects_results: whether a run keeps what it began with."""

    name: str
    about: str
    affects_results: bool
    keys: tuple[Key, ...]


def groups(root: type[Section], name: str = "") -> Iterator[Group]:
    """The root's own keys as the group `name`, then a group for each of its sections."""
    inner = {key: section for key, field in root.model_fields.items() if (section := _whole_section(field))}
    about, affects = ("", False) if inner else (_about(root), root.affects_results)
    yield Group(name, about, affects, tuple(_keys(root, "")))
    for key, section in inner.items():
        yield Group(key, _about(section), section.affects_results, tuple(_keys(section, f"{key}.")))


def _keys(section: type[Section], prefix: str) -> Iterator[Key]:
    """Its own, and those of what its lists hold."""
    notes = _notes(section)
    for name, field in section.model_fields.items():
        if _whole_section(field):
            continue
        inner = section_in(field.annotation)
        note = "; ".join(filter(None, (_choices(field.annotation), notes.get(name, ""))))
        yield Key(prefix + name, _default(field), note or (_about(inner) if inner else ""))
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}[].")


def _whole_section(field: FieldInfo) -> type[Section] | None:
    """The section that a field is; None for one that is something else, or a list of sections."""
    section = section_in(field.annotation)
    return section if section is field.annotation else None


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _choices(annotation: Any) -> str:
    return " | ".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ""


def _about(section: type[Section]) -> str:
    """Its docstring, on one line."""
    return " ".join((section.__doc__ or "").split())


def _notes(section: type[Section]) -> dict[str, str]:
    """The comment beside each field, or the lines of it above; of the classes that it inherits from, too."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if issubclass(owner, Section) and owner is not Section:
            source = textwrap.dedent(inspect.getsource(owner))
            comments = dict(_comments(source))
            (tree,) = ast.parse(source).body
            assert isinstance(tree, ast.ClassDef)
            for node in tree.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found[node.target.id] = _beside(node, comments) or _above(node, comments, source.splitlines())
    return found


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each that is for people."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said = "" if _FOR_TOOLS.search(token.string) else token.string.lstrip("# ")
            yield token.start[0], re.sub(r"\bNone\b", "null", said)  # as YAML has it


def _beside(node: ast.AnnAssign, comments: dict[int, str]) -> str:
    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return " ".join(filter(None, (comments.get(line, "") for line in lines)))


def _above(node: ast.AnnAssign, comments: dict[int, str], lines: list[str]) -> str:
    """Of lines that hold nothing else."""
    first = node.lineno
    while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return " ".join(comments[line] for line in range(first, node.lineno))
