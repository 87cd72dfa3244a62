"""Packing into a real S3 store."""

import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from data_shards.verify import verify
from jobs.cli import main
from tests.photos import write_tiles

SMALL = PackSettings(shard_bytes=30_000)


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


@pytest.mark.parametrize(
    ("src", "bucket", "found"),
    [
        ("tiles", "s3://photos", "s3://photos: no such bucket"),
        ("gone", "s3://shards", "gone: no such file"),
        ("cut.tar", "s3://shards", "cut.tar"),
        ("list.parquet", "s3://shards", "list.parquet"),
    ],
)
def test_what_cannot_be_packed_is_one_line_and_exit_code_2_before_anything_is_written(
    s3: Any, tmp_path: Path, src: str, bucket: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiles(tmp_path / "tiles", 5)
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(tmp_path / "tiles")
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "list.parquet")
    place = s3.bucket("shards").removeprefix("s3://shards")
    assert main(["shards", str(tmp_path / src), bucket + place, "--site", ""]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert found in said.err
    assert said.err.count("\n") == 1
    assert Store(f"s3://shards{place}").list() == []


def expiring(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile whose keys come from a program, as with single sign-on; what it says is in the file that is given."""
    keys = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).read_text()
    config = Path(os.environ["AWS_CONFIG_FILE"]).read_text().replace(os.environ["AWS_PROFILE"], "expiring")
    found = dict(line.split("=") for line in keys.replace(" ", "").splitlines() if "=" in line)
    said = folder / "keys.json"
    text = {"Version": 1, "AccessKeyId": found["aws_access_key_id"], "SecretAccessKey": found["aws_secret_access_key"]}
    said.write_text(
        json.dumps({**text, "Expiration": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 300))})
    )
    (folder / "config").write_text(f"{config}\ncredential_process = /bin/cat {said}\n")
    (folder / "credentials").write_text("")
    monkeypatch.setenv("AWS_PROFILE", "expiring")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_keys_that_expire_half_way_are_one_line_and_the_same_call_goes_on_with_new_ones(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    tiles, url = write_tiles(tmp_path / "tiles", 150), s3.bucket("shards")
    good = Store(url)
    good.check()  # connected with keys that stay
    said = expiring(tmp_path, monkeypatch)
    keys = said.read_text()

    def expire(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        if what == "images" and done > 60:
            beside = said.with_suffix(".new")
            beside.write_text(json.dumps({**json.loads(keys), "SecretAccessKey": "expired"}))
            beside.replace(said)

    with pytest.raises(UserError, match=r"access denied|has not answered") as error:
        pack(tiles, Store(url, retry_seconds=5.0), SMALL, workers=workers, progress=expire)
    assert "\n" not in str(error.value)
    assert not good.exists("MANIFEST.json")
    committed = {entry.path for entry in good.list("plans/1/commits")}
    assert committed
    said.write_text(keys)
    report = pack(tiles, Store(url), SMALL, workers=workers)
    assert (report.samples, len(committed) < report.shards) == (150, True)
    assert verify(good, full=True).faults == ()
