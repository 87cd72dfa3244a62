"""Tiles come back from packed shards byte for byte, with their labels and sizes."""

from pathlib import Path

import pytest
from PIL import Image

from data_shards.compact import compact
from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet
from data_shards.pack import PackSettings, Source, pack
from data_shards.removed import remove
from data_shards.store import Store
from pipeline.evaluate.tiles import Tiles, read_tiles
from tests.photos import write_tiles


def packed(folder: Path, sources: Path | list[Source]) -> ShardSet:
    store = Store(f"file://{folder}")
    pack(sources, store, PackSettings(shard_bytes=40_000))
    return ShardSet(store, Manifest.load(store))


def test_tiles_of_several_shards_come_back_byte_for_byte_with_labels_and_sizes(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "photos", 30)
    stamp = folder / "stamp-birds" / "wide.jpg"
    stamp.parent.mkdir()
    Image.new("RGB", (90, 40), (200, 30, 30)).save(stamp)
    shards = packed(tmp_path / "set", folder)
    tiles = read_tiles(shards)
    assert len(shards.manifest.shard_samples) > 2
    found = {(label, data) for label, data in zip(tiles.labels, tiles.images, strict=True)}
    assert found == {(path.parent.name, path.read_bytes()) for path in folder.glob("*/*.jpg")}
    assert {tuple(size) for size in tiles.sizes.tolist()} == {(72, 72), (40, 90)}
    assert [tiles.sizes[i].tolist() for i in tiles.stamps()] == [[40, 90]]


def test_photographs_and_cut_outs_are_told_apart_by_their_labels() -> None:
    tiles = Tiles([b""] * 4, ["stamp-fish", "kite", "stampede", "stamp-"], [[1, 1]] * 4)
    assert tiles.stamps().tolist() == [0, 3]
    assert tiles.photographs().tolist() == [1, 2]


def test_a_set_without_labels_is_refused_in_words(tmp_path: Path) -> None:
    files = sorted(write_tiles(tmp_path / "photos", 4).glob("*/*.jpg"))
    shards = packed(tmp_path / "set", [Source(str(path), name=path.name) for path in files])
    with pytest.raises(UserError, match="4 of 4 images have no label"):
        read_tiles(shards)


def test_removed_tiles_are_left_out_before_and_after_their_bytes_are_erased(tmp_path: Path) -> None:
    shards = packed(tmp_path / "set", write_tiles(tmp_path / "photos", 30))
    whole = read_tiles(shards)
    remove(shards, [row["key"] for n, row in enumerate(shards.table().to_pylist()) if n in (0, 11, 29)], force=True)
    listed = read_tiles(shards)
    compact(shards.store)
    erased = read_tiles(shards)
    kept = [n for n in range(30) if n not in (0, 11, 29)]
    for left in (listed, erased):
        assert left.ids.tolist() == kept
        assert [*left.images] == [whole.images[n] for n in kept]
        assert [*left.labels] == [whole.labels[n] for n in kept]
        assert left.sizes.tolist() == whole.sizes[kept].tolist()
