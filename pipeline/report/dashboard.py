"""One page of several runs: how each is, their curves in the same charts, their scores, how their configs differ."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import leaves
from pipeline.evaluate.score import Score
from pipeline.goodput import Goodput
from pipeline.report.charts import Mark, Series, key, line_chart, thinned, trend
from pipeline.report.data import ReportData
from pipeline.report.document import header, section, write_document
from pipeline.report.figures import (
    Points,
    clock,
    column,
    done,
    last_loss,
    last_step,
    ln_k,
    number,
    pace,
    percent,
    settled,
    times,
    wait_percent,
    waits,
)
from pipeline.report.markup import Markup, element, join
from pipeline.report.provenance import folded, table
from pipeline.report.scores import scores
from pipeline.report.training import marks

MOST_RUNS = 10  # that colours tell apart
RECENT = 200  # rows, whose pace the table shows


@dataclass(frozen=True)
class Curve:
    """A chart of the page: what of a run it shows, and how."""

    title: str
    of: Callable[[ReportData], Points]
    unit: str = ""
    from_zero: bool = True
    smooth: bool = True
    about: str = ""


LOSS = Curve("Loss", lambda data: column(data, "loss"), from_zero=False, about="Moving means over a fortieth of a run.")
CURVES = (
    Curve("Gradient norm", lambda data: column(data, "grad_norm")),
    Curve("Learning rate", lambda data: column(data, "lr"), smooth=False),
    Curve("Prototypes in use", lambda data: column(data, "prototypes_used", 100), " %", smooth=False),
    Curve("Entropy of a code, of ln K", lambda data: column(data, "code_entropy", 100), " %", smooth=False),
    Curve("Images a second", pace),
    Curve("Waiting for data", waits, " %", about="Share of a step, of the rank that waits longest."),
)


@dataclass(frozen=True)
class Brief:
    """What the page keeps of a run, whose rows may be many.

    state, look: as `make status` words them. figures: the table's. config: by whole keys, as optim.lr. curves: by the
    titles of LOSS and CURVES. done: steps. happened: sentences, the oldest first.
    """

    run: str
    state: str
    look: str
    figures: tuple[str, ...]
    config: Mapping[str, Any]
    curves: Mapping[str, Points]
    marks: Sequence[Mark]
    ln_k: float
    done: int
    scores: Sequence[Score]
    happened: Sequence[str]


HEAD = ("Run", "State", "Step", "Loss", "ln K", "Images/s", "Waits", "Goodput", "Restarts")


def brief(data: ReportData, state: str, look: str, good: Goodput | None, happened: Sequence[str]) -> Brief:
    """What the page keeps of a run. good: None before its first start."""
    curves = {curve.title: _points(curve, data) for curve in (LOSS, *CURVES)}
    return Brief(
        run=data.run,
        state=state,
        look=look,
        figures=tuple(_figures(data, good)),
        config=dict(leaves(data.config)),
        curves=curves,
        marks=marks(data),
        ln_k=ln_k(data),
        done=done(data),
        scores=data.scores,
        happened=happened,
    )


def _points(curve: Curve, data: ReportData) -> Points:
    steps, values = curve.of(data)
    one = thinned(Series(curve.title, steps, trend(values) if curve.smooth else values))
    return list(one.steps), list(one.values)


def _figures(data: ReportData, good: Goodput | None) -> Iterator[str]:
    """Of the columns of HEAD between the state and where to look."""
    rows = settled(data.rows[-RECENT:])
    yield f"{done(data):,} of {last_step(data):,}"
    yield f"{last_loss(data):.4f}" if data.rows.size else "-"
    yield f"{ln_k(data):.2f}"
    yield number(np.median(rows["images_s"])) if rows.size else "-"
    yield f"{wait_percent(rows).mean():.1f}\u00a0%" if rows.size else "-"
    yield from (percent(good.share), f"{good.restarts:,}") if good is not None else ("-", "-")


def write_dashboard(path: Path, runs: Sequence[Brief], time: float, again_s: int | None = None) -> None:
    """Write the page: one file, complete in itself. time: seconds since 1970, of the reading.

    again_s: after so long a browser reads the file again.
    """
    sections = (_head(runs, time), _curves(runs), _scores(runs), _differences(runs), _happened(runs))
    write_document(path, _title(runs), sections, ("style.css", "script.js"), again_s)


def _title(runs: Sequence[Brief]) -> str:
    return runs[0].run if len(runs) == 1 else times(len(runs), "run")


def _head(runs: Sequence[Brief], time: float) -> Markup:
    rows = [(key(run.run, f"run-{n}"), run.state, *run.figures) for n, run in enumerate(runs)]
    return header(
        f"Farseer, as of {clock(time)}",
        _title(runs),
        table(rows, HEAD, "runs"),
        *(element("p", key(run.run, f"run-{n}"), ": ", run.look) for n, run in enumerate(runs) if run.look),
    )


def _curves(runs: Sequence[Brief]) -> Markup:
    if not any(run.done for run in runs):
        return element("p", "No run has made a step yet.")
    one_k = len({run.ln_k for run in runs}) == 1
    reference = (runs[0].ln_k, f"ln K = {runs[0].ln_k:.2f}, guessing") if one_k else None
    return section(
        "Training",
        element("p", "All charts are over steps; point at one to read them all."),
        _chart(LOSS, runs, reference=reference, size="large"),
        element("div", *(_chart(curve, runs) for curve in CURVES), class_="charts"),
    )


def _chart(curve: Curve, runs: Sequence[Brief], **more: Any) -> Markup:
    series = [Series(run.run, *run.curves[curve.title], f"run-{n}") for n, run in enumerate(runs)]
    return line_chart(
        curve.title,
        series,
        last_step=_furthest(runs),
        marks=runs[0].marks if len(runs) == 1 else (),
        from_zero=curve.from_zero,
        unit=curve.unit,
        about=curve.about,
        legend=False,
        **more,
    )


def _furthest(runs: Sequence[Brief]) -> int:
    return max([1, *(run.done for run in runs), *(score.step for run in runs for score in run.scores)])


def _scores(runs: Sequence[Brief]) -> Markup:
    return scores([(run.run, run.scores) for run in runs], _furthest(runs))


def _differences(runs: Sequence[Brief]) -> Markup:
    """The keys that not all configs have alike."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = [
        (name, *(str(run.config.get(name, "-")) for run in runs))
        for name in names
        if any(run.config.get(name) != runs[0].config.get(name) for run in runs)
    ]
    if not rows:
        return join()
    head = ("Key", *(key(run.run, f"run-{n}") for n, run in enumerate(runs)))
    return section("What sets them apart", table(rows, head))


def _happened(runs: Sequence[Brief]) -> Markup:
    lists = (element("ul", *(element("li", text) for text in reversed(run.happened)), class_="plain") for run in runs)
    told = (folded(run.run, times(len(run.happened), "line"), of) for run, of in zip(runs, lists, strict=True))
    return section("What happened", element("div", *told, class_="more"))
