"""The page: complete in itself, escaped throughout, and its drawings at the places that the numbers say."""

import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.merge import Refusal
from pipeline.evaluate.table import COLUMNS, Evaluation, Row
from pipeline.report.charts import Axis, Series, thinned, trend
from pipeline.report.data import Example, Neighbour, ReportData
from pipeline.report.page import write_report
from pipeline.report.pictures import crop_strips, picture, thumbnail
from pipeline.report.rows import columns

VOID = {"meta", "img", "br"}
CONFIG = {
    "swav": {"prototypes": 300},
    "data": {"batch": 64},
    "augment": {"crops": [{"size": 64, "count": 2}, {"size": 32, "count": 4}]},
}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    inside: list["Node | str"] = field(default_factory=list)

    def all(self, tag: str, of_class: str = "") -> list["Node"]:
        """Every element below with that name and class, in the order of the page."""
        return [n for n in self.below() if n.tag == tag and (not of_class or of_class in n.classes)]

    def below(self) -> Iterator["Node"]:
        for node in self.inside:
            if isinstance(node, Node):
                yield node
                yield from node.below()

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)


class Tree(HTMLParser):
    """Fails on an end tag that is not the open element's."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], f"left open: {[node.tag for node in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        assert len(node.attributes) == len(attrs), f"an attribute twice in {tag}"
        self.open[-1].inside.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def metrics(count: int, preempted_after: int) -> list[dict[str, Any]]:
    """A row a step; the first step of both attempts takes long."""
    return [
        {
            "result": {
                "step": step,
                "loss": 4.0 + 2.0 * math.exp(-step / 20),
                "lr": 1e-3 * step / count,
                "prototypes_used": 0.5 if step % 10 == 0 else None,
                "code_entropy": 0.9 if step % 10 == 0 else None,
            },
            "run": {
                "step_s": 5.0 if step in (1, preempted_after + 1) else 0.5,
                "wait_s": 4.0 if step in (1, preempted_after + 1) else 0.01,
                "images_s": 12.8 if step in (1, preempted_after + 1) else 128.0,
                "attempt": 1 if step <= preempted_after else 2,
            },
        }
        for step in range(1, count + 1)
    ]


def evaluation(**scores: tuple[float, ...]) -> Evaluation:
    given = {"distorted_probe": (0.40, 0.20, 0.35, 0.10), "copy": (0.30, 0.15, 0.20, 0.25), **scores}
    table = [
        Row(key, f"Title of {key}", 200, 0.05, dict(zip(COLUMNS, values, strict=True))) for key, values in given.items()
    ]
    return Evaluation(COLUMNS, table, [], {"bank": 800, "held_out": 380, "photographs": 29})


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def example(label: str = "kite") -> Example:
    tile = jpeg((10, 20, 30))
    right, wrong = Neighbour(tile, label, True), Neighbour(tile, "harbour", False)
    return Example(label, tile, tile, {"trained": [right] * 4 + [wrong], "untrained": [right] + [wrong] * 4})


def report(rows: Iterable[dict[str, Any]] | None = None, **changed: Any) -> ReportData:
    """rows: as a run keeps them."""
    events = [
        {"time": 1.8e9, "attempt": 1, "event": "started", "step": 0, "steps": 200, "ranks": 2},
        {"time": 1.8e9 + 60, "attempt": 1, "event": "preempted", "step": 120},
        {"time": 1.8e9 + 90, "attempt": 2, "event": "resumed", "step": 100, "steps": 200, "ranks": 1},
        {"time": 1.8e9 + 150, "attempt": 2, "event": "finished", "step": 200},
    ]
    data = ReportData(
        run="demo",
        config=CONFIG,
        rows=columns(metrics(200, 100) if rows is None else rows),
        events=events,
        evaluation=evaluation(),
        crops=[b"RIFF"],
        examples=[example()],
        refused=[Refusal("a/broken.jpg", "truncated", "12 of 20 bytes")],
        environments=[{"platform": "Linux", "gpus": [], "python": "3.11", "packages": {"torch": "2.13.0"}}],
        authors=["Kleiber: An Author (CC-BY-SA-3.0)"],
    )
    return replace(data, **changed)


@pytest.fixture
def shown(tmp_path: Path) -> Any:
    """Writes a report and gives the page as a tree."""

    def show(**changed: Any) -> Node:
        write_report(tmp_path / "report.html", report(**changed))
        return Tree((tmp_path / "report.html").read_text("utf-8")).root

    return show


def chart(page: Node, title: str) -> Node:
    (found,) = [figure for figure in page.all("figure") if figure.all("figcaption")[0].text.startswith(title)]
    return found


def scale(figure: Node, axis: str) -> tuple[float, float]:
    """(value at 0 %, change of the value from 0 to 100 %), read off the ticks."""
    ticks = [tick for tick in figure.all("span", "tick") if axis in tick.classes]
    places = [float(re.findall(r":([\d.]+)%", tick.attributes["style"])[0]) for tick in ticks]
    values = [float(re.sub(r"[^\d.e-]", "", tick.text)) for tick in ticks]
    assert len(ticks) >= 3
    slope, start = np.polyfit(places, values, 1)
    return float(start), float(slope)


def test_the_page_refers_to_nothing_outside_of_itself_and_forbids_the_browser_to(shown: Any) -> None:
    page = shown()
    for node in page.below():
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert node.attributes.get(name, "data:").startswith("data:"), (node.tag, name)
        assert node.tag not in ("link", "iframe", "object", "embed", "base")
    for style in page.all("style"):
        assert "url(" not in style.text
        assert "@import" not in style.text
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_line_of_ln_k_lies_at_ln_k(shown: Any) -> None:
    figure = chart(shown(), "Loss")
    (line,) = figure.all("line", "reference")
    start, slope = scale(figure, "y")
    assert line.attributes["y1"] == line.attributes["y2"]
    assert start + slope * float(line.attributes["y1"]) == pytest.approx(math.log(300), abs=0.005)
    assert "ln 300 = 5.70" in figure.all("span", "reference-label")[0].text


def test_the_curve_of_the_loss_goes_through_every_step_and_its_loss(shown: Any) -> None:
    figure = chart(shown(), "Loss")
    (raw,) = figure.all("polyline", "raw")
    (x0, dx), (y0, dy) = scale(figure, "x"), scale(figure, "y")
    points = [tuple(map(float, point.split(","))) for point in raw.attributes["points"].split()]
    assert [x0 + dx * x for x, _ in points] == pytest.approx(list(range(1, 201)), abs=0.01)
    assert [y0 + dy * y for _, y in points] == pytest.approx(
        [4 + 2 * math.exp(-s / 20) for s in range(1, 201)], abs=0.001
    )


def test_a_run_whose_rows_lack_a_figure_has_its_chart_without_that_line(shown: Any) -> None:
    assert len(chart(shown(), "Prototypes").all("polyline")) == 2
    older = metrics(200, 100)
    for row in older:
        row["result"]["usage_entropy"] = row["result"].pop("code_entropy")
    assert len(chart(shown(rows=older), "Prototypes").all("polyline")) == 1


def test_every_chart_is_marked_where_the_run_was_preempted_and_where_it_resumed(shown: Any) -> None:
    figures = shown().all("figure")
    assert len(figures) == 5
    for figure in figures:
        start, slope = scale(figure, "x")
        for what, step in (("preempted", 120), ("resumed", 100)):
            (line,) = figure.all("line", what)
            assert line.attributes["data-step"] == str(step)
            assert line.attributes["x1"] == line.attributes["x2"]
            assert start + slope * float(line.attributes["x1"]) == pytest.approx(step, abs=0.01)


def test_marks_at_one_step_have_words_on_both_sides_of_it_and_near_the_edge_on_one(shown: Any) -> None:
    events = report().events
    for step, words in ((100, ["preempted", "resumed"]), (196, ["preempted · resumed"])):
        at_once = [{**event, "step": step} if event["event"] in ("preempted", "resumed") else event for event in events]
        labels = chart(shown(events=at_once), "Loss").all("span", "mark-label")
        assert [label.text for label in labels] == words
        assert "before" in labels[0].classes


def test_marks_near_each_other_share_their_words(shown: Any) -> None:
    labels = chart(shown(), "Loss").all("span", "mark-label")  # resumed at 100, preempted at 120 of 200
    assert [label.text for label in labels] == ["resumed · preempted"]
    far = [{**event, "step": {100: 40}.get(event["step"], event["step"])} for event in report().events]
    labels = chart(shown(events=far), "Loss").all("span", "mark-label")
    assert [label.text for label in labels] == ["resumed", "preempted"]


def test_a_start_that_failed_stands_where_it_goes_on_with_its_reason(shown: Any) -> None:
    started = report().events[0]
    later = {"time": started["time"] + 1e6, "attempt": 1, "job": "7", "start": 0}
    events = [
        started,
        later | {"event": "requeued", "reason": "rank 1 on node2: it was killed", "committed": 60},
        later | {"time": later["time"] + 1, "event": "failed", "reason": "3 starts", "committed": 80},
        later | {"event": "requeued", "reason": "preempted before the first step"},
    ]
    page = shown(events=events)
    assert (
        "The run was requeued at step 60 (rank 1 on node2: it was killed) and failed at step 80 (3 starts)."
        in page.text
    )
    assert [label.text for label in chart(page, "Loss").all("span", "mark-label")] == ["requeued · failed"]


def test_the_first_step_of_each_start_does_not_count_as_pace(shown: Any) -> None:
    page = shown()
    figures = dict(zip([n.text for n in page.all("dt")], [n.text for n in page.all("dd")][::2], strict=True))
    assert figures["Images a second"] == "128"
    assert figures["Waiting for data"] == "2.0\u00a0%"
    (curve,) = chart(page, "Images a second").all("polyline", "trend")
    assert len(curve.attributes["points"].split()) == 198


def test_what_comes_from_outside_cannot_become_markup(shown: Any) -> None:
    evil = "\"><script>alert('x')</script><img src=http://evil.example/>"
    table = evaluation()
    rows_of_table = [replace(row, title=evil) for row in table.rows]
    events = [*report().events, {"time": 1.8e9, "attempt": 1, "event": evil, "step": 7, "reason": evil}]
    events.append({"time": 1.8e9, "attempt": 1, "event": "failed", "committed": 9, "reason": evil})
    page = shown(
        run=evil,
        config={**CONFIG, evil: evil},
        evaluation=replace(table, rows=rows_of_table),
        examples=[example(evil)],
        refused=[Refusal(evil, evil, evil)],
        environments=[{"platform": evil, "gpus": [evil], "python": evil, "packages": {evil: evil}}],
        authors=[evil],
        events=events,
        facts={evil: evil},
    )
    assert len(page.all("script")) == 1 + len(page.all("figure"))
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))
    assert page.all("h1")[0].text == evil
    assert page.text.count(evil) > 12


def test_the_data_for_the_script_cannot_end_its_element_and_is_json(shown: Any) -> None:
    for script in shown().all("script")[:-1]:
        told = json.loads(script.text)
        assert told["last"] == 200
        assert all(len(steps) == len(values) for steps, values, _ in told["series"])


def test_the_untrained_trunk_is_the_one_with_random_weights_also_where_a_run_began_with_others(shown: Any) -> None:
    forked = {**CONFIG, "train": {"start_from": "s3://runs/old/checkpoints/step-000001000-a1"}}
    assert "The untrained trunk is the same network with random weights;" in shown(config=forked).text


def test_rows_in_which_the_trained_trunk_loses_are_told_in_words(shown: Any) -> None:
    page = shown(evaluation=evaluation(clean_knn1=(0.585, 0.453, 0.85, 0.6), stamps_probe=(0.3, 0.1, 0.3, 0.2)))
    told = [item.text for item in page.all("ul", "loses")[0].all("li")]
    assert told == [
        "Title of clean_knn1: 58.5\u00a0% against 85.0\u00a0% (colour histogram) and 60.0\u00a0% (raw pixels)."
    ]
    assert "Where the trained trunk loses: 1 of 4 rows" in page.text
    assert "is the best in all 2 rows" in shown().text


def test_bars_are_as_long_as_the_shares_and_the_table_has_the_same_numbers(shown: Any) -> None:
    page = shown()
    group = page.all("div", "group")[0]
    widths = [float(bar.attributes["width"].rstrip("%")) for bar in group.all("rect", "bar")]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 0.5, 0.875, 0.25], abs=1e-3)
    assert [value.text for value in group.all("text")] == ["40.0", "20.0", "35.0", "10.0"]
    (chance,) = group.all("line", "chance")
    assert float(chance.attributes["x1"].rstrip("%")) / widths[0] == pytest.approx(0.05 / 0.4, abs=1e-3)
    cells = [cell.text for cell in page.all("tbody")[0].all("tr")[0].all("td")]
    error = math.sqrt(0.4 * 0.6 / 200)
    assert cells[0] == f"40.0 ± {100 * error:.1f}"
    assert cells[4:] == ["5.0", "200"]
    assert [cell.text for cell in page.all("td", "best")] == [cells[0], "30.0 ± 3.2"]


def test_right_and_wrong_neighbours_differ_in_a_sign_and_in_words(shown: Any) -> None:
    page = shown()
    verdicts = [
        (tile.all("b")[0].text, tile.all("img")[0].attributes["alt"])
        for tile in page.all("span", "tile")
        if tile.all("b")
    ]
    right, wrong = ("✓", "right: kite"), ("✗", "wrong: harbour")
    assert verdicts == [right] * 4 + [wrong] + [right] + [wrong] * 4
    assert "4 of 5 by the trained trunk and 1 of 5 by the untrained trunk" in page.text


def test_every_picture_and_drawing_has_words_for_those_who_do_not_see_it(shown: Any) -> None:
    page = shown()
    assert all(image.attributes["alt"] for image in page.all("img"))
    assert all(drawing.attributes["aria-label"] for drawing in page.all("svg"))
    told = chart(page, "Loss").all("svg")[0].attributes["aria-label"]
    assert told.endswith("preempted at step 120; resumed at step 100")


def test_what_was_refused_and_what_it_ran_on_stands_on_the_page(shown: Any) -> None:
    text = shown().text
    starts, images = "at step 0 with 2 ranks and at step 100 with 1 rank", "12,800, in batches of 64"
    for told in ("a/broken.jpg", "12 of 20 bytes", starts, images, "2.13.0", "prototypes: 300", "Kleiber: An Author"):
        assert told in text
    assert "No image was refused" in shown(refused=[]).text


def test_what_happened_to_the_jobs_stands_among_the_events(shown: Any) -> None:
    submitted = {"time": 1.8e9 - 20, "attempt": 0, "event": "submitted", "job": "41", "committed": None}
    requeued = {"time": 1.8e9 + 70, "attempt": 1, "event": "requeued", "job": "41", "reason": "bad host node1: disk"}
    events = [submitted, *report().events, requeued]
    told = [[cell.text for cell in row.all("td")] for row in shown(events=events).all("tr")]
    (first,) = [row for row in told if "submitted" in row]
    assert first[1:] == ["", "", "submitted", "job 41"]
    (again,) = [row for row in told if "requeued" in row]
    assert again[1:] == ["attempt 1", "", "requeued", "job 41, reason bad host node1: disk"]


def test_a_run_that_has_nothing_yet_has_a_page_too(shown: Any) -> None:
    page = shown(rows=[], events=[], evaluation=None, crops=[], examples=[], environments=[], authors=[], refused=[])
    assert "Nothing was trained yet" in page.text
    assert page.all("figure") == []


def test_a_run_of_many_steps_makes_no_larger_page(shown: Any) -> None:
    page = shown(rows=metrics(20_000, 10_000))
    counts = [len(curve.attributes["points"].split()) for curve in page.all("polyline")]
    assert max(counts) == 600


def test_thinning_keeps_the_mean_of_a_curve_and_its_last_step() -> None:
    values = np.random.default_rng(0).normal(size=6000).tolist()
    thin = thinned(Series("loss", list(range(1, 6001)), values))
    assert len(thin.steps) == 600
    assert thin.steps[-1] == 6000
    assert np.mean(thin.values) == pytest.approx(np.mean(values))


def test_the_trend_is_a_mean_of_the_values_around() -> None:
    values = np.random.default_rng(1).normal(size=50).tolist()
    expected = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(50)]
    assert trend(values) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0, 0.002), (4.1, 6.3), (0, 187.0), (3, 3), (0, 1e6), (0.93, 0.9301)])
def test_an_axis_holds_its_values_between_round_ticks(low: float, high: float) -> None:
    axis = Axis.over(low, high)
    assert axis.low <= low <= high <= axis.high
    assert 3 <= len(axis.ticks) <= 8
    step = axis.ticks[1] - axis.ticks[0]
    assert f"{step:e}"[0:3] in ("1.0", "2.0", "2.5", "5.0")


def test_a_strip_shows_the_image_then_big_crops_then_small_ones_in_a_block() -> None:
    def of_colour(count: int, side: int, value: float) -> torch.Tensor:
        return torch.full((1, count, 3, side, side), (value - 0.5) / 0.25)

    crops = [of_colour(2, 64, 0.2), of_colour(4, 32, 0.8)]
    (strip,) = crop_strips(crops, [jpeg((128, 128, 128), (128, 64))], (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    image = np.asarray(Image.open(io.BytesIO(strip)).convert("RGBA")).astype(int)
    assert image.shape == (67, 64 + 3 + 64 + 3 + 64 + 3 + 32 + 3 + 32, 4)
    for x, y, grey in ((32, 33, 128), (99, 33, 51), (166, 33, 51), (217, 16, 204), (252, 16, 204), (252, 51, 204)):
        assert abs(image[y, x, :3] - grey).max() <= 6, (x, y)
        assert image[y, x, 3] == 255
    for x, y in ((65, 33), (32, 5), (217, 33)):  # between crops, beside the flat image
        assert image[y, x, 3] == 0


def test_a_thumbnail_is_the_middle_square_of_an_image() -> None:
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    file = io.BytesIO()
    wide.save(file, "PNG")
    shown = Image.open(io.BytesIO(thumbnail(file.getvalue(), side=50)))
    assert (shown.format, shown.size) == ("JPEG", (50, 50))
    assert np.abs(np.asarray(shown)[5:45, 5:45].astype(int) - (0, 0, 255)).max() < 12


def test_a_picture_of_a_normalised_image_has_its_colours() -> None:
    normalised = (torch.tensor([0.9, 0.5, 0.1]).view(3, 1, 1).expand(3, 16, 16) - 0.4) / 0.2
    image = np.asarray(Image.open(io.BytesIO(picture(normalised, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))))).astype(int)
    assert np.abs(image - (230, 128, 26)).max() < 8
