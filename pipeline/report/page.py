"""The report's page: what came out in a sentence and a few figures, then the sections."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.report.data import ReportData
from pipeline.report.document import figures, header, lead, write_document
from pipeline.report.figures import (
    date,
    done,
    last_loss,
    last_step,
    ln_k,
    number,
    percent,
    settled,
    times,
    wait_percent,
)
from pipeline.report.learned import learned, neighbours, seen
from pipeline.report.markup import Markup
from pipeline.report.provenance import images, run
from pipeline.report.scores import scores
from pipeline.report.training import training


def write_report(path: Path, data: ReportData) -> None:
    """Write the page: one file, complete in itself. It takes an older one's place whole, or not at all."""
    parts = (_head, training, seen, learned, neighbours, _scores, images, run)
    write_document(path, data.run, (part(data) for part in parts), ("style.css", "script.js"))


def _scores(data: ReportData) -> Markup:
    return scores([(data.run, data.scores)], last_step(data))


def _head(data: ReportData) -> Markup:
    began = f" of {date(data.events[0]['time'])}" if data.events else ""
    return header(f"Farseer, a pretraining run{began}", data.run, lead(_summary(data)), figures(_figures(data)))


def _summary(data: ReportData) -> str:
    """The one sentence."""
    if not data.rows.size:
        return "Nothing was trained yet: the run has no rows."
    text = (
        f"{done(data):,} steps of SwAV brought the loss to {last_loss(data):.2f}, where guessing costs {ln_k(data):.2f}"
    )
    preempted, resumed = (sum(event["event"] == name for event in data.events) for name in ("preempted", "resumed"))
    if preempted or resumed:
        text += f", across {times(preempted, 'preemption')} and {times(resumed, 'resume')}"
    if data.evaluation is not None:
        probe = data.evaluation.row("distorted_probe").scores
        text += (
            f"; a linear probe on its features names the photograph of {percent(probe['trained'])} of distorted tiles "
            f"from unseen places, on the untrained trunk's {percent(probe['untrained'])}"
        )
    return f"{text}."


def _figures(data: ReportData) -> Iterator[tuple[str, str, str]]:
    """(what it is, its number, what it is to be held against)."""
    if data.rows.size:
        yield "Loss at the end", f"{last_loss(data):.2f}", f"ln K = {ln_k(data):.2f}"
    if data.evaluation is not None:
        for key, name in (("distorted_probe", "Linear probe"), ("copy", "Copy detection")):
            scores = data.evaluation.row(key).scores
            yield name, percent(scores["trained"]), f"untrained {percent(scores['untrained'])}"
    if (rows := settled(data.rows)).size:
        yield "Images a second", number(np.median(rows["images_s"])), "median"
        yield "Waiting for data", f"{np.median(wait_percent(rows)):.1f}\u00a0%", "of a step, median"
    for event in [event for event in data.events if event["event"] == "resumed"][-1:]:
        yield "Resumed at step", f"{event['step']:,}", "from the store"
