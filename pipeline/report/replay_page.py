"""The page of one step of a run: its images, each with the crops that the model saw."""

from pathlib import Path

from pipeline.augment import AugmentSettings
from pipeline.replay import Replayed, Shown
from pipeline.report.document import figures, header, image, lead, section, write_document
from pipeline.report.markup import Markup, element
from pipeline.report.pictures import crop_strips


def write_replay(path: Path, replayed: Replayed) -> None:
    """Write the page: one file, complete in itself."""
    title = f"{replayed.run.rpartition('/')[2]}, step {replayed.step:,}"
    summary = lead(f"{replayed.lines()[1]}.")
    head = header("Farseer, a step made again", title, summary, figures(_figures(replayed)))
    told = "Each image whole, then its crops as the trunk got them."
    pictures = element("div", *(_picture(shown, replayed.augment) for shown in replayed.shown), class_="crops")
    write_document(path, title, (head, section("Images", element("p", told), pictures)), ("style.css",))


def _figures(replayed: Replayed) -> list[tuple[str, str, str]]:
    row = replayed.row
    forms = {"loss": "{:.4f}", "lr": "{:.5f}", "grad_norm": "{:.3f}"}
    known = [(key, form.format(row[key])) for key, form in forms.items() if row.get(key) is not None]
    shown = ("Images", f"{replayed.images:,}", f"{len(replayed.shown)} shown")
    return [shown, *((name, value, "of the step's row") for name, value in known)]


def _picture(shown: Shown, augment: AugmentSettings) -> Markup:
    (strip,) = crop_strips(shown.crops, [shown.image], augment.mean, augment.std)
    stood_in = f", in the place of {', '.join(map(str, shown.replaced))}" if shown.replaced else ""
    name = f"{shown.name} (lane {shown.lane}{stood_in})"
    return element("figure", image(strip, "webp", name), element("figcaption", name))
