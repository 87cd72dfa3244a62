"""A report gathered from a run's folder and its shards, all on local disk."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_shards.pack import PackSettings, pack
from data_shards.reader import Reader
from data_shards.store import Store
from pipeline.config import Config
from pipeline.evaluate.run import open_tiles, untrained_trunk
from pipeline.evaluate.suite import evaluate
from pipeline.evaluate.table import Evaluation
from pipeline.evaluate.views import render_views
from pipeline.loader import Batch, Loader
from pipeline.report.pictures import crop_strips
from pipeline.report.run import environments, report_run
from pipeline.run import open_data
from tests.photos import write_tiles

pytestmark = pytest.mark.slow  # packs, starts DALI, evaluates


@dataclass(frozen=True)
class Made:
    config: Config
    run: Store
    bank: str
    held_out: str
    evaluation: Evaluation


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run that has trained three steps, as its folder tells, on tiles of which every fifth is held out."""
    folder = tmp_path_factory.mktemp("made")
    files = sorted(write_tiles(folder / "photos", 120).glob("*/*.jpg"))
    bank, held_out = (f"file://{folder}/{part}" for part in ("bank", "held_out"))
    for n, file in enumerate(files):
        part = folder / "split" / ("held_out" if n % 5 == 0 else "bank") / file.parent.name
        part.mkdir(parents=True, exist_ok=True)
        file.rename(part / file.name)
    (folder / "split" / "bank" / "photo-0" / "broken.jpg").write_bytes(b"not an image")
    for part, url in (("bank", bank), ("held_out", held_out)):
        pack(folder / "split" / part, Store(url), PackSettings(shard_bytes=200_000))
    crops = [{"size": 48, "count": 2, "scale": [0.3, 1]}, {"size": 24, "count": 3, "scale": [0.1, 0.3]}]
    config = Config.model_validate(
        {
            "data": {"url": bank, "batch": 8, "lanes": 2, "chunk_samples": 4, "window_chunks": 4, "seed": 3},
            "augment": {"crops": crops},
            "model": {"trunk": "custom", "w_0": 16, "w_a": 8, "w_m": 2.0, "depth": 2, "group_width": 8},
            "train": {"steps": 3},
        }
    )  # fmt: skip
    run = Store(f"file://{folder}/runs/first")
    write_run(run, config)
    tiles = open_tiles(bank), open_tiles(held_out)
    torch.manual_seed(1)
    trained = untrained_trunk(config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})}))
    evaluation = evaluate(trained, untrained_trunk(config), *tiles, render_views(*tiles, config.augment))
    return Made(config, run, bank, held_out, evaluation)


def write_run(run: Store, config: Config) -> None:
    run.put("config.yaml", yaml.safe_dump(config.dump()).encode())
    result = {"loss": 5.5, "lr": 0.1, "grad_norm": 1.0, "prototypes_used": 0.5, "code_entropy": 0.7}
    part = {"step_s": 0.5, "wait_s": 0.1, "images_s": 16.0}
    for attempt, steps in ((1, (1, 2)), (2, (2, 3))):  # the second one begins before the end of the first
        times = [1.8e9 + 4 * attempt + 0.5 * step for step in steps]
        spent = [{**part, "time": time, "attempt": attempt} for time in times]
        rows = [{"result": {"step": s, **result}, "run": own} for s, own in zip(steps, spent, strict=True)]
        run.put(f"metrics/a{attempt:02d}-000001.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        name = "started" if attempt == 1 else "resumed"
        event = {
            "time": 1.8e9 + 4 * attempt,
            "attempt": attempt,
            "event": name,
            "step": steps[0] - 1,
            "steps": 3,
            "ranks": 2,
        }
        told = {"stopped": {"step": 2, "seconds": 0.4}, "recovered": {"step": 3, "seconds": 21.0, "redone": 1}}
        name = "stopped" if attempt == 1 else "recovered"
        later = {"time": 1.8e9 + 4 * attempt + 2, "attempt": attempt, "event": name, **told[name]}
        lines = "".join(json.dumps(line) + "\n" for line in (event, later))
        run.put(f"events/a{attempt:02d}-000001.jsonl", lines.encode())
    place = {"host": "n1", "platform": "Linux", "python": "3.11", "gpus": [], "packages": {"torch": "2.13.0"}}
    run.put("environment/a01.json", json.dumps(place).encode())


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "new folder" / "report.html"
    tiles = open_tiles(made.bank), open_tiles(made.held_out)
    assert report_run(made.run, *tiles, made.evaluation, path, authors=["An Author"], site="x") == path
    return path.read_text("utf-8")


def pictures(page: str, kind: str) -> Iterator[bytes]:
    for found in re.findall(rf'src="data:image/{kind};base64,([^"]+)"', page):
        yield base64.b64decode(found)


def first_batch(made: Made) -> Batch:
    """From the loader that the run trained with."""
    shards, order, config = open_data(made.config)
    reader = Reader(shards, order, range(config.data.lanes), 0, config.reader)
    loader = Loader(reader, config.augment, config.data.seed, 0, 1, config.loader)
    try:
        return next(iter(loader))
    finally:
        loader.close()
        reader.close()


def test_the_crops_on_the_page_are_those_of_the_runs_first_step(made: Made, page: str) -> None:
    batch = first_batch(made)
    in_turn = np.lexsort((batch.lanes, batch.indices))  # the page takes the lanes in turn, the batch one after another
    images = open_tiles(made.bank).images
    originals = [images[batch.ids[place]] for place in in_turn]
    augment = made.config.augment
    expected = crop_strips([crops[in_turn] for crops in batch.crops], originals, augment.mean, augment.std)
    assert list(pictures(page, "webp")) == expected


def test_each_example_shows_its_tile_and_ten_neighbours_judged_by_their_labels(made: Made, page: str) -> None:
    tiles = list(pictures(page, "jpeg"))
    assert len(tiles) == 10 * (2 + 5 + 5)
    assert all(Image.open(io.BytesIO(tile)).format == "JPEG" for tile in tiles)
    bank, held_out = open_tiles(made.bank), open_tiles(made.held_out)
    right = sum(
        bank.labels[place] == held_out.labels[entry.query]
        for entry in made.evaluation.neighbours
        for place in entry.nearest["trained"]
    )
    assert f"{right} of 50 by the trained trunk" in page


def test_the_page_names_what_was_refused_where_the_run_lies_and_whose_the_images_are(made: Made, page: str) -> None:
    for told in (
        "photo-0/broken.jpg",
        made.run.url,
        made.bank,
        made.held_out,
        "An Author",
        "<h1>first</h1>",
        "w_0: 16",
        "saved at step 2, 0.4 s after the signal; new steps from 3 on, 21 s after the last one, 1 step done twice",
        "27.3\u00a0% of 6 s went into steps that count; 1 restart, 1 step done twice",
    ):
        assert told in page


def test_machines_are_told_in_the_order_of_the_attempts(tmp_path: Path) -> None:
    store = Store((tmp_path / "run").as_uri())
    for attempt in (1, 2, 99, 100, 101):
        store.put(f"environment/a{attempt:02d}.json", json.dumps({"host": f"n{attempt}"}).encode())
    assert [found["host"] for found in environments(store)] == ["n1", "n2", "n99", "n100", "n101"]
