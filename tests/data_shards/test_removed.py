"""Images that must leave a set: found by key, source or sha256, listed for good, and never shown again."""

import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet, sample_key, table_path
from data_shards.lookup import find
from data_shards.mixture import Mixture
from data_shards.order import Order
from data_shards.pack import pack
from data_shards.plan import PackSettings
from data_shards.reader import Reader, ReaderSettings
from data_shards.removed import Removed, by_shard, read_removed, remove
from data_shards.store import Store
from tests.photos import write_tiles

COUNT = 96
ORDER = Order(COUNT, 4, 4, 2, 8, 0, "removed")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 tiles in several shards; two of them have the same bytes."""
    folder = tmp_path_factory.mktemp("removed")
    tiles = write_tiles(folder / "tiles", COUNT - 1)
    first = min(tiles.rglob("*.jpg"))
    (tiles / "copy.jpg").write_bytes(first.read_bytes())
    pack(tiles, Store((folder / "set").as_uri()), PackSettings(shard_bytes=40_000), workers=1)
    return folder / "set"


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> ShardSet:
    """The set with lists of its own: everything else is the same files."""
    for path in packed.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return ShardSet.open(Store(tmp_path.as_uri()))


def rows(shards: ShardSet) -> list[dict[str, Any]]:
    return list(shards.table().to_pylist())


def test_keys_sources_and_hashes_are_found_as_they_come_together(shards: ShardSet) -> None:
    table = rows(shards)
    lines = [table[5]["key"], table[17]["source"], table[40]["sha256"].upper(), "", f" {table[5]['sha256']}\n"]
    found = find(shards, lines)
    same = [n for n, row in enumerate(table) if row["sha256"] in (table[5]["sha256"], table[40]["sha256"])]
    assert found.ids.tolist() == sorted({5, 17, 40, *same})
    assert (found.lines, found.unknown, found.examples) == (4, 0, ())


def test_a_hash_finds_all_images_of_those_bytes(shards: ShardSet) -> None:
    table = rows(shards)
    (copy,) = (row for row in table if row["source"] == "copy.jpg")
    both = [n for n, row in enumerate(table) if row["sha256"] == copy["sha256"]]
    assert len(both) == 2
    assert find(shards, [copy["sha256"]]).ids.tolist() == both
    assert len(find(shards, ["copy.jpg"]).ids) == 1


def test_keys_alone_cost_no_read_of_the_tables(shards: ShardSet) -> None:
    before = shards.store.counters.bytes_read
    assert find(shards, [sample_key(1, 0)]).ids.tolist() == [shards.manifest.shard_samples[0]]
    assert shards.store.counters.bytes_read == before


@pytest.mark.parametrize("wrong", ["000000-999999", "999999-000000", "no/such.jpg", "ab" * 32])
def test_a_line_that_names_nothing_is_told_and_nothing_is_written(shards: ShardSet, wrong: str) -> None:
    with pytest.raises(UserError) as refused:
        remove(shards, [sample_key(0, 1), wrong])
    assert f"1 of 2 lines name no image of this set ('{wrong}')" in str(refused.value)
    assert "IGNORE_UNKNOWN=1" in str(refused.value)
    assert shards.store.list("removed") == []
    report = remove(shards, [sample_key(0, 1), wrong], ignore_unknown=True)
    assert (report.added, report.unknown) == (1, 1)


def test_lists_are_added_to_and_name_each_image_once(shards: ShardSet) -> None:
    first = remove(shards, [sample_key(0, 1), sample_key(0, 0)])
    second = remove(shards, [sample_key(0, 1), sample_key(2, 3)])
    again = remove(shards, [sample_key(2, 3)])
    assert [(one.added, one.removed, one.path) for one in (first, second, again)] == [
        (2, 2, "removed/000001.txt"),
        (1, 3, "removed/000002.txt"),
        (0, 3, None),
    ]
    assert shards.store.get("removed/000001.txt") == b"000000-000000\n000000-000001\n"
    removed = read_removed(shards)
    ids = [0, 1, sum(shards.manifest.shard_samples[:2]) + 3]
    assert removed.ids.tolist() == ids
    assert [sample in removed for sample in range(COUNT)] == [sample in ids for sample in range(COUNT)]
    assert removed.lists == (2,)
    assert read_removed(shards, lists=[1]).ids.tolist() == [0, 1]
    assert read_removed(shards, lists=[1]).hash != removed.hash


def test_more_than_a_twentieth_of_a_set_is_refused_with_advice_unless_forced(shards: ShardSet) -> None:
    keys = [row["key"] for row in rows(shards)[:5]]
    with pytest.raises(UserError, match=r"5 of 96 images would be removed, 5\.2%; .* pack the set again without them"):
        remove(shards, keys)
    assert remove(shards, keys[:4]).removed == 4
    assert remove(shards, keys, force=True).removed == 5


def test_a_list_that_is_none_is_told(shards: ShardSet) -> None:
    shards.store.put("removed/000001.txt", b"holiday.jpg\n")
    with pytest.raises(UserError, match=r"removed/000001\.txt: is no list of keys"):
        read_removed(shards)
    behind = sample_key(0, shards.manifest.shard_samples[0])  # of another image, if it were counted on
    for key in ("000000-009999", behind):
        shards.store.put("removed/000001.txt", f"{key}\n".encode())
        with pytest.raises(UserError, match=r"removed/000001\.txt: names places that no shard has"):
            read_removed(shards)
    assert find(shards, [behind]).examples == (behind,)
    shards.store.put("removed/000001.txt", f"{sample_key(0, shards.manifest.shard_samples[0] - 1)}\n".encode())
    read_removed(shards)


def test_a_list_that_names_shards_which_came_later_holds_for_the_version_before(shards: ShardSet) -> None:
    shards.store.put("removed/000001.txt", b"000000-000002\n004000-000000\n")
    assert read_removed(shards).ids.tolist() == [2]


def test_the_lists_of_a_mixture_are_those_of_its_sets(shards: ShardSet, tmp_path: Path) -> None:
    other = ShardSet(Store((tmp_path / "other").as_uri()), shards.manifest)
    other.store.put("removed/000001.txt", b"000000-000007\n")
    remove(shards, [sample_key(0, 3)])
    removed = read_removed(Mixture([shards, other], (1, 1)))
    assert removed.ids.tolist() == [3, COUNT + 7]
    assert removed.lists == (1, 1)


def test_a_hundred_million_removed_take_four_bytes_each() -> None:
    ids = np.arange(0, 2 * 10**6, 2)
    removed = Removed.of(ids)
    assert removed.ids.nbytes == 4 * 10**6
    some = random.Random(0).sample(range(2 * 10**6), 200)
    assert [sample in removed for sample in some] == [sample % 2 == 0 for sample in some]
    assert 5 * 10**9 in Removed.of(np.array([5 * 10**9, 3]))
    assert -1 not in removed


def test_what_is_removed_is_dealt_to_its_shards_in_time_that_does_not_grow_with_their_product() -> None:
    counts = [0, 3, 0, *16_000 * [50], 0]
    shards = ShardSet(Store("memory://"), Manifest("", "", sum(counts), tuple(counts), (0,) * len(counts), {}, {}))
    ids = np.arange(0, sum(counts), 2)
    begun = time.process_time()
    dealt = list(by_shard(shards, ids))
    assert time.process_time() - begun < 0.5
    assert (dealt[0][0], dealt[0][1].tolist()) == (1, [0, 2])
    assert [shard for shard, _ in dealt[1:]] == [*range(3, 16_003)]
    assert {tuple(places) for _, places in dealt[1:]} == {tuple(range(1, 50, 2))}
    assert list(by_shard(shards, np.empty(0, np.int64))) == []


def shown(shards: ShardSet, removed: Removed, steps: Iterable[int] = range(24), order: Order = ORDER) -> list[Any]:
    with Reader(shards, order, range(2), 0, ReaderSettings(), removed=removed) as reader:
        samples = [sample for step in steps for sample in reader.batch(step)]
        assert reader.bad == []
    return samples


def test_what_is_removed_is_replaced_by_the_order_and_is_no_bad_sample(shards: ShardSet) -> None:
    table, gone = rows(shards), {3, 20, 21, 70}
    whole = shown(shards, read_removed(shards))
    remove(shards, [table[sample]["key"] for sample in gone])
    left = shown(shards, read_removed(shards))
    assert gone <= {sample.id for sample in whole}
    assert gone.isdisjoint(sample.id for sample in left)
    for before, after in zip(whole, left, strict=True):
        if before.id not in gone:
            assert after == before
            continue
        assert (after.lane, after.index, after.replaced[0]) == (before.lane, before.index, before.id)
        ks = range(1, 9)
        stand_ins = [ORDER.replacement(before.lane, before.index, k) for k in ks]
        assert after.id == next(sample for sample in stand_ins if sample not in gone)


def test_a_damaged_table_is_told_as_that_and_not_as_a_full_disk(tmp_path: Path) -> None:
    store = Store((tmp_path / "set").as_uri())
    pack(write_tiles(tmp_path / "tiles", 12), store, PackSettings(shard_bytes=20_000), workers=1)
    shards = ShardSet.open(store)
    last = table_path(len(shards.manifest.shard_samples) - 1)
    store.put(last, store.get(last)[:200])
    with pytest.raises(UserError) as told:
        find(shards, ["photos/a.jpg"])
    assert f"{last}: is damaged" in str(told.value)
    assert "TMPDIR" not in str(told.value)


def test_an_engine_without_room_to_look_for_images_is_told_in_one_line(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.database.MEMORY_BYTES", 1024)
    with pytest.raises(UserError, match="looking for the images failed; TMPDIR=") as error:
        find(shards, ["photos/a.jpg"])
    assert "\n" not in str(error.value)
