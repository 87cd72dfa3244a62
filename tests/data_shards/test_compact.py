"""Erasing removed images: nothing of them is left, nothing else moves, and nobody who reads meanwhile notices."""

import errno
import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.compact import compact
from data_shards.errors import UserError
from data_shards.index import RECORD, Manifest, ShardSet, dali_path, index_path, shard_path, table_path
from data_shards.order import Order
from data_shards.pack import pack
from data_shards.plan import PackSettings
from data_shards.reader import Reader, ReaderSettings
from data_shards.removed import Removed, read_removed, remove
from data_shards.sources import SourceOptions
from data_shards.store import Store
from tests.photos import write_tiles

COUNT = 60
GONE = [2, 3, 17, 40]
ORDER = Order(COUNT, 4, 3, 2, 8, 0, "compact")


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """60 tiles in several shards, of which some are removed, not erased yet."""
    store = Store((tmp_path / "set").as_uri())
    tiles = write_tiles(tmp_path / "tiles", COUNT)
    pack(tiles, store, PackSettings(shard_bytes=25_000, dali_index=True), workers=1)
    found = ShardSet.open(store)
    remove(found, [row["key"] for n, row in enumerate(found.table().to_pylist()) if n in GONE], force=True)
    return found


def everything(store: Store) -> dict[str, bytes]:
    return {entry.path: store.get(entry.path) for entry in store.list()}


def marks(shards: ShardSet) -> dict[int, list[bytes]]:
    """What would give away each image: its bytes, and what the table says of it."""
    found = {}
    for sample, row in enumerate(shards.table().to_pylist()):
        store, path = shards.tar(shards.locate(sample)[0])
        data = store.get(path, row["offset"], row["offset"] + row["size"])
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        found[sample] = [data[-300:], row["sha256"].encode(), row["source"].encode(), bytes.fromhex(row["sha256"])]
    return found


def spelled_out(path: str, data: bytes) -> bytes:
    """The bytes of an object, and of a table all that its compressed columns say."""
    if not path.endswith(".parquet"):
        return data
    return data + repr(pq.read_table(pa.BufferReader(data)).to_pylist()).encode()


def samples(shards: ShardSet, removed: Removed) -> list[tuple[Any, ...]]:
    with Reader(shards, ORDER, range(2), 0, ReaderSettings(), removed=removed) as reader:
        found = [(s.id, s.lane, s.index, s.data) for step in range(15) for s in reader.batch(step)]
        assert reader.bad == []
    return found


def test_nothing_of_an_erased_image_is_left_in_any_object_and_all_of_the_others_is(shards: ShardSet) -> None:
    before, wanted, sizes = everything(shards.store), marks(shards), shards.table()["size"].to_pylist()
    report = compact(shards.store)
    after = everything(shards.store)
    assert (report.images, report.empty) == (len(GONE), len(GONE))
    assert report.bytes == sum(sizes[sample] for sample in GONE)
    text = b"".join(spelled_out(path, data) for path, data in after.items())
    assert [sample for sample, of in wanted.items() if any(mark in text for mark in of)] == [
        sample for sample in range(COUNT) if sample not in GONE
    ]
    assert all(all(mark in text for mark in of[:3]) for sample, of in wanted.items() if sample not in GONE)
    changed = {path for path in before if before[path] != after[path]}
    assert not any(path.endswith(".json") for path in changed)
    assert before.keys() == after.keys()


def test_every_other_byte_of_a_tar_and_of_its_index_stays_where_it_is(shards: ShardSet) -> None:
    before, table = everything(shards.store), shards.table().to_pylist()
    compact(shards.store)
    after = everything(shards.store)
    for shard in range(len(shards.manifest.shard_samples)):
        old, new = (bytearray(one[shard_path(shard)]) for one in (before, after))
        records, kept = (np.frombuffer(one[index_path(shard)], RECORD) for one in (before, after))
        for sample in GONE:
            if shards.locate(sample)[0] == shard:
                start, end = table[sample]["offset"] - 512, table[sample]["offset"] + table[sample]["size"]
                assert not any(new[start + 512 : end])
                old[start:end] = new[start:end]
                place = shards.locate(sample)[1]
                assert kept[place].item() == (table[sample]["offset"], 0, 0, 0, 0)
        assert old == new
        others = [p for p in range(len(records)) if records[p] == kept[p]]
        assert len(others) == len(records) - sum(shards.locate(sample)[0] == shard for sample in GONE)


def test_the_table_keeps_of_an_empty_place_its_key_and_offset(shards: ShardSet) -> None:
    before = shards.table().to_pylist()
    compact(shards.store)
    after = shards.table()
    for sample, (old, new) in enumerate(zip(before, after.to_pylist(), strict=True)):
        assert new == (
            {name: old[name] if name in ("key", "offset") else None for name in old} if sample in GONE else old
        )


