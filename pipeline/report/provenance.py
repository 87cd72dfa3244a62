"""What the run was made of: images that were refused, whose the photographs are, config, machine, events."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from pipeline.report.data import ReportData
from pipeline.report.document import section
from pipeline.report.figures import clock, done, duration, last_step, listed, times
from pipeline.report.markup import Markup, element


def images(data: ReportData) -> Markup:
    """Those that were refused, and the authors of the others."""
    told = f"{times(len(data.refused), 'image')} refused when the shards were packed:"
    rows = [(refusal.source, refusal.reason, refusal.detail) for refusal in data.refused]
    authors = element("ul", *(element("li", text) for text in data.authors), class_="plain")
    return section(
        "Data",
        element("p", told if rows else "No image was refused when the shards were packed."),
        table(rows, ("Image", "Reason", "What was found")) if rows else "",
        element("div", folded("Whose the photographs are", "authors and licences", authors), class_="more")
        if data.authors
        else "",
    )


def run(data: ReportData) -> Markup:
    """Facts, config, packages, events."""
    config = yaml.safe_dump(data.config, sort_keys=False, allow_unicode=True)
    packages = {name: version for place in data.environments[-1:] for name, version in place["packages"].items()}
    return section(
        "The run",
        table([fact for fact in _facts(data) if fact[1]]),
        element(
            "div",
            folded("Config", "all values, as resolved", element("pre", config, tabindex=0)),
            folded("Packages", times(len(packages), "version"), table(sorted(packages.items()))),
            folded("Events", times(len(data.events), "line"), table(map(_event, data.events))),
            class_="more",
        ),
    )


def _facts(data: ReportData) -> Iterator[tuple[str, str]]:
    starts = [event for event in data.events if event["event"] in ("started", "resumed")]
    if data.rows.size:
        steps, planned, batch = done(data), last_step(data), data.config["data"]["batch"]
        yield "Steps", f"{steps:,}" + (f" of {planned:,}" if steps != planned else "")
        yield "Images seen", f"{steps * batch:,}, in batches of {batch:,}"
        yield "Time in steps", duration(data.rows["step_s"].sum())
    yield "Starts", listed([_start(event) for event in starts])
    yield "Interruptions", "; ".join(_interruption(e) for e in data.events if e["event"] in ("stopped", "recovered"))
    for place in data.environments[-1:]:
        yield "Machine", ", ".join([place["platform"], *(place["gpus"] or ["no GPU"])])
        yield "Python", place["python"]
    yield from data.facts.items()


def _start(event: dict[str, Any]) -> str:
    return f"at step {event['step']:,}" + (f" with {times(event['ranks'], 'rank')}" if "ranks" in event else "")


def _interruption(event: dict[str, Any]) -> str:
    seconds: float = event["seconds"]
    after = f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
    if event["event"] == "stopped":
        return f"saved at step {event['step']:,}, {after} after the signal"
    return (
        f"new steps from {event['step']:,} on, {after} after the last one, {times(event['redone'], 'step')} done twice"
    )


def _event(event: dict[str, Any]) -> tuple[str, ...]:
    known = {"time", "attempt", "event", "step"}
    more = ", ".join(f"{key} {value}" for key, value in event.items() if key not in known and value is not None)
    step = f"step {event['step']:,}" if isinstance(event.get("step"), int) else ""
    attempt = f"attempt {event['attempt']}" if event["attempt"] else ""  # submitted before the first one
    return clock(event["time"]), attempt, step, str(event["event"]), more


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), kind: str = "words") -> Markup:
    """Rows of words. kind: words, which break where they must, or runs, which do not."""
    heading = element("thead", element("tr", *(element("th", text, scope="col") for text in head))) if head else ""
    body = element("tbody", *(element("tr", *(element("td", text) for text in row)) for row in rows))
    return element("div", element("table", heading, body, class_=kind), class_="scroll")


def folded(title: str, beside: str, inside: Markup) -> Markup:
    """What is shown when its title is clicked."""
    return element("details", element("summary", title, " ", element("small", beside)), inside)
