"""The whole table on made-up tiles: noise around a colour that each photograph has of its own."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from pipeline.evaluate.suite import evaluate
from pipeline.evaluate.table import Evaluation, Neighbours, Row
from pipeline.evaluate.tiles import Tiles
from pipeline.evaluate.views import Views

pytestmark = pytest.mark.slow  # evaluates two trunks

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PHOTOGRAPHS, STAMPS = ["bridge", "harbour", "kite"], ["stamp-birds", "stamp-fish"]


def tiles_of(labels: list[str]) -> Tiles:
    return Tiles([b""] * len(labels), labels, np.full((len(labels), 2), 16))


def pictures(labels: list[str], seed: int, noise: float) -> Tensor:
    """(n, 3, 16, 16): the label's colour and noise."""
    colour = {label: torch.rand(3, generator=torch.Generator().manual_seed(i + 1)) for i, label in enumerate(ALL)}
    ground = torch.stack([colour[label] for label in labels])[:, :, None, None].expand(-1, 3, 16, 16)
    drawn = torch.randn(ground.shape, generator=torch.Generator().manual_seed(seed))
    return ((ground + noise * drawn).clamp(0, 1) - 0.5) / 0.25


ALL = PHOTOGRAPHS + STAMPS
BANK = tiles_of(ALL * 8)
HELD_OUT = tiles_of([label for label in ALL for _ in range(6)])


@pytest.fixture(scope="module")
def views() -> Views:
    """Distorted tiles are noisier; grey ones have lost their colour."""
    clean = pictures(list(HELD_OUT.labels), 1, 0.05)
    of_photographs = clean[: 6 * len(PHOTOGRAPHS)]
    noise = torch.randn(of_photographs.shape, generator=torch.Generator().manual_seed(2))
    grey = of_photographs.mean(1, keepdim=True).expand_as(of_photographs)
    return Views(
        pictures(list(BANK.labels), 0, 0.05), clean, of_photographs + 0.2 * noise, grey.contiguous(), MEAN, STD
    )


class Trunk(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 12, 3, stride=2)
        self.bn = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu().mean((2, 3))


@pytest.fixture(scope="module")
def evaluation(views: Views) -> Evaluation:
    return evaluate(Trunk(0), Trunk(1), BANK, HELD_OUT, views)


def test_evaluating_twice_gives_the_same_figures_and_neighbours(views: Views, evaluation: Evaluation) -> None:
    assert evaluate(Trunk(0), Trunk(1), BANK, HELD_OUT, views) == evaluation


def test_every_evaluation_stands_in_the_table_with_its_tiles_and_what_guessing_gives(evaluation: Evaluation) -> None:
    assert {row.key: (row.tiles, pytest.approx(row.chance)) for row in evaluation.rows} == {
        "distorted_knn1": (18, 1 / 3),
        "distorted_knn5": (18, 1 / 3),
        "distorted_knn20": (18, 1 / 3),
        "distorted_probe": (18, 1 / 3),
        "copy": (18, 1 / 18),
        "clean_knn1": (18, 1 / 3),
        "clean_probe": (18, 1 / 3),
        "grey_copy": (18, 1 / 18),
        "stamps_knn1": (16 + 12, 1 / 2),
        "stamps_probe": (12, 1 / 2),
    }
    assert all(set(row.scores) == {"trained", "untrained", "histogram", "pixels"} for row in evaluation.rows)


def test_scores_of_pixels_are_those_of_plain_loops(views: Views, evaluation: Evaluation) -> None:
    def vectors(images: Tensor) -> np.ndarray:
        flat = (images.double() * 0.25 + 0.5).clamp(0, 1).flatten(1).numpy()  # 16 pixels wide already
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    bank_rows = [i for i, label in enumerate(BANK.labels) if label in PHOTOGRAPHS]
    bank, clean, grey = vectors(views.bank)[bank_rows], vectors(views.held_out)[:18], vectors(views.grey)
    asked = HELD_OUT.labels[:18]
    nearest = [BANK.labels[bank_rows[int(np.argmax(bank @ query))]] for query in clean]
    assert evaluation.row("clean_knn1").scores["pixels"] == np.mean(
        [a == b for a, b in zip(nearest, asked, strict=True)]
    )
    assert evaluation.row("grey_copy").scores["pixels"] == np.mean((clean @ grey.T).argmax(axis=0) == np.arange(18))


def test_colours_alone_tell_clean_tiles_apart_but_not_grey_ones(evaluation: Evaluation) -> None:
    assert evaluation.row("clean_knn1").scores["histogram"] == 1.0
    assert evaluation.row("clean_probe").scores["histogram"] == 1.0
    assert evaluation.row("grey_copy").scores["histogram"] < 0.5


def test_columns_belong_to_their_trunks(views: Views, evaluation: Evaluation) -> None:
    swapped = evaluate(Trunk(1), Trunk(0), BANK, HELD_OUT, views)
    assert [row.scores["trained"] for row in swapped.rows] == [row.scores["untrained"] for row in evaluation.rows]
    assert swapped.neighbours[0].nearest["untrained"] == evaluation.neighbours[0].nearest["trained"]


def test_examples_are_spread_over_photographs_and_their_neighbours_come_from_the_bank(evaluation: Evaluation) -> None:
    shown = [HELD_OUT.labels[example.query] for example in evaluation.neighbours]
    assert len(shown) == 10
    assert all(3 <= shown.count(label) <= 4 for label in PHOTOGRAPHS)
    for example in evaluation.neighbours:
        assert [len(places) for places in example.nearest.values()] == [5, 5]
        assert all(BANK.labels[place] in PHOTOGRAPHS for places in example.nearest.values() for place in places)
        assert example.similarity["trained"] == sorted(example.similarity["trained"], reverse=True)


def test_without_cut_outs_their_rows_are_left_out(views: Views) -> None:
    held_out = tiles_of(list(HELD_OUT.labels[:18]))
    clean = Views(views.bank, views.held_out[:18], views.distorted, views.grey, MEAN, STD)
    table = evaluate(Trunk(0), Trunk(1), BANK, held_out, clean)
    assert "stamps_knn1" not in {row.key for row in table.rows}
    with pytest.raises(KeyError):
        table.row("stamps_probe")


def test_one_photograph_alone_is_refused_in_words(views: Views) -> None:
    bank, held_out = tiles_of(["kite"] * len(BANK)), tiles_of(["kite"] * len(HELD_OUT))
    with pytest.raises(UserError, match="of 1 photographs in all; it needs tiles of both sorts"):
        evaluate(Trunk(0), Trunk(1), bank, held_out, views)


def test_an_evaluation_goes_through_json_with_every_figure(evaluation: Evaluation) -> None:
    values = json.loads(json.dumps(evaluation.to_json()))
    assert values["columns"] == list(evaluation.columns)
    assert [Row(**row) for row in values["rows"]] == evaluation.rows
    assert [Neighbours(**entry) for entry in values["neighbours"]] == evaluation.neighbours
    assert values["facts"] == evaluation.facts
