"""The page of several runs: each in its colour in every chart, their scores by question, their configs' differences."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate.score import TITLES, Score
from pipeline.goodput import Goodput
from pipeline.report.charts import MOST_POINTS
from pipeline.report.dashboard import CURVES, LOSS, MOST_RUNS, Brief, brief, write_dashboard
from pipeline.report.data import ReportData
from pipeline.report.rows import columns
from tests.pipeline.test_report import CONFIG, Node, Tree, chart, metrics, report, scale

EVIL = "</script><script>alert('x')</script>"
HISTORY = ["2026-11-26 10:00:00  submitted as job 4", "2026-11-26 10:01:00  training begins"]


def run(name: str, steps: int = 200, **changed: Any) -> ReportData:
    return report(run=name, rows=metrics(steps, steps // 2), evaluation=None, **changed)


def score(step: int, probe: float, held_out: str = "s3://set/val") -> Score:
    right = dict.fromkeys(TITLES, probe / 2) | {"probe": probe}
    return Score("s3://runs/x", step, "s3://set/train", held_out, 224, 1000, 500, 50, 1e-4, right)


def told(data: ReportData, **changed: Any) -> Brief:
    return replace(brief(data, "running", "", Goodput(1, 20, 50.0, 60.0), HISTORY), **changed)


def page(tmp_path: Path, *runs: Brief, again_s: int | None = None) -> Node:
    write_dashboard(tmp_path / "new" / "dashboard.html", runs, 1.8e9, again_s)
    return Tree((tmp_path / "new" / "dashboard.html").read_text("utf-8")).root


def curves(figure: Node) -> dict[str, list[tuple[float, float]]]:
    """The look of each curve -> its places, in per cent."""
    return {
        line.classes[1]: [tuple(map(float, point.split(","))) for point in line.attributes["points"].split()]
        for line in figure.all("polyline")
    }  # type: ignore[misc]


def test_each_chart_has_a_curve_of_each_run_as_long_as_the_run_is(tmp_path: Path) -> None:
    shown = page(tmp_path, told(run("long")), told(run("short", 100)))
    assert shown.all("h1")[0].text == "2 runs"
    for title in (LOSS.title, *(curve.title for curve in CURVES if curve.title != "Gradient norm")):
        found = curves(chart(shown, title))
        assert found.keys() == {"run-0", "run-1"}
        assert (found["run-0"][-1][0], found["run-1"][-1][0]) == (100, 50), title
    assert chart(shown, "Gradient norm").text.endswith("Not measured.")  # no row of these has it


def test_the_curve_of_the_loss_lies_where_its_values_do(tmp_path: Path) -> None:
    figure = chart(page(tmp_path, told(run("one"))), "Loss")
    start, slope = scale(figure, "y")
    (_, height) = curves(figure)["run-0"][-1]
    assert start + slope * height == pytest.approx(4.0, abs=0.02)


def test_the_line_of_ln_k_is_there_where_all_runs_have_it_in_common(tmp_path: Path) -> None:
    other = run("other", config={**CONFIG, "swav": {"prototypes": 600}})
    assert chart(page(tmp_path, told(run("a")), told(run("b"))), "Loss").all("line", "reference")
    assert not chart(page(tmp_path, told(run("a")), told(other)), "Loss").all("line", "reference")


def test_the_table_tells_how_each_run_is_and_what_needs_a_look(tmp_path: Path) -> None:
    shown = page(tmp_path, told(run("a"), look="no step for 7 min"), told(run("b"), state="finished"))
    lines = [[cell.text for cell in line.all("td")] for line in shown.all("table")[0].all("tr")[1:]]
    assert lines[0] == ["a", "running", "200 of 200", "4.0002", "5.70", "128", "2.0\u00a0%", "83.3\u00a0%", "1"]
    assert [lines[1][0], lines[1][1]] == ["b", "finished"]
    assert [text.text for text in shown.all("p") if text.all("span", "key")] == ["a: no step for 7 min"]


def test_the_configs_are_told_apart_by_the_keys_in_which_they_differ(tmp_path: Path) -> None:
    other = run("b", config={**CONFIG, "swav": {"prototypes": 600}, "optim": {"lr": 0.3}})
    shown = page(tmp_path, told(run("a")), told(other))
    lines = [[cell.text for cell in line.all("td")] for line in shown.all("table")[-1].all("tr")[1:]]
    assert lines == [["swav.prototypes", "300", "600"], ["optim.lr", "-", "0.3"]]
    assert "What sets them apart" not in page(tmp_path, told(run("a")), told(run("b"))).text


def test_scores_are_charted_by_question_and_only_runs_that_were_asked_are_in_them(tmp_path: Path) -> None:
    asked = [score(50, 0.3), score(100, 0.5), score(100, 0.2, "s3://set/other")]
    shown = page(tmp_path, told(run("a")), told(run("b"), scores=asked))
    titles = [title.text for title in shown.all("h3")]
    assert titles == [f"s3://set/{name}, learnt from s3://set/train, at 224 pixels" for name in ("val", "other")]
    probes = [figure for figure in shown.all("figure") if figure.text.startswith("Right by linear probe")]
    start, slope = scale(probes[0], "y")
    assert curves(probes[0]).keys() == {"run-1"}
    assert [start + slope * y for _, y in curves(probes[0])["run-1"]] == pytest.approx([30, 50], abs=0.1)
    assert [x for x, _ in curves(probes[0])["run-1"]] == [25, 50]
    (alone,) = probes[1].all("polyline")
    assert "dot" in alone.classes
    newest = [cell.text for cell in shown.all("table")[1].all("td")]
    assert newest[:2] == ["b", "100"]
    assert newest[5] == "50.0\u00a0%"


def test_one_run_is_marked_where_it_was_interrupted_and_several_are_not(tmp_path: Path) -> None:
    alone = page(tmp_path, told(run("a")))
    assert alone.all("h1")[0].text == "a"
    assert {mark.attributes["data-step"] for mark in alone.all("line", "mark")} == {"100", "120"}
    assert not page(tmp_path, told(run("a")), told(run("b"))).all("line", "mark")


def test_what_happened_stands_there_the_newest_first(tmp_path: Path) -> None:
    assert [line.text for line in page(tmp_path, told(run("a"))).all("li")] == HISTORY[::-1]


def test_a_run_that_has_not_begun_has_its_line(tmp_path: Path) -> None:
    waiting = brief(ReportData("new", CONFIG, columns([]), []), "waiting", "Priority", None, [])
    cells = [cell.text for cell in page(tmp_path, waiting).all("td")]
    assert cells == ["new", "waiting", "0 of 1", "-", "5.70", "-", "-", "-", "-"]
    assert "No run has made a step yet." in page(tmp_path, waiting).text
    both = page(tmp_path, waiting, told(run("a")))
    assert len(both.all("polyline")) == len(CURVES)  # but the gradients', and the loss


def test_a_page_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    def refreshed(again_s: int | None) -> list[str]:
        metas = page(tmp_path, told(run("a")), again_s=again_s).all("meta")
        return [meta.attributes["content"] for meta in metas if meta.attributes.get("http-equiv") == "refresh"]

    assert (refreshed(30), refreshed(None)) == (["30"], [])


def test_a_brief_stays_small_however_long_the_run_is_and_all_runs_have_their_colours(tmp_path: Path) -> None:
    one = told(run("a", 5000))
    assert all(len(steps) <= MOST_POINTS for steps, _ in one.curves.values())
    shown = page(tmp_path, *(told(run(f"run{n}")) for n in range(MOST_RUNS)))
    style = "".join(node.text for node in shown.all("style"))
    kinds = {line.classes[1] for line in shown.all("polyline")}
    assert len(kinds) == MOST_RUNS
    assert len(set(re.findall(r"\.run-\d \{ --run: ([^;]+);", style))) == MOST_RUNS


def test_what_comes_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    evil = run(EVIL, config={**CONFIG, EVIL: EVIL}, scores=[score(1, 0.5, EVIL)])
    shown = page(tmp_path, told(evil, look=EVIL, state=EVIL, happened=[EVIL]), told(run("b")))
    assert not [script for script in shown.all("script") if script.text.startswith("alert")]
