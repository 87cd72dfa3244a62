"""One table: what a trained trunk can do, beside the same trunk untrained and two baselines without a trunk.

Features are the trunk's pooled ones, not centred; the batch-norm statistics of both trunks are measured anew on the
same clean images of the bank. Rows where the trained trunk loses stand in the table too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from pipeline.evaluate.baselines import colours, histogram, pixels
from pipeline.evaluate.features import features, with_statistics_of
from pipeline.evaluate.knn import TEMPERATURE, found, nearest, vote
from pipeline.evaluate.probe import fit
from pipeline.evaluate.table import COLUMNS, Evaluation, Neighbours, Row
from pipeline.evaluate.tiles import Tiles
from pipeline.evaluate.views import Views

TITLES = {
    "distorted_knn1": "Distorted tile → its photograph, 1 neighbour",
    "distorted_knn5": "Distorted tile → its photograph, 5 neighbours",
    "distorted_knn20": "Distorted tile → its photograph, 20 neighbours",
    "distorted_probe": "Distorted tile → its photograph, linear probe",
    "copy": "Distorted tile → the same tile (copy detection)",
    "clean_knn1": "Clean tile → its photograph, 1 neighbour",
    "clean_probe": "Clean tile → its photograph, linear probe",
    "grey_copy": "Grey tile → the same tile",
    "stamps_knn1": "Cut-out → its kind, 1 neighbour, leaving one out",
    "stamps_probe": "Held-out cut-out → its kind, linear probe",
}
COUNTS = (1, 5, 20)  # neighbours that vote
EXAMPLES = 10  # held-out tiles whose neighbours are kept
NEIGHBOURS = 5  # of each


def evaluate(trained: nn.Module, untrained: nn.Module, bank: Tiles, held_out: Tiles, views: Views) -> Evaluation:
    """Measure both trunks and both baselines; the same inputs give the same figures.

    Trunks map (N, 3, s, s) to (N, C) and are left as they were. views: `render_views(bank, held_out, ...)`.
    Raises UserError when the tiles do not come from two photographs at least.
    """
    photographs, stamps = _photographs(bank, held_out), _stamps(bank, held_out)
    columns = {
        "trained": _under(trained, views),
        "untrained": _under(untrained, views),
        "histogram": _without_trunk(histogram, views),
        "pixels": _without_trunk(pixels, views),
    }
    scores = {name: _scores(columns[name], photographs, stamps) for name in COLUMNS}
    tiles = {key: len(right) for key, right in scores["trained"].items()}
    rows = [
        Row(
            key=key,
            title=TITLES[key],
            tiles=tiles[key],
            chance=1 / tiles[key] if key.endswith("copy") else 1 / (stamps if "stamps" in key else photographs).classes,
            scores={name: scores[name][key].double().mean().item() for name in COLUMNS},
        )
        for key in tiles
    ]
    trunks = {name: columns[name] for name in ("trained", "untrained")}
    facts = {
        "bank": len(bank),
        "held_out": len(held_out),
        "photographs": photographs.classes,
        "kinds_of_cut_outs": stamps.classes,
        "size": views.bank.shape[-1],
        "temperature": TEMPERATURE,
    }
    return Evaluation(COLUMNS, rows, _examples(trunks, photographs), facts)


@dataclass(frozen=True)
class _Task:
    """Tiles of one sort. bank, held_out: their places; the labels beside them are numbers below `classes`."""

    bank: Tensor
    bank_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: int


@dataclass(frozen=True)
class _Features:
    """Of the views, (n, C) each."""

    bank: Tensor
    held_out: Tensor
    distorted: Tensor
    grey: Tensor


def _photographs(bank: Tiles, held_out: Tiles) -> _Task:
    task = _task(bank, held_out, torch.from_numpy(bank.photographs()), torch.from_numpy(held_out.photographs()))
    if task.classes < 2 or not len(task.bank) or not len(task.held_out):
        raise UserError(
            f"evaluation: {len(task.bank)} tiles to learn from and {len(task.held_out)} held out, of {task.classes} "
            "photographs in all; it needs tiles of both sorts, of two photographs or more"
        )
    return task


def _stamps(bank: Tiles, held_out: Tiles) -> _Task:
    return _task(bank, held_out, torch.from_numpy(bank.stamps()), torch.from_numpy(held_out.stamps()))


def _task(bank: Tiles, held_out: Tiles, in_bank: Tensor, in_held_out: Tensor) -> _Task:
    left, right = [bank.labels[i] for i in in_bank], [held_out.labels[i] for i in in_held_out]
    number = {label: n for n, label in enumerate(sorted({*left, *right}))}

    def numbers(labels: list[str]) -> Tensor:
        return torch.tensor([number[label] for label in labels], dtype=torch.long)

    return _Task(in_bank, numbers(left), in_held_out, numbers(right), len(number))


def _under(trunk: nn.Module, views: Views) -> _Features:
    measured = with_statistics_of(trunk, views.bank)
    return _described(views, lambda view: features(measured, view))


def _without_trunk(describe: Callable[[Tensor], Tensor], views: Views) -> _Features:
    return _described(views, lambda view: describe(colours(view, views.mean, views.std)))


def _described(views: Views, describe: Callable[[Tensor], Tensor]) -> _Features:
    return _Features(*map(describe, (views.bank, views.held_out, views.distorted, views.grey)))


def _scores(f: _Features, photographs: _Task, stamps: _Task) -> dict[str, Tensor]:
    """Row's key -> for each tile whether it came out right, (tiles,) bool."""
    bank, labels = f.bank[photographs.bank], photographs.bank_labels
    clean, asked = f.held_out[photographs.held_out], photographs.held_out_labels

    def by_neighbours(queries: Tensor, *counts: int) -> list[Tensor]:
        similarity, places = nearest(bank, queries, max(counts))
        return [vote(similarity[:, :k], labels[places[:, :k]], photographs.classes) == asked for k in counts]

    probe = fit(bank, labels, photographs.classes)
    right = {
        **dict(zip((f"distorted_knn{k}" for k in COUNTS), by_neighbours(f.distorted, *COUNTS), strict=True)),
        "distorted_probe": probe.predict(f.distorted) == asked,
        "copy": found(clean, f.distorted),
        "clean_knn1": by_neighbours(clean, 1)[0],
        "clean_probe": probe.predict(clean) == asked,
        "grey_copy": found(clean, f.grey),
    }
    if stamps.classes > 1 and len(stamps.bank) and len(stamps.held_out):
        right |= _stamp_scores(f.bank[stamps.bank], f.held_out[stamps.held_out], stamps)
    return right


