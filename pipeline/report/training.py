"""How the training went: curves over steps, with what happened to the run."""

from typing import Any

from pipeline.report.charts import Mark, Series, line_chart, trend
from pipeline.report.data import ReportData
from pipeline.report.figures import column, last_step, listed, ln_k, pace, waits
from pipeline.report.markup import Markup, element, join

MARKED = ("preempted", "terminated", "cancelled", "failed", "resumed")


def training(data: ReportData) -> Markup:
    """The section; nothing when there are no rows."""
    if not data.rows.size:
        return join()
    charts = (_lr_chart(data), _images_chart(data), _wait_chart(data), _usage_chart(data))
    return element(
        "section",
        element("h2", "Training"),
        element("p", _in_words(data), " All charts are over steps; point at one to read them all."),
        _loss_chart(data),
        element("div", *charts, class_="charts"),
    )


def marks(data: ReportData) -> list[Mark]:
    """What interrupted the run, and where it went on."""
    return [Mark(event["step"], event["event"]) for event in _happened(data)]


def _happened(data: ReportData) -> list[dict[str, Any]]:
    return [event for event in data.events if event["event"] in MARKED and isinstance(event.get("step"), int)]


def _in_words(data: ReportData) -> str:
    told = []
    for event in _happened(data):
        reason = f" ({event['reason']})" if event.get("reason") else ""
        told.append(f"{event['event']} at step {event['step']:,}{reason}")
    return f"The run was {listed(told)}." if told else "The run was never interrupted."


def _common(data: ReportData) -> dict[str, Any]:
    return {"marks": marks(data), "last_step": last_step(data)}


def _smoothed(steps: list[int], values: list[float]) -> list[Series]:
    return [Series("each step", steps, values, "raw"), Series("moving mean", steps, trend(values))]


def _loss_chart(data: ReportData) -> Markup:
    k = data.config["swav"]["prototypes"]
    return line_chart(
        "Loss",
        _smoothed(*column(data, "loss")),
        reference=(ln_k(data), f"ln {k} = {ln_k(data):.2f}, guessing"),
        size="large",
        about=f"Cross-entropy over K = {k} prototypes. A collapsed run stays on the dashed line.",
        **_common(data),
    )


def _lr_chart(data: ReportData) -> Markup:
    series = [Series("rate", *column(data, "lr"))]
    return line_chart("Learning rate", series, from_zero=True, **_common(data))


def _images_chart(data: ReportData) -> Markup:
    return line_chart("Images a second", _smoothed(*pace(data)), from_zero=True, about=_WITHOUT_FIRST, **_common(data))


def _wait_chart(data: ReportData) -> Markup:
    about = f"Share of a step, of the rank that waits longest. {_WITHOUT_FIRST}"
    return line_chart(
        "Waiting for data", _smoothed(*waits(data)), from_zero=True, unit=" %", about=about, **_common(data)
    )


def _usage_chart(data: ReportData) -> Markup:
    series = [
        Series("in use", *column(data, "prototypes_used", 100)),
        Series("entropy of a code, of ln K", *column(data, "code_entropy", 100), "second"),
    ]
    about = "In use: first choice of some image of a step. A collapse shows here first: few are, or codes are at 100 %."
    return line_chart("Prototypes", series, from_zero=True, unit=" %", about=about, **_common(data))


_WITHOUT_FIRST = "Without the first step of each start."
