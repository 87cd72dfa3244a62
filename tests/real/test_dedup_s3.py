"""Duplicates among photographs that lie in a real S3 store."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_shards.index import ShardSet
from data_shards.store import Store
from jobs.cli import main
from tests.photos import write_tiles


def packed(folder: Path, url: str) -> dict[str, str]:
    """Pack a folder; the key of each file."""
    assert main(["shards", str(folder), url]) == 0
    table = ShardSet.open(Store(url)).table()
    return dict(zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True))


@pytest.mark.slow
def test_planted_copies_and_leaks_are_found_in_s3_and_nothing_else(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = sorted(write_tiles(tmp_path / "tiles", 40, side=140).rglob("*.jpg"))
    train, held_out = tmp_path / "train", tmp_path / "held-out"
    train.mkdir()
    held_out.mkdir()
    for number, tile in enumerate(tiles[:35]):
        (train / f"{number}.jpg").write_bytes(tile.read_bytes())
    (train / "same.jpg").write_bytes(tiles[3].read_bytes())
    with Image.open(tiles[5]) as photo:
        photo.resize((280, 280), Image.Resampling.BICUBIC).save(train / "larger.png")
    with Image.open(tiles[8]) as photo:
        photo.save(train / "again.webp", quality=80)
    for number, tile in enumerate(tiles[35:]):
        (held_out / f"{number}.jpg").write_bytes(tile.read_bytes())
    with Image.open(tiles[11]) as photo:
        photo.save(held_out / "leak.jpg", quality=70)
    ours, theirs = s3.bucket("shards"), s3.bucket("shards")
    keys, other = packed(train, ours), packed(held_out, theirs)
    capsys.readouterr()

    assert main(["dedup", ours, "--against", theirs, "--out", str(tmp_path / "lists"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    rows = pq.read_table(tmp_path / "lists" / "groups.parquet").to_pylist()
    same, again = sorted([keys["3.jpg"], keys["same.jpg"]]), sorted([keys["8.jpg"], keys["again.webp"]])
    expected = {same[1]: same[0], keys["5.jpg"]: keys["larger.png"], again[1]: again[0]}
    assert {row["key"]: row["kept"] for row in rows} == expected
    assert (found["images"], found["exact"], sum(found["near"].values()), found["leaks"]) == (38, 1, 2, 1)
    leak = (tmp_path / "lists" / "leaks.txt").read_text().split("\t")
    assert leak[:3] == [keys["11.jpg"], theirs, other["leak.jpg"]]

    assert main(["remove", ours, str(tmp_path / "lists" / "duplicates.txt"), "--force"]) == 0
    capsys.readouterr()
    assert main(["dedup", ours, "--out", str(tmp_path / "lists"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == 0
