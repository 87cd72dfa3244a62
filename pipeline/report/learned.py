"""What the model saw and what it learned: crops, the evaluation as bars and as numbers, nearest neighbours."""

import math

from pipeline.evaluate.table import Evaluation, Row
from pipeline.report.charts import bars
from pipeline.report.data import Example, Neighbour, ReportData
from pipeline.report.document import image, section
from pipeline.report.figures import listed, percent
from pipeline.report.markup import Markup, element, join

COLUMNS = {
    "trained": "Trained",
    "untrained": "Untrained",
    "histogram": "Colour histogram",
    "pixels": "Raw pixels",
}
TRUNKS = {"trained": "Nearest under the trained trunk", "untrained": "Nearest under the untrained trunk"}


def seen(data: ReportData) -> Markup:
    """Crops as the trunk got them; nothing when there are none."""
    if not data.crops:
        return join()
    sizes = listed([f"{crop['count']} of {crop['size']} px" for crop in data.config["augment"]["crops"]])
    told = (
        f"Images of the first step: each whole, then its crops as the trunk got them, {sizes}. "
        "The loss asks that all crops of an image fall to the same prototypes."
    )
    pictures = (image(crop, "webp", f"Image {n} and its crops") for n, crop in enumerate(data.crops, start=1))
    return section("What the model saw", element("p", told), element("div", *pictures, class_="crops"))


def learned(data: ReportData) -> Markup:
    """The evaluation; nothing when there is none."""
    if data.evaluation is None:
        return join()
    names = {**COLUMNS, "chance": "Guessing"}
    about = "Per cent right, with the standard error that so many tiles bring. Bold: the best of a row."
    return section(
        "What it has learned",
        element("p", _protocol(data.evaluation)),
        element("ul", *(element("li", name, class_=key) for key, name in names.items()), class_="legend"),
        bars([(row.title, f"{row.tiles:,} tiles", _bars_of(row), row.chance) for row in data.evaluation.rows]),
        _losses_in_words(data.evaluation),
        element("h3", "The numbers"),
        _table(data.evaluation),
        element("p", about, class_="about"),
    )


def neighbours(data: ReportData) -> Markup:
    """Held-out tiles and what each trunk found nearest to them; nothing when there are none."""
    if not data.examples:
        return join()
    counts = {name: [n.right for example in data.examples for n in example.found[name]] for name in TRUNKS}
    right = listed([f"{sum(right)} of {len(right)} by the {name} trunk" for name, right in counts.items()])
    told = (
        f"{len(data.examples)} held-out tiles, taken at even distances before any result was known. Each is distorted, "
        f"then the nearest training tiles are looked up. From the right photograph: {right}."
    )
    head = (element("div", text) for text in ("Held out, and distorted", *TRUNKS.values()))
    return section(
        "Nearest neighbours",
        element("p", told),
        element("div", element("div", *head, class_="example head"), *map(_example, data.examples), class_="panel"),
    )


def _protocol(evaluation: Evaluation) -> str:
    facts = evaluation.facts
    return (
        f"{facts['bank']:,} tiles to learn from and {facts['held_out']:,} held out, from other places of the same "
        f"{facts['photographs']:,} photographs. Distorted means cropped, flipped, coloured and blurred, much as in "
        "training: this measures invariance on unseen places, not whether objects are understood. The untrained trunk "
        "is the same network with random weights; histogram and pixels need no network."
    )


def _bars_of(row: Row) -> list[tuple[str, float]]:
    return [(name, row.scores[name]) for name in COLUMNS]


def _losses_in_words(evaluation: Evaluation) -> Markup:
    behind = [row for row in evaluation.rows if row.ahead()]
    if not behind:
        return element("p", f"The trained trunk is the best in all {len(evaluation.rows)} rows.")
    lines = []
    for row in behind:
        others = listed([f"{percent(row.scores[name])} ({COLUMNS[name].lower()})" for name in row.ahead()])
        lines.append(element("li", f"{row.title}: {percent(row.scores['trained'])} against {others}."))
    told = f"Where the trained trunk loses: {len(behind)} of {len(evaluation.rows)} rows"
    return join(element("h3", told), element("ul", *lines, class_="loses"))


def _table(evaluation: Evaluation) -> Markup:
    names = ("Evaluation", *COLUMNS.values(), "Guessing", "Tiles")
    head = element("tr", *(element("th", name, scope="col") for name in names))
    table = element("table", element("thead", head), element("tbody", *map(_table_row, evaluation.rows)))
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Table of the evaluation")


def _table_row(row: Row) -> Markup:
    best = max(row.scores.values())
    cells = []
    for name in COLUMNS:
        score = row.scores[name]
        error = 100 * math.sqrt(score * (1 - score) / row.tiles)
        shown = (f"{100 * score:.1f} ", element("small", f"± {error:.1f}"))
        cells.append(element("td", *shown, class_="best" if score == best else None))
    cells += [element("td", f"{100 * row.chance:.1f}"), element("td", f"{row.tiles:,}")]
    return element("tr", element("th", row.title, scope="row"), *cells)


def _example(example: Example) -> Markup:
    clean = _tile(example.clean, f"Held-out tile of {example.label}")
    distorted = _tile(example.distorted, "The same tile, distorted")
    found = (
        element("div", element("h4", title), element("div", *map(_found, example.found[name]), class_="tiles"))
        for name, title in TRUNKS.items()
    )
    query = element("div", element("h4", example.label), element("div", clean, distorted, class_="tiles query"))
    return element("div", query, *found, class_="example")


def _found(neighbour: Neighbour) -> Markup:
    """Right and wrong differ in sign, in outline and in strength: not in colour alone."""
    verdict = "right" if neighbour.right else "wrong"
    sign = element("b", "✓" if neighbour.right else "✗", aria_hidden="true")
    return _tile(neighbour.image, f"{verdict}: {neighbour.label}", verdict, sign)


def _tile(tile: bytes, alt: str, verdict: str = "", *more: Markup) -> Markup:
    return element("span", image(tile, "jpeg", alt), *more, class_=f"tile {verdict}".strip(), title=alt)
