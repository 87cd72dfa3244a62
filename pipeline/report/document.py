"""A page as one file: its styles and scripts inside, and the browser told to load nothing from anywhere."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from data_shards.whole import write_whole
from pipeline.report.markup import Markup, element, join

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_document(
    path: Path, title: str, sections: Iterable[Markup], parts: Sequence[str], again_s: int | None = None
) -> None:
    """Write a page that takes an older one's place whole, or not at all.

    parts: styles and scripts beside this file. again_s: how long until a browser reads the file again.
    """
    told = {name: Markup((files(__package__) / name).read_text("utf-8")) for name in parts}
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", http_equiv="refresh", content=again_s) if again_s is not None else "",
        element("title", f"{title} · Farseer"),
        *(element("style", text) for name, text in told.items() if name.endswith(".css")),
    )
    scripts = (element("script", text) for name, text in told.items() if name.endswith(".js"))
    foot = element("footer", "This page is one file and needs no network.")
    body = element("body", element("main", *sections, foot), *scripts)
    write_whole(path, join(Markup("<!doctype html>\n"), element("html", head, body, lang="en")))


def figures(told: Iterable[tuple[str, str, str]]) -> Markup:
    """The few numbers at the top: (what it is, its number, what it is to be held against)."""
    return element("dl", *(_figure(*one) for one in told), class_="figures")


def _figure(name: str, value: str, against: str) -> Markup:
    return element("div", element("dt", name), element("dd", value), element("dd", against, class_="against"))
