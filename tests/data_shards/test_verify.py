from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import UserError
from data_shards.index import RECORD, shard_path
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from data_shards.verify import verify
from tests.photos import write_tiles

TAR = shard_path(1)
INDEX, TABLE = TAR.replace(".tar", ".idx"), TAR.replace(".tar", ".parquet")


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
    assert verify(store).faults == (f"{path}: is missing",)


def test_a_cut_shard_and_a_cut_index_are_named(store: Store) -> None:
    for path in (TAR, INDEX):
        store.put(path, store.get(path)[:-1])
    found = verify(store).faults
    assert [fault.split(":")[0] for fault in found] == [TAR, INDEX]
    assert all("bytes" in fault for fault in found)


def test_an_index_that_differs_from_the_table_is_named(store: Store) -> None:
    records = np.frombuffer(store.get(INDEX), dtype=RECORD).copy()
    records["width"][0] += 1
    records["offset"][1] = 0
    store.put(INDEX, records.tobytes())
    found = verify(store).faults
    assert f"{TABLE}: its column width differs from {INDEX}" in found
    assert f"{INDEX}: its places overlap or lie outside the shard" in found


def test_a_table_that_is_none_is_named(store: Store) -> None:
    store.put(TABLE, b"no table")
    (found,) = verify(store).faults
    assert found.startswith(f"{TABLE}: is not a Parquet file")


def test_a_flipped_bit_in_an_image_is_found_by_the_full_check_only(store: Store, objects: dict[str, bytes]) -> None:
    records = np.frombuffer(objects[INDEX], dtype=RECORD)
    damaged = bytearray(objects[TAR])
    damaged[int(records["offset"][2] + records["size"][2] // 2)] ^= 1
    store.put(TAR, bytes(damaged))
    assert verify(store).faults == ()
    assert verify(store, full=True).faults == (f"{TAR}: 000001-000002: its CRC32C is not the one of the index",)


def test_where_there_is_no_set_the_user_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard set"):
        verify(Store(f"file://{tmp_path}/none"))
