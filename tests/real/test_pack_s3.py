"""Packing into a real S3 store."""

from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet
from data_shards.pack import PackSettings, pack, shards
from data_shards.store import Store
from data_shards.verify import verify
from tests.photos import write_tiles


@pytest.mark.slow
def test_several_processes_pack_into_s3_and_what_they_wrote_verifies(s3: Any, tmp_path: Path) -> None:
    store = Store(s3.bucket("shards"))
    tiles = write_tiles(tmp_path, 120)
    report = pack(tiles, store, PackSettings(shard_bytes=100_000), workers=2)
    assert report.shards > 2
    assert verify(store, full=True).faults == ()
    opened = Store(store.url)
    table = ShardSet(opened, Manifest.load(opened)).table()
    assert sorted(table["source"].to_pylist()) == sorted(p.relative_to(tiles).as_posix() for p in tiles.rglob("*.jpg"))
    assert pack(tiles, store, PackSettings(shard_bytes=100_000)).already_there


def test_a_missing_bucket_is_told_before_any_image_is_read(s3: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    with pytest.raises(UserError, match="s3://photos: no such bucket") as error:
        shards(str(write_tiles(tmp_path, 5)), "s3://photos/x", progress=lambda *counts: seen.append(counts))
    assert "\n" not in str(error.value)
    assert seen == []
