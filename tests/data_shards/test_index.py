import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.index import MANIFEST, RECORD, Manifest, ShardSet, Span, sample_key, shard_path
from data_shards.store import AlreadyExists, Store


def manifest(*shard_samples: int) -> Manifest:
    sizes = tuple(1000 * count for count in shard_samples)
    return Manifest("layout", "contents", sum(shard_samples), shard_samples, sizes, {"seed": 0}, {"empty": 2})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"memory://{tmp_path.name}")


def test_a_manifest_comes_back_as_it_was_saved(store: Store) -> None:
    manifest(3, 2).save(store)
    assert Manifest.load(store) == manifest(3, 2)
    assert ShardSet(store, manifest(3, 2)).mean_bytes == 1000


def test_a_second_manifest_does_not_replace_the_first(store: Store) -> None:
    manifest(3).save(store)
    with pytest.raises(AlreadyExists):
        manifest(4).save(store)
    assert Manifest.load(store).samples == 3


def test_every_version_stays_under_its_layout(store: Store) -> None:
    manifest(3).save(store)
    replace(manifest(3, 2), layout_id="appended").save(store, create_only=False)
    assert Manifest.load(store).samples == 5
    assert Manifest.load(store, "layout").samples == 3
    with pytest.raises(UserError, match="no version of this set has the layout gone"):
        Manifest.load(store, "gone")


def test_one_store_is_enough_for_tars_of_many_folders_also_for_a_worker(store: Store) -> None:
    there = tuple(f"{root}/{n}/a.tar" for root in ("s3://b/x", "s3://c/x", "file:///x", "memory://x") for n in range(5))
    shards = ShardSet(store, replace(manifest(*20 * [1]), tars=there))
    found, paths = zip(*(shards.tar(number) for number in range(20)), strict=True)
    for stores in (found, pickle.loads(pickle.dumps(found))):  # noqa: S301
        assert [one.url for one in stores[::5]] == ["s3://b", "s3://c", "file:///", "memory://"]
        assert [one is stores[n // 5 * 5] for n, one in enumerate(stores)] == 20 * [True]
    assert list(paths) == 4 * [f"x/{n}/a.tar" for n in range(5)]


def test_shards_may_lie_elsewhere(store: Store) -> None:
    store.put("there/b.tar", b"12345")
    elsewhere = replace(manifest(1, 1), tars=(f"{store.url}/here/a.tar", f"{store.url}/there/b.tar"))
    elsewhere.save(store)
    shards = ShardSet.open(store)
    found, path = shards.tar(1)
    assert found.get(path, 1, 3) == b"23"
    assert store.submit(found.read(path)).result() == b"12345"  # on the event loop of the set's own store
    assert shards.shard_name(0) == f"{store.url}/here/a.tar"
    replace(elsewhere, tars=elsewhere.tars[:1]).save(store, create_only=False)
    with pytest.raises(UserError, match="damaged"):
        Manifest.load(store)


def test_opening_a_set_costs_one_request(store: Store) -> None:
    manifest(3, 2).save(store)
    before = store.counters.requests
    ShardSet(store, Manifest.load(store))
    assert store.counters.requests == before + 1


def test_without_a_manifest_the_user_is_told_how_to_make_a_set(store: Store) -> None:
    with pytest.raises(UserError, match=rf"no MANIFEST.json, so no shard set; make shards SRC=... DST={store.url}$"):
        Manifest.load(store)


def test_an_empty_set_is_refused(store: Store) -> None:
    manifest().save(store)
    with pytest.raises(UserError, match="the shard set is empty"):
        Manifest.load(store)


@pytest.mark.parametrize("damage", ["{", "[]", "null", "{}", '{"format": 2}', '{"format": 2, "layout_id": "x"}'])
def test_a_damaged_manifest_is_refused_in_one_line(store: Store, damage: str) -> None:
    store.put(MANIFEST, damage.encode())
    with pytest.raises(UserError, match="damaged") as error:
        Manifest.load(store)
    assert "\n" not in str(error.value)


def test_a_manifest_whose_sums_disagree_is_damaged(store: Store) -> None:
    replace(manifest(3, 2), samples=6).save(store)
    with pytest.raises(UserError, match="6 samples, 5 in its shards"):
        Manifest.load(store)


def test_a_manifest_of_another_format_is_refused(store: Store) -> None:
    store.put(MANIFEST, json.dumps({"format": 99}).encode())
    with pytest.raises(UserError, match="another version"):
        Manifest.load(store)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 200), st.integers(0, 40))
def test_spans_are_the_located_samples_in_their_order_around_the_end(counts: list[int], first: int, count: int) -> None:
    shards = ShardSet(Store("memory://x"), manifest(*counts))
    places = [(shard, place) for shard, size in enumerate(counts) for place in range(size)]
    wanted = [places[(first + i) % len(places)] for i in range(count)]
    spans = shards.spans(first, count)
    assert [(s.shard, s.first + i) for s in spans for i in range(s.count)] == wanted
    assert [shards.locate(sample) for sample in range(len(places))] == places


def test_an_id_outside_the_set_has_no_place() -> None:
    shards = ShardSet(Store("memory://x"), manifest(2, 2))
    for sample in (-1, 4):
        with pytest.raises(ValueError, match="of a set of 4"):
            shards.locate(sample)
    assert shards.spans(3, 2) == [Span(1, 1, 1), Span(0, 0, 1)]


def test_shards_are_spread_over_many_prefixes_and_their_names_are_settled() -> None:
    paths = [shard_path(number) for number in range(4096)]
    counts = np.unique([path.split("/")[1] for path in paths], return_counts=True)[1]
    assert len(set(paths)) == 4096
    assert len(counts) == 256
    assert counts.max() < 40
    assert shard_path(13) == "shards/be/000013.tar"  # sets that exist depend on it
    assert sample_key(12, 345) == "000012-000345"
    assert RECORD.itemsize == 24


def test_a_set_of_a_billion_samples_opens_within_a_second(store: Store) -> None:
    manifest(*[5400] * 185_186).save(store)
    shards = ShardSet(store, Manifest.load(store))
    assert shards.locate(10**9 - 1) == (185_185, 999)
