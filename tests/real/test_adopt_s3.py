"""WebDataset tars that lie in a bucket already, indexed there, verified, and read in the order of training."""

from pathlib import Path
from typing import Any

import pytest

from data_shards.adopt import index_shards
from data_shards.images import Rules
from data_shards.index import ShardSet
from data_shards.order import Order
from data_shards.reader import Reader, ReaderSettings
from data_shards.store import Store
from data_shards.verify import verify
from tests.photos import write_tiles


@pytest.fixture(scope="module")
def tars(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """Three shards as webdataset writes them, sorted by class, in a bucket; and their images by name."""
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("tars")
    tiles = sorted(write_tiles(folder / "tiles", 90).rglob("*.jpg"))
    images = {}
    bucket = Store(s3.bucket("shards"))
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for place, tile in enumerate(tiles[shard * 30 : shard * 30 + 30]):
                sample = {"jpg": tile.read_bytes(), "cls": int(tile.parent.name[-1]), "json": {"n": place}, "npz": b"?"}
                writer.write({"__key__": f"ü{place:03d}", **sample})
                images[f"{shard}.tar/ü{place:03d}.jpg"] = tile.read_bytes()
        bucket.upload(folder / f"{shard}.tar", f"{shard}.tar")
    return bucket.url, images


@pytest.mark.slow
def test_tars_in_a_bucket_are_indexed_there_verified_and_read_in_the_order_of_training(
    s3: Any, tars: tuple[str, dict[str, bytes]]
) -> None:
    src, images = tars
    dst = Store(s3.bucket("shards"))
    before = [(entry.path, entry.size) for entry in Store(src).list()]
    report, about = index_shards(src, dst, Rules(), workers=2)
    assert (report.samples, report.shards, report.refused) == (90, 3, 0)
    assert "pack them to mix them" in about
    assert "% of neighbours have the same label" in about
    assert not [entry for entry in dst.list() if entry.path.endswith(".tar")]
    assert [(entry.path, entry.size) for entry in Store(src).list()] == before
    assert verify(dst, full=True).faults == ()

    shards = ShardSet.open(Store(dst.url))
    assert shards.manifest.tars == tuple(f"{src}/{shard}.tar" for shard in range(3))
    rows = shards.table().to_pylist()
    assert [row["source"] for row in rows] == list(images)
    assert {row["label"] for row in rows} == set("012345")
    assert [row["json"] for row in rows[:2]] == ['{"n": 0}', '{"n": 1}']
    assert rows[31]["key"] == "000001-000001"
    order = Order(90, 5, 2, 3, 6, 7, shards.manifest.layout_id)
    with Reader(shards, order, range(3), 0, ReaderSettings(prefetch_bytes=64 * 2**20)) as reader:
        for step in range(20):
            batch = reader.batch(step)
            assert [sample.id for sample in batch] == order.batch(step).reshape(-1).tolist()
            assert [sample.data for sample in batch] == [images[rows[sample.id]["source"]] for sample in batch]
        assert reader.bad == []


@pytest.mark.slow
def test_a_tar_that_is_indexed_is_not_read_again(s3: Any, tars: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    src, _ = tars
    dst = Store(s3.bucket("shards"))

    class Interrupted(Exception):
        pass

    def stop(what: str, done: int, total: int, **more: int) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        index_shards(src, dst, Rules(), progress=stop)
    done = {entry.path: dst.get(entry.path) for entry in dst.list()}
    written = dst.counters.bytes_written
    report, _ = index_shards(src, dst, Rules())
    assert (report.samples, report.already_there) == (90, False)
    assert {path: dst.get(path) for path in done} == done
    rest = sum(entry.size for entry in dst.list() if entry.path not in done)
    assert dst.counters.bytes_written - written == rest
    report, about = index_shards(src, dst, Rules())
    assert (report.samples, report.already_there) == (90, True)
    assert "same label" in about