@pytest.mark.slow
def test_a_reader_gets_the_same_before_between_and_after_and_with_or_without_the_list(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, none = read_removed(shards), Removed()
    expected = samples(shards, listed)
    whole = {sample: data for sample, _, _, data in samples(shards, none)}
    moments: list[tuple[str, bool]] = []
    put, upload = Store.put, Store.upload

    def watched(write: Callable[..., None]) -> Callable[..., None]:
        def written(self: Store, *args: Any, **more: Any) -> None:
            write(self, *args, **more)
            # whoever knows the list sees no difference; whoever does not, the image or its stand-in, whole, not bad
            assert samples(shards, listed) == expected
            assert all(data == whole[sample] for sample, *_, data in samples(shards, none))
            moments.append(next(str(arg) for arg in args if isinstance(arg, str)))

        return written

    monkeypatch.setattr(Store, "put", watched(put))
    monkeypatch.setattr(Store, "upload", watched(upload))
    compact(shards.store)
    monkeypatch.undo()
    assert sum(path.endswith(".tar") for path in moments) == len({shards.locate(sample)[0] for sample in GONE})
    assert sum(path.endswith(".idx") for path in moments) >= 3
    assert samples(shards, none) == expected


@pytest.mark.slow
def test_killed_after_any_write_it_is_run_again_and_ends_alike(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, put, upload = everything(shards.store), Store.put, Store.upload
    compact(shards.store)
    expected = everything(shards.store)
    writes = 3 * 4 + 1  # of a shard: RECORDs, DALI's index, tar, table; of the plan: one part

    class Killed(Exception): ...

    for after in range(1, writes + 1):
        copy = Store((tmp_path / f"killed-{after}").as_uri())
        for path, data in whole.items():
            put(copy, path, data)
        left = [after]

        def once(write: Callable[..., None], left: list[int] = left) -> Callable[..., None]:
            def written(*args: Any, **more: Any) -> None:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                write(*args, **more)

            return written

        monkeypatch.setattr(Store, "put", once(put))
        monkeypatch.setattr(Store, "upload", once(upload))
        if after < writes:
            with pytest.raises(Killed):
                compact(copy)
        monkeypatch.undo()
        compact(copy)
        assert everything(copy) == expected
        assert compact(copy).images == 0


def test_webdataset_dali_and_tar_pass_over_the_empty_places(shards: ShardSet, tmp_path: Path) -> None:
    import webdataset

    compact(shards.store)
    for shard in range(len(shards.manifest.shard_samples)):
        local = tmp_path / f"{shard}.tar"
        local.write_bytes(shards.store.get(shard_path(shard)))
        rows = pq.read_table(pa.BufferReader(shards.store.get(table_path(shard)))).to_pylist()
        left = [(row["key"], row["sha256"]) for row in rows if row["sha256"]]
        read = webdataset.WebDataset(str(local), shardshuffle=False)
        assert [(one["__key__"], hashlib.sha256(one["jpg"]).hexdigest()) for one in read] == left
        with tarfile.open(local) as tar:
            assert [member.name.split(".")[0] for member in tar if member.isfile()] == [key for key, _ in left]
        index = tmp_path / f"{shard}.idx"
        index.write_bytes(shards.store.get(dali_path(shard)))
        for some in ([index], []):
            assert [hashlib.sha256(one).hexdigest() for one in dali_images(local, some)] == [sha for _, sha in left]


def dali_images(tar: Path, index: list[Path]) -> list[bytes]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> Any:
        return fn.readers.webdataset(name="r", paths=[str(tar)], index_paths=[str(p) for p in index], ext=["jpg"])

    pipeline = read()
    pipeline.build()
    return [bytes(pipeline.run()[0].at(0)) for _ in range(pipeline.epoch_size("r"))]


def test_appending_from_the_same_source_does_not_bring_an_erased_image_back(shards: ShardSet, tmp_path: Path) -> None:
    erased = {row["source"] for n, row in enumerate(shards.table().to_pylist()) if n in GONE}
    compact(shards.store)
    write_tiles(tmp_path / "tiles", COUNT)
    extra = tmp_path / "tiles" / "new.jpg"
    extra.write_bytes(min((tmp_path / "tiles").rglob("*.jpg")).read_bytes())
    settings = PackSettings(shard_bytes=25_000, dali_index=True)
    pack(tmp_path / "tiles", shards.store, settings, options=SourceOptions(), append=True, workers=1)
    sources = ShardSet.open(shards.store).table()["source"].to_pylist()
    assert len(sources) == COUNT + 1
    assert sources[-1] == "new.jpg"
    assert erased.isdisjoint(sources)


def test_shards_that_lie_elsewhere_are_not_written_over(tmp_path: Path) -> None:
    store = Store(tmp_path.as_uri())
    Manifest("l", "c", 2, (2,), (4096,), {}, {}, tars=("s3://theirs/a.tar",)).save(store)
    with pytest.raises(UserError, match=r"its shards lie elsewhere \(s3://theirs/a\.tar\)"):
        compact(store)


def test_nothing_removed_is_nothing_done(shards: ShardSet) -> None:
    shards.store.delete(["removed/000001.txt"])
    before = everything(shards.store)
    report = compact(shards.store)
    assert (report.images, report.shards, report.empty) == (0, 0, 0)
    assert "nothing to erase" in report.summary()
    assert everything(shards.store) == before


def test_an_index_that_is_damaged_is_no_empty_place(shards: ShardSet) -> None:
    data = shards.store.get(index_path(0))
    shards.store.put(index_path(0), bytes(len(data)))
    with Reader(shards, ORDER, range(2), 0, ReaderSettings(max_bad_fraction=1)) as reader:
        for step in range(8):
            reader.batch(step)
        assert {bad.reason for bad in reader.bad} == {"its index record is damaged"}


def test_a_full_disk_is_told_in_one_line(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", full)
        with pytest.raises(UserError, match="No space left on device; TMPDIR=") as error:
            compact(shards.store)
    assert "\n" not in str(error.value)
    assert compact(shards.store).images == len(GONE)


@pytest.mark.parametrize("path", [index_path(0), shard_path(0), table_path(0)])
def test_a_damaged_shard_is_told_with_what_to_do(shards: ShardSet, path: str) -> None:
    data = shards.store.get(path)
    shards.store.put(path, data[: len(data) // 3] + b"x")
    with pytest.raises(
        UserError, match=rf"{shard_path(0)}: it, its index or its table is damaged .*; make verify DST=.* FULL=1"
    ):
        compact(shards.store)
