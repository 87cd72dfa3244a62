"""The page of a shard set: pictures first, then charts, what was refused, and how it was packed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.report.document import figures, header, image, lead, section, write_document
from pipeline.report.figures import date, listed, number, times
from pipeline.report.histogram import histogram, ratio, shares, size
from pipeline.report.markup import Markup, element
from pipeline.report.preview import Preview, Shown
from pipeline.report.provenance import folded, table

MOST_LABELS = 20


def write_preview(path: Path, preview: Preview) -> None:
    """Write the page: one file, complete in itself."""
    sections = (part(preview) for part in (_head, _sheet, _charts, _refused, _packing))
    write_document(path, _name(preview), sections, ("style.css", "preview.css"))


def _name(preview: Preview) -> str:
    return preview.url.rstrip("/").rpartition("/")[2]


def _head(preview: Preview) -> Markup:
    eyebrow = f"Farseer, a shard set as of {date(preview.time)}"
    return header(eyebrow, _name(preview), lead(_summary(preview)), figures(_figures(preview)))


def _summary(preview: Preview) -> str:
    manifest, sampled = preview.manifest, preview.sampled
    text = f"{times(manifest.samples, 'image')} in {times(len(manifest.shard_samples), 'shard')}"
    if sampled.formats:
        width, height, weight = (float(np.median(sampled.column(name))) for name in ("width", "height", "size"))
        text += f"; the median is {width:,.0f} \u00d7 {height:,.0f} pixels and {size(weight)}"
    refused = sum(manifest.refused.values())
    text += f"; {refused:,} more were refused" if refused else "; none was refused"
    return f"{text}, and {preview.removed:,} are removed." if preview.removed else f"{text}."


def _figures(preview: Preview) -> Iterator[tuple[str, str, str]]:
    manifest = preview.manifest
    shards, weight = len(manifest.shard_bytes), sum(manifest.shard_bytes)
    yield "Images", _short(manifest.samples), f"{manifest.samples / shards:,.0f} a shard"
    yield "Shards", _short(shards), f"{size(weight / shards)} each"
    yield "Bytes", size(weight), f"{size(weight / manifest.samples)} an image"
    for kind, count in preview.sampled.formats.most_common(1):
        share = f"{100 * count / preview.sampled.formats.total():.0f}\u00a0% {kind}"
        yield "Formats", str(len(preview.sampled.formats)), share
    reasons = max(manifest.refused, key=lambda reason: manifest.refused[reason], default="")
    yield "Refused", _short(sum(manifest.refused.values())), f"most: {reasons}" if reasons else "when packed"
    yield "Removed", _short(preview.removed), "not shown in training"


def _short(count: int) -> str:
    """1,234 or 1.23 billion."""
    for power, name in ((10**9, "billion"), (10**6, "million")):
        if count >= power:
            return f"{number(count / power)}\u00a0{name}"
    return f"{count:,}"


def _sheet(preview: Preview) -> Markup:
    told = f"{times(len(preview.shown), 'image')}, sampled evenly; point at one, or tap it, to see which it is."
    return section("Images", element("p", told), element("div", *map(_shot, preview.shown), class_="sheet"))


def _shot(shown: Shown) -> Markup:
    """A picture in its own proportions; its words appear at the bottom of the window."""
    aspect = min(2.6, max(0.45, shown.width / shown.height)) if shown.height else 1.0
    words = (
        element("b", shown.source or shown.key),
        element("span", " · ".join(filter(None, [shown.label, shown.source and shown.key]))),
        element("span", f"{shown.width:,} \u00d7 {shown.height:,}, {shown.format}, {size(shown.size)}"),
    )
    picture = (
        image(shown.picture, "webp", shown.source or shown.key)
        if shown.picture
        else element("em", f"cannot be shown: {shown.why}")
    )
    caption = element("figcaption", *words)
    return element("figure", picture, caption, class_="shot", tabindex=0, style=f"--aspect:{aspect:.3f}")


def _charts(preview: Preview) -> Markup:
    sampled, manifest = preview.sampled, preview.manifest
    counted = sampled.formats.total()
    shards = len(manifest.shard_samples)
    whole = sampled.shards == shards
    told = f"Of all {counted:,} images." if whole else (
        f"Of {counted:,} images, from {sampled.shards:,} of {shards:,} shards, evenly spaced."
    )  # fmt: skip
    if not counted:
        return section("Sizes and kinds", element("p", "Every place that was read is empty."))
    sides = [sampled.column(name) for name in ("width", "height")]
    kinds = dict(sampled.formats.most_common())
    charts = [
        *(histogram(f"{name}, pixels", values, number, _range(values, number))
          for name, values in zip(("Width", "Height"), sides, strict=True)),
        histogram("Aspect, width to height", sides[0] / sides[1], ratio, _aspects(*sides), ratios=True),
        histogram("Bytes of an image", sampled.column("size"), size, _range(sampled.column("size"), size)),
        shares("Formats", kinds, counted),
        *_labels(preview, counted),
    ]  # fmt: skip
    return section(
        "Sizes and kinds",
        element("p", f"{told} Sizes are as images are seen, after EXIF's orientation; their axes are logarithmic."),
        element("div", *charts, class_="charts"),
    )


def _range(values: NDArray[np.float64], write: Callable[[float], str]) -> str:
    low, median, high = (write(float(value)) for value in np.quantile(values, (0, 0.5, 1)))
    return f"From {low} to {high}; half are below {median}." if low != high else f"All {low}."


def _aspects(width: NDArray[np.float64], height: NDArray[np.float64]) -> str:
    parts = ((width > height, "landscape"), (width < height, "portrait"), (width == height, "square"))
    return (
        listed([f"{100 * float(which.mean()):.0f}\u00a0% {what}" for which, what in parts if which.mean() >= 0.005])
        + "."
    )


def _labels(preview: Preview, counted: int) -> Iterator[Markup]:
    labels = preview.sampled.labels
    if not labels:
        return
    shown = dict(sorted(labels.items(), key=lambda one: (-one[1], one[0]))[:MOST_LABELS])
    without = counted - labels.total()
    about = f"The {len(shown)} most frequent of {len(labels):,}." if len(labels) > len(shown) else ""
    yield shares("Labels", shown, counted, f"{about} {without:,} have none.".strip() if without else about)


def _refused(preview: Preview) -> Markup:
    reasons = sorted(preview.manifest.refused.items(), key=lambda one: -one[1])
    total = sum(count for _, count in reasons)
    if not total:
        return section("Refused", element("p", "No image was refused."))
    rows = [(one.source, one.reason, one.detail) for one in preview.refused]
    listing = table(rows, ("Source", "Reason", "What was found"))
    return section(
        "Refused",
        element("p", f"{times(total, 'source')} did not become a sample. All are listed in {preview.url}/refused/."),
        shares("Reasons", dict(reasons), total),
        element("div", folded("Which", f"the first {len(rows):,}", listing), class_="more") if rows else "",
    )


def _packing(preview: Preview) -> Markup:
    manifest = preview.manifest
    facts = [
        ("Folder", preview.url),
        ("Layout", manifest.layout_id),
        ("Contents", manifest.contents_id),
        *((name.replace("_", " "), str(value)) for name, value in manifest.settings.items() if value is not None),
    ]
    if manifest.tars:
        facts.insert(1, ("Shards lie in", manifest.tars[0].rpartition("/")[0]))
    return section("How it was packed", table(facts))
