"""The report of a run, gathered from its folder in the store and from the shards that it was trained and asked on."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.merge import read_refused
from data_shards.store import Store
from pipeline.augment import draw
from pipeline.config import Config
from pipeline.evaluate.score import read_scores
from pipeline.evaluate.table import Evaluation, Neighbours
from pipeline.evaluate.tiles import Tiles
from pipeline.evaluate.views import render_distorted
from pipeline.goodput import goodput
from pipeline.journal import read_events
from pipeline.loader import render
from pipeline.report.data import Example, Neighbour, ReportData
from pipeline.report.figures import duration, percent, times
from pipeline.report.page import write_report
from pipeline.report.pictures import crop_strips, picture, thumbnail
from pipeline.report.rows import RowReader, Rows, ends, in_order
from pipeline.run import Record, open_data, read_config, read_record

SHOWN = 8  # images whose crops are shown


def report_run(
    store: Store,
    bank: Tiles,
    held_out: Tiles,
    evaluation: Evaluation,
    path: Path,
    *,
    authors: Sequence[str] = (),
    site: str = "",
) -> Path:
    """Write the report of a run to `path`, and return it.

    store: the run's folder. evaluation: of that run, by `evaluate_run` on the same two sets. authors: whose the images
    are. site: where it ran.
    """
    config = read_config(store)
    events, rows = read_events(store), RowReader().in_store(store)
    data = ReportData(
        run=store.url.rstrip("/").rpartition("/")[2],
        config=config.dump(),
        rows=in_order(rows),
        events=events,
        evaluation=evaluation,
        scores=read_scores(store),
        crops=first_crops(config, read_record(store), bank) if bank.url == (config.data.url or "").rstrip("/") else (),
        examples=examples(evaluation, bank, held_out, config),
        refused=[refusal for url in (bank.url, held_out.url) for refusal in read_refused(Store(url))],
        environments=environments(store),
        authors=authors,
        facts={
            "Goodput": _goodput(events, rows),
            "Site": site,
            "Run's folder": store.url,
            "Shards": f"{bank.url}, held out {held_out.url}",
        },
    )
    write_report(path, data)
    return path


def first_crops(config: Config, record: Record | None, bank: Tiles) -> list[bytes]:
    """Images of the run's first step with the crops that the model saw, from all lanes in turn, as WebP."""
    ids = open_data(config, record=record)[1].batch(0)
    index, lane = np.divmod(np.arange(ids.size), len(ids))
    there = np.flatnonzero(np.isin(ids[lane, index], bank.ids))[:SHOWN]  # others have been removed since
    index, lane = index[there], lane[there]
    chosen = np.searchsorted(bank.ids, ids[lane, index])
    sizes, images = bank.sizes[chosen], [bank.images[i] for i in chosen]
    draws = draw(config.augment, config.data.seed, lane, index, sizes[:, 0], sizes[:, 1])
    crops = render(images, sizes, config.augment, draws)
    return crop_strips(crops, images, config.augment.mean, config.augment.std)


def examples(evaluation: Evaluation, bank: Tiles, held_out: Tiles, config: Config) -> list[Example]:
    """Pictures of the tiles whose neighbours the evaluation kept."""
    augment = config.augment
    distorted = render_distorted(held_out, augment, np.array([n.shown for n in evaluation.neighbours], np.int64))
    return [
        Example(
            label=held_out.labels[entry.query],
            clean=thumbnail(held_out.images[entry.query]),
            distorted=picture(image, augment.mean, augment.std),
            found={name: _found(entry, name, bank, held_out) for name in entry.nearest},
        )
        for entry, image in zip(evaluation.neighbours, distorted, strict=True)
    ]


def environments(store: Store) -> list[dict[str, Any]]:
    """Machine and packages of each attempt, the first one first."""
    paths = [entry.path for entry in store.list("environment")]
    numbered = {int(found[1]): path for path in paths if (found := re.search(r"/a(\d+)\.json$", path))}
    return [json.loads(store.get(path)) for _, path in sorted(numbered.items())]


def _goodput(events: list[dict[str, Any]], rows: Rows) -> str:
    found = goodput(events, ends(rows))
    if found is None:
        return ""
    told = f"{percent(found.share)} of {duration(found.elapsed_s)} went into steps that count"
    return f"{told}; {times(found.restarts, 'restart')}, {times(found.lost_steps, 'step')} done twice"


def _found(entry: Neighbours, name: str, bank: Tiles, held_out: Tiles) -> list[Neighbour]:
    return [
        Neighbour(thumbnail(bank.images[i]), bank.labels[i], bank.labels[i] == held_out.labels[entry.query])
        for i in entry.nearest[name]
    ]
