"""A page as one file: its styles and scripts inside, and the browser told to load nothing from anywhere."""

import base64
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


def header(eyebrow: str, title: str, *parts: str) -> Markup:
    """The top of a page: what it is, of what, and the few things that stand there."""
    return element("header", element("p", eyebrow, class_="eyebrow"), element("h1", title), *parts)


def lead(sentence: str) -> Markup:
    """What came out, in words."""
    return element("p", sentence, class_="lead")


def section(title: str, *parts: str) -> Markup:
    return element("section", element("h2", title), *parts)


def image(data: bytes, kind: str, words: str) -> Markup:
    """An encoded picture (kind: webp or jpeg), inside the page; words for those who do not see it."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return element("img", src=source, alt=words, loading="lazy")


def figures(told: Iterable[tuple[str, str, str]]) -> Markup:
    """The few numbers at the top: (what it is, its number, what it is to be held against)."""
    return element("dl", *(_figure(*one) for one in told), class_="figures")


def _figure(name: str, value: str, against: str) -> Markup:
    return element("div", element("dt", name), element("dd", value), element("dd", against, class_="against"))
