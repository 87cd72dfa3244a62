"""How checkpoints did when they were asked about labelled sets of any size: curves over the steps of their runs."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from pipeline.evaluate.score import TITLES, Score
from pipeline.report.charts import Series, key, line_chart
from pipeline.report.document import section
from pipeline.report.figures import percent
from pipeline.report.markup import Markup, element, join
from pipeline.report.provenance import table

CHARTED = ("knn20", "probe")
Question = tuple[str, str, int]  # urls of bank and held-out set, pixels


def scores(runs: Sequence[tuple[str, Sequence[Score]]], last_step: int) -> Markup:
    """The section, by questions; nothing when none was asked. runs: names, and scores by steps."""
    asked: dict[Question, dict[int, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for n, (_, own) in enumerate(runs):
        for score in own:
            asked[score.bank_url, score.held_out_url, score.size][n].append(score)
    if not asked:
        return join()
    names = [name for name, _ in runs]
    parts = (part for question, found in asked.items() for part in _answers(question, found, names, last_step))
    return section("Evaluation", *parts)


def _answers(
    question: Question, found: Mapping[int, Sequence[Score]], names: Sequence[str], last_step: int
) -> Iterator[Markup]:
    bank, held_out, size = question
    yield element("h3", f"{held_out}, learnt from {bank}, at {size} pixels")
    yield element("div", *(_chart(way, found, names, last_step) for way in CHARTED), class_="charts")
    newest = ((key(names[n], f"run-{n}"), own[-1]) for n, own in found.items())
    rows = [(name, f"{one.step:,}", *(percent(one.right[way]) for way in TITLES)) for name, one in newest]
    yield table(rows, ("Newest", "Step", *TITLES.values()), "runs")


def _chart(way: str, found: Mapping[int, Sequence[Score]], names: Sequence[str], last_step: int) -> Markup:
    guess = 100 / next(iter(found.values()))[0].classes
    return line_chart(
        f"Right by {TITLES[way]}",
        [
            Series(names[n], [one.step for one in own], [100 * one.right[way] for one in own], f"run-{n}")
            for n, own in found.items()
        ],
        last_step=last_step,
        reference=(guess, f"guessing, {guess:.3g} %"),
        unit=" %",
        legend=False,
    )
