import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import UserError
from data_shards.index import (
    MANIFEST,
    RECORD,
    Manifest,
    index_path,
    manifest_path,
    sample_key,
    shard_path,
    table_path,
)
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from data_shards.verify import verify
from tests.photos import write_tiles

TAR, INDEX, TABLE = shard_path(1), index_path(1), table_path(1)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = Store(f"file://{tmp_path_factory.mktemp('set')}")
    pack(write_tiles(tmp_path_factory.mktemp("tiles"), 40), store, PackSettings(shard_bytes=50_000))
    return {entry.path: store.get(entry.path) for entry in store.list()}


@pytest.fixture
def store(objects: dict[str, bytes], tmp_path: Path) -> Store:
    store = Store(f"file://{tmp_path}")
    for path, data in objects.items():
        store.put(path, data)
    return store


@pytest.mark.parametrize("full", [False, True])
def test_a_set_as_it_was_packed_has_no_fault(store: Store, full: bool) -> None:
    report = verify(store, full=full)
    assert report.faults == ()
    assert report.samples == 40


@pytest.mark.parametrize("path", [TAR, INDEX, TABLE])
def test_a_missing_object_is_named(store: Store, path: str) -> None:
    store.delete([path])
    (fault,) = verify(store).faults
    assert str(fault).startswith(f"{path}: is missing; ")


def test_a_cut_shard_and_a_cut_index_are_named(store: Store) -> None:
    for path in (TAR, INDEX):
        store.put(path, store.get(path)[:-1])
    found = verify(store).faults
    assert [fault.object for fault in found] == [TAR, INDEX]
    assert all("bytes" in fault.found for fault in found)


def test_an_index_that_differs_from_the_table_is_named(store: Store) -> None:
    records = np.frombuffer(store.get(INDEX), dtype=RECORD).copy()
    records["width"][0] += 1
    records["offset"][1] = 0
    store.put(INDEX, records.tobytes())
    found = {(fault.object, fault.found) for fault in verify(store).faults}
    assert (TABLE, f"its column width differs from {INDEX} in 1 places") in found
    assert (INDEX, "its places overlap or lie outside the shard") in found


@pytest.mark.parametrize(
    ("column", "place", "by"), [("offset", 0, -512), ("offset", 3, -1024), ("size", 2, 10_000), ("size", -1, 10**6)]
)
def test_places_that_overlap_or_lie_outside_are_named(store: Store, column: str, place: int, by: int) -> None:
    records = np.frombuffer(store.get(INDEX), dtype=RECORD).copy()
    records[column][place] = int(records[column][place]) + by
    store.put(INDEX, records.tobytes())
    found = {(fault.object, fault.found) for fault in verify(store).faults}
    assert (INDEX, "its places overlap or lie outside the shard") in found


def test_a_table_that_is_none_is_named(store: Store) -> None:
    store.put(TABLE, b"no table")
    (found,) = verify(store).faults
    assert str(found).startswith(f"{TABLE}: is not a Parquet file")


def test_a_table_without_a_column_is_named(store: Store) -> None:
    rows = pq.read_table(pa.BufferReader(store.get(TABLE)))
    store.put(TABLE, parquet(rows.drop_columns(["height"])))
    (found,) = verify(store).faults
    assert found.object == TABLE
    assert "height" in found.found


