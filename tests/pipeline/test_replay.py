"""A step made again: by the hashes of a run that was really trained, on a set with removed and bad images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.pack import PackSettings, pack
from data_shards.removed import remove
from data_shards.store import Store
from jobs.cli import main
from pipeline.journal import read_metrics
from pipeline.replay import replay
from pipeline.report.replay_page import write_replay
from tests.photos import write_tiles
from tests.pipeline.test_train import config
from tests.real import ranks

pytestmark = pytest.mark.slow
GONE, SPOILT = (5, 20, 21), (7, 33)


@dataclass
class Trained:
    store: Store
    values: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of two ranks to the end, on images of which some were removed before, and some have a wrong byte."""
    folder = tmp_path_factory.mktemp("replay")
    data = Store(f"file://{folder}/shards")
    pack(write_tiles(folder / "photos", 96), data, PackSettings(shard_bytes=150_000))
    shards = ShardSet.open(data)
    table = shards.table().to_pylist()
    for sample in SPOILT:
        _, path = shards.tar(shards.locate(sample)[0])
        spoilt = bytearray(data.get(path))
        spoilt[table[sample]["offset"] + 200] ^= 0xFF
        data.put(path, bytes(spoilt))
    remove(shards, [table[sample]["key"] for sample in GONE], force=True)
    values = config(data.url, folder)
    values["reader"] = {"max_bad_fraction": 1.0}
    started = ranks.start(values, folder / "first", 2)
    assert started.wait() == [0, 0], started.tails()
    return Trained(Store(f"{values['store']}/first"), values)


def test_every_step_is_made_again_with_the_very_images_and_crops(trained: Trained) -> None:
    rows = read_metrics(trained.store)
    assert sum(row["run"]["replaced"] for row in rows) > 0
    for row in rows:
        found = replay(trained.store, row["result"]["step"], "cpu")
        assert (found.same_batch, found.same_crops) == (True, True), row
        assert (found.images, found.replaced) == (16, row["run"]["replaced"])
        assert all(crop.untyped_storage().nbytes() == crop.nbytes for shown in found.shown for crop in shown.crops)


def test_what_is_not_the_same_is_told(trained: Trained, tmp_path: Path) -> None:
    copied = Store(f"file://{tmp_path}/first")
    for entry in trained.store.list():
        copied.put(entry.path, trained.store.get(entry.path))
    told = copied.list("metrics")[0].path
    rows = [json.loads(line) for line in copied.get(told).splitlines()]
    rows[0]["result"]["crop_hash"] = "0" * 16
    copied.put(told, "".join(json.dumps(row) + "\n" for row in rows).encode())
    found = replay(copied, 1, "cpu")
    assert (found.same_batch, found.same_crops) == (True, False)
    assert found.lines()[1] == "samples and places: the same; crops, made on cpu: OTHERS"


def test_the_page_shows_images_of_all_lanes_and_needs_nothing_else(trained: Trained, tmp_path: Path) -> None:
    found = replay(trained.store, 3, "cpu")
    page = tmp_path / "new" / "page.html"
    write_replay(page, found)
    text = page.read_text()
    assert text.count("<img ") == len(found.shown) == 16
    assert {shown.lane for shown in found.shown} == {0, 1}
    assert "first, step 3" in text
    assert 'src="http' not in text


def test_a_step_that_the_run_does_not_have_is_refused_with_those_it_has(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"STEP=13: the steps of .*first are 1 to 12"):
        replay(trained.store, 13)
    site = tmp_path / "here.yaml"
    site.write_text(f"shared_dir: {tmp_path / 'shared'}\nexecutor: local\n")
    options = ["--run", trained.store.url, "--site", str(site), "--to", str(tmp_path / "page.html")]
    assert main(["replay", *options, "--step", "0"]) == 2
    assert main(["replay", *options, "--step", "12", "--device", "cpu"]) == 0
    assert "samples and places: the same" in capsys.readouterr().out
