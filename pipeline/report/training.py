"""How the training went: curves over steps, with what happened to the run."""

from collections.abc import Iterator
from typing import Any

from pipeline.report.charts import Mark, Series, line_chart, trend
from pipeline.report.data import ReportData
from pipeline.report.document import section
from pipeline.report.figures import column, last_step, listed, ln_k, pace, waits
from pipeline.report.markup import Markup, element, join

OF_TRAINING = ("preempted", "terminated", "cancelled", "resumed")
OF_JOBS = ("failed", "requeued")  # after a failure; what was committed by then says where


def training(data: ReportData) -> Markup:
    """The section; nothing when there are no rows."""
    if not data.rows.size:
        return join()
    loss, *small = _charts(data)
    return section(
        "Training",
        element("p", _in_words(data), " All charts are over steps; point at one to read them all."),
        loss,
        element("div", *small, class_="charts"),
    )


def marks(data: ReportData) -> list[Mark]:
    """What interrupted the run, and where it went on."""
    return [Mark(event["step"], event["event"]) for event in _happened(data)]


def _happened(data: ReportData) -> list[dict[str, Any]]:
    told = [event for event in data.events if event["event"] in OF_TRAINING]
    failed = [{**event, "step": event.get("committed")} for event in data.events if event["event"] in OF_JOBS]
    at_a_step = (event for event in told + failed if isinstance(event.get("step"), int))
    return sorted(at_a_step, key=lambda event: float(event["time"]))


def _in_words(data: ReportData) -> str:
    told = []
    for event in _happened(data):
        reason = f" ({event['reason']})" if event.get("reason") else ""
        told.append(f"{event['event']} at step {event['step']:,}{reason}")
    return f"The run was {listed(told)}." if told else "The run was never interrupted."


def _charts(data: ReportData) -> Iterator[Markup]:
    """The loss, large, then the small ones."""
    common: dict[str, Any] = {"marks": marks(data), "last_step": last_step(data)}
    k, guessing = data.config["swav"]["prototypes"], ln_k(data)
    reference = (guessing, f"ln {k} = {guessing:.2f}, guessing")
    about = f"Cross-entropy over K = {k} prototypes. A collapsed run stays on the dashed line."
    loss = _smoothed(*column(data, "loss"))
    yield line_chart("Loss", loss, reference=reference, size="large", about=about, **common)
    small = {"from_zero": True, **common}
    yield line_chart("Learning rate", [Series("rate", *column(data, "lr"))], **small)
    yield line_chart("Images a second", _smoothed(*pace(data)), about=_WITHOUT_FIRST, **small)
    about = f"Share of a step, of the rank that waits longest. {_WITHOUT_FIRST}"
    yield line_chart("Waiting for data", _smoothed(*waits(data)), unit=" %", about=about, **small)
    usage = [
        Series("in use", *column(data, "prototypes_used", 100)),
        Series("entropy of a code, of ln K", *column(data, "code_entropy", 100), "second"),
    ]
    about = "In use: first choice of some image of a step. A collapse shows here first: few are, or codes are at 100 %."
    yield line_chart("Prototypes", usage, unit=" %", about=about, **small)


def _smoothed(steps: list[int], values: list[float]) -> list[Series]:
    return [Series("each step", steps, values, "raw"), Series("moving mean", steps, trend(values))]


_WITHOUT_FIRST = "Without the first step of each start."