def _stamp_scores(bank: Tensor, held_out: Tensor, stamps: _Task) -> dict[str, Tensor]:
    every = torch.cat([bank, held_out])
    labels = torch.cat([stamps.bank_labels, stamps.held_out_labels])
    _, places = nearest(every, every, k=1, leave_one_out=True)
    probe = fit(bank, stamps.bank_labels, stamps.classes)
    return {
        "stamps_knn1": labels[places[:, 0]] == labels,
        "stamps_probe": probe.predict(held_out) == stamps.held_out_labels,
    }


def _examples(trunks: dict[str, _Features], photographs: _Task) -> list[Neighbours]:
    """Neighbours of tiles spread evenly over the held-out ones, sorted by photograph: no result has a say in which."""
    ordered = photographs.held_out_labels.argsort(stable=True)
    count = min(EXAMPLES, len(ordered))
    shown = ordered[[(2 * n + 1) * len(ordered) // (2 * count) for n in range(count)]]
    best = {name: nearest(f.bank[photographs.bank], f.distorted[shown], NEIGHBOURS) for name, f in trunks.items()}
    return [
        Neighbours(
            query=int(photographs.held_out[place]),
            shown=int(place),
            nearest={name: photographs.bank[places[n]].tolist() for name, (_, places) in best.items()},
            similarity={name: similarity[n].tolist() for name, (similarity, _) in best.items()},
        )
        for n, place in enumerate(shown)
    ]
