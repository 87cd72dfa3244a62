"""Images that leave, and sets that are mixed and added to, on a real S3 and in real runs."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.index import ShardSet
from data_shards.order import Order
from data_shards.pack import pack
from data_shards.plan import PackSettings
from data_shards.removed import remove
from data_shards.store import Store
from jobs.cli import main
from pipeline.agreement import batch_hash
from pipeline.config import Config
from pipeline.journal import read_events
from pipeline.run import open_data, read_record
from pipeline.seen import seen
from tests.photos import write_tiles
from tests.real.ranks import start
from tests.real.test_resume import STEPS, config_for, results

pytestmark = pytest.mark.slow
SETTINGS = PackSettings(shard_bytes=60_000, dali_index=True)
LARGE = 120  # images


def test_nothing_of_an_erased_image_is_left_in_the_bucket(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = s3.bucket("shards")
    store = Store(url)
    pack(write_tiles(tmp_path / "tiles", 120), store, SETTINGS, workers=1)
    rows = ShardSet.open(store).table().to_pylist()
    named = {3: rows[3]["key"], 44: rows[44]["source"], 101: rows[101]["sha256"]}
    marks = [[end, rows[n]["sha256"].encode(), rows[n]["source"].encode()] for n, end in enumerate(ends(store))]
    assert told_of(store, marks) == set(range(120))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(named.values()))

    assert main(["remove", url, str(listed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 3
    assert main(["compact", url]) == 0
    said = capsys.readouterr().out
    assert "3 images erased" in said
    assert "old versions" not in said  # the server says that the bucket keeps none
    assert told_of(store, marks) == set(range(120)) - set(named)
    assert main(["compact", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 0
    assert main(["verify", url, "--full"]) == 0, capsys.readouterr().out

    listed.write_text("holiday.jpg\n")
    assert main(["remove", url, str(listed)]) == 2
    assert "nothing was removed" in capsys.readouterr().err
    assert main(["remove", url, str(tmp_path / "none.txt")]) == 2
    assert "No such file" in capsys.readouterr().err


def ends(store: Store) -> Iterator[bytes]:
    """The last bytes of each image."""
    shards = ShardSet.open(store)
    for sample, row in enumerate(shards.table().to_pylist()):
        where, path = shards.tar(shards.locate(sample)[0])
        data = where.get(path, row["offset"], row["offset"] + row["size"])
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        yield data[-200:]


def told_of(store: Store, marks: list[list[bytes]]) -> set[int]:
    """Of which images any object of the store tells; tables count with what their compressed columns say."""
    text = b""
    for entry in store.list():
        data = store.get(entry.path)
        table = entry.path.endswith(".parquet")
        text += data + (repr(pq.read_table(pa.BufferReader(data)).to_pylist()).encode() if table else b"")
    return {sample for sample, of in enumerate(marks) if any(mark in text for mark in of)}


def test_a_mixed_run_goes_on_unchanged_when_a_set_grows_and_leaves_out_what_was_removed(
    s3: Any, runs: str, tmp_path: Path
) -> None:
    large, growing, run = Store(s3.bucket("shards")), Store(s3.bucket("shards")), Store(f"{runs}/mixed")
    pack(write_tiles(tmp_path / "large", LARGE), large, SETTINGS, workers=1)
    tiles = write_tiles(tmp_path / "tiles", 90, side=64)
    pack(tiles, growing, SETTINGS, workers=1)
    values = config_for("", runs)
    sources = [{"url": large.url, "weight": 3}, {"url": growing.url, "weight": 1}]
    values["data"] |= {"url": None, "sources": sources, "window_chunks": 2}
    shards, order, _ = open_data(Config.model_validate(values))
    first = start(values, tmp_path / "mixed", 1)
    first.wait_until(lambda: any(entry.path.endswith("MANIFEST.json") for entry in run.list("checkpoints")))
    first.kill()

    record = read_record(run)
    (tiles / "more.jpg").write_bytes(min(tiles.rglob("*.jpg")).read_bytes())
    pack(tiles, growing, SETTINGS, append=True, workers=1)
    assert ShardSet.open(growing).manifest.samples == 91
    later = np.unique(order.batch(STEPS - 3))
    gone = {int(later[0]), int(later[-1])}  # one of each set
    for sample in gone:
        remove(ShardSet.open(shards.sets[sample >= LARGE].store), [sha256(shards, sample)])

    second = start(values, tmp_path / "mixed", 1)
    assert second.wait() == [0], second.tails()
    assert read_record(run) == record
    events = read_events(run)
    (resumed,) = [event for event in events if event["event"] == "resumed"]
    (removed,) = [event for event in events if event["event"] == "removed"]
    assert (removed["step"], removed["count"], removed["attempt"]) == (resumed["step"], 2, 2)
    assert removed["note"] == "another list than before"
    rows = results(run.url)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        ids = shown(order, row["step"] - 1, gone if row["step"] > resumed["step"] else set())
        expected = batch_hash(ids.reshape(-1), range(order.lanes), row["step"] - 1) % 2**64
        assert row["batch_hash"] == f"{expected:016x}", row["step"]
    for sample in gone:
        (image,) = seen(run, sha256(shards, sample)).images
        assert all(step <= resumed["step"] for step in image.shown)
        assert any(step == STEPS - 2 for step in image.left_out)


def shown(order: Order, step: int, gone: set[int]) -> np.ndarray:
    """The ids of a step's batch, those that are gone replaced."""
    ids = order.batch(step)
    for (lane, i), sample in np.ndenumerate(ids):
        stand_ins = (order.replacement(lane, step * order.lane_batch + i, k) for k in range(1, 9))
        if sample in gone:
            ids[lane, i] = next(one for one in stand_ins if one not in gone)
    return ids


def sha256(shards: ShardSet, sample: int) -> str:
    which = sample >= LARGE
    return str(shards.sets[which].table().to_pylist()[sample - LARGE * which]["sha256"])