def parquet(rows: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(rows, out)
    return out.getvalue()


def flip(store: Store, path: str, at: int) -> None:
    damaged = bytearray(store.get(path))
    damaged[at] ^= 1
    store.put(path, bytes(damaged))


def offset(store: Store, place: int) -> int:
    return int(np.frombuffer(store.get(INDEX), dtype=RECORD)["offset"][place])


def test_a_flipped_bit_in_an_image_is_found_by_the_full_check_only(store: Store) -> None:
    flip(store, TAR, offset(store, 2) + 700)
    assert verify(store).faults == ()
    report = verify(store, full=True)
    assert [(f.object, f.key, f.found) for f in report.faults] == [
        (TAR, "000001-000002", "its CRC32C is not the one of the index")
    ]
    assert report.keys == ["000001-000002"]


def test_a_flipped_bit_in_a_members_header_is_found_by_the_full_check(store: Store) -> None:
    flip(store, TAR, offset(store, 0) - 512 + 3)
    (fault,) = verify(store, full=True).faults
    assert (fault.object, fault.key) == (TAR, "000001-000000")
    assert "tar header" in fault.found


def test_a_member_that_bears_anothers_name_is_found_by_the_full_check(store: Store) -> None:
    tar, at = bytearray(store.get(TAR)), offset(store, 2) - 512
    member = tarfile.TarInfo.frombuf(bytes(tar[at : at + 512]), "utf-8", "strict")
    member.name = "000001-000003.jpg"
    tar[at : at + 512] = member.tobuf(tarfile.USTAR_FORMAT)
    store.put(TAR, bytes(tar))
    (fault,) = verify(store, full=True).faults
    assert (fault.key, fault.found) == ("000001-000002", "its tar header is another's")


def test_a_size_in_pixels_that_index_and_table_agree_on_wrongly_is_found_by_the_full_check(store: Store) -> None:
    records = np.frombuffer(store.get(INDEX), dtype=RECORD).copy()
    records["width"][1] = 71
    store.put(INDEX, records.tobytes())
    rows = pq.read_table(pa.BufferReader(store.get(TABLE)))
    place = rows.schema.get_field_index("width")
    store.put(TABLE, parquet(rows.set_column(place, "width", pa.array(records["width"]))))
    assert verify(store).faults == ()
    (fault,) = verify(store, full=True).faults
    assert (fault.key, fault.found) == ("000001-000001", "is 72 x 72 pixels, the index says 71 x 72")


def test_a_sha256_of_another_image_is_found_by_the_full_check(store: Store) -> None:
    rows = pq.read_table(pa.BufferReader(store.get(TABLE)))
    place = rows.schema.get_field_index("sha256")
    store.put(TABLE, parquet(rows.set_column(place, "sha256", pa.array(rows["sha256"].to_pylist()[::-1]))))
    faults = verify(store, full=True).faults
    assert faults
    assert {fault.found for fault in faults} == {"its sha256 is not the one of the table"}


def test_bytes_that_every_hash_vouches_for_are_still_decoded(store: Store) -> None:
    """Packed by a header check alone, say."""
    at, records = offset(store, 0), np.frombuffer(store.get(INDEX), dtype=RECORD).copy()
    junk = b"no image at all".ljust(int(records["size"][0]), b".")
    tar = store.get(TAR)
    store.put(TAR, tar[:at] + junk + tar[at + len(junk) :])
    records["crc32c"][0] = google_crc32c.value(junk)
    store.put(INDEX, records.tobytes())
    rows = pq.read_table(pa.BufferReader(store.get(TABLE)))
    hashes = [hashlib.sha256(junk).hexdigest(), *rows["sha256"].to_pylist()[1:]]
    store.put(TABLE, parquet(rows.set_column(rows.schema.get_field_index("sha256"), "sha256", pa.array(hashes))))
    (fault,) = verify(store, full=True).faults
    assert fault.key == "000001-000000"
    assert fault.found.startswith("not an image")


def empty(store: Store, place: int, *, wipe: bool) -> None:
    """As compaction leaves a place: offset and key alone, a member that readers skip, zeros."""
    records = np.frombuffer(store.get(INDEX), dtype=RECORD).copy()
    at, size = int(records["offset"][place]), int(records["size"][place])
    for name in ("size", "crc32c", "width", "height"):
        records[name][place] = 0
    store.put(INDEX, records.tobytes())
    rows = pq.read_table(pa.BufferReader(store.get(TABLE))).to_pylist()
    rows[place] = {name: value if name in ("key", "offset") else None for name, value in rows[place].items()}
    schema = pq.read_schema(pa.BufferReader(store.get(TABLE)))
    store.put(TABLE, parquet(pa.Table.from_pylist(rows, schema=schema)))
    member = tarfile.TarInfo("empty")
    member.type, member.size = b"V", size
    tar = store.get(TAR)
    data = bytes(size) if wipe else tar[at : at + size]
    store.put(TAR, tar[: at - 512] + member.tobuf(tarfile.USTAR_FORMAT) + data + tar[at + size :])


@pytest.mark.parametrize("place", [0, 2, -1])
def test_a_place_that_was_emptied_is_no_fault(store: Store, place: int) -> None:
    empty(store, place % (len(store.get(INDEX)) // RECORD.itemsize), wipe=True)
    assert verify(store, full=True).faults == ()


def test_an_emptied_place_whose_bytes_are_still_there_is_named(store: Store) -> None:
    empty(store, 2, wipe=False)
    (fault,) = verify(store, full=True).faults
    assert fault.key == "000001-000002"
    assert "is empty by the index, but not in the tar; make compact" in str(fault)


def test_a_damaged_image_that_was_removed_is_a_fault_no_more(store: Store) -> None:
    flip(store, TAR, offset(store, 2) + 700)
    flip(store, TAR, offset(store, 3) + 700)
    store.put("removed/000001.txt", b"000001-000002\n")
    assert verify(store, full=True).keys == ["000001-000003"]


def test_a_manifest_that_runs_cannot_find_under_its_layout_is_named(store: Store) -> None:
    path = manifest_path(Manifest.load(store).layout_id)
    store.put(path, store.get(path) + b" ")
    (differs,) = verify(store).faults
    store.delete([path])
    (missing,) = verify(store).faults
    assert (differs.object, differs.found) == (path, f"differs from {MANIFEST}")
    assert (missing.object, missing.found) == (path, "is missing")


def test_an_empty_shard_is_no_fault(store: Store) -> None:
    manifest = Manifest.load(store)
    number = len(manifest.shard_samples)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT):
        pass
    store.put(shard_path(number), out.getvalue())
    store.put(index_path(number), b"")
    store.put(table_path(number), parquet(pq.read_table(pa.BufferReader(store.get(TABLE))).slice(0, 0)))
    more = {"shard_samples": (*manifest.shard_samples, 0), "shard_bytes": (*manifest.shard_bytes, len(out.getvalue()))}
    replace(manifest, **more).save(store, create_only=False)
    assert verify(store, full=True).faults == ()


def test_tars_that_lie_elsewhere_are_checked_there(store: Store, tmp_path: Path) -> None:
    manifest, elsewhere = Manifest.load(store), Store(f"file://{tmp_path}/elsewhere")
    for number in range(len(manifest.shard_samples)):
        elsewhere.put(f"their-{number}.tar", store.get(shard_path(number)))
        store.delete([shard_path(number)])
    tars = tuple(f"{elsewhere.url}/their-{number}.tar" for number in range(len(manifest.shard_samples)))
    replace(manifest, tars=tars).save(store, create_only=False)
    assert verify(store, full=True).faults == ()
    flip(elsewhere, "their-1.tar", offset(store, 0) + 700)
    elsewhere.delete(["their-0.tar"])
    found = verify(store, full=True).faults
    assert [(fault.object, fault.key) for fault in found] == [(tars[0], None), (tars[1], "000001-000000")]


def test_an_interrupted_full_check_goes_on_where_it_was_but_for_shards_that_changed(
    store: Store, tmp_path: Path
) -> None:
    flip(store, TAR, offset(store, 0) + 700)

    def interrupt(what: str, done: int, total: int, **_: int) -> None:
        if what == "images" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(store, full=True, workers=1, notes=tmp_path / "notes", progress=interrupt)
    (note,) = (tmp_path / "notes").iterdir()
    done = [json.loads(line)[0] for line in note.read_text().splitlines() if line]
    assert 1 in done
    note.write_text(note.read_text() + '\n[3, "cut')
    rows = pq.read_table(pa.BufferReader(store.get(table_path(0))))
    store.put(table_path(0), parquet(rows.append_column("checked", pa.array([True] * len(rows)))))
    report = verify(store, full=True, notes=tmp_path / "notes")
    assert report.resumed == len(set(done) - {0}) > 0
    assert report.keys == [sample_key(1, 0)]
    assert not note.exists()
    assert verify(store, full=True, notes=tmp_path / "notes").resumed == 0


def test_where_there_is_no_set_the_user_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard set"):
        verify(Store(f"file://{tmp_path}/none"))
