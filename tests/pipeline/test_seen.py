"""Has a run learnt from an image? Compared with what a reader really gave, step by step, with removals and bad ones."""

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.pack import pack
from data_shards.plan import PackSettings
from data_shards.reader import Reader, ReaderSettings
from data_shards.removed import Removed, read_removed, remove
from data_shards.store import Store
from pipeline import commit
from pipeline.config import Config
from pipeline.run import Run, open_data
from pipeline.seen import seen
from tests.photos import write_tiles

COUNT, STEPS, RESUMED = 96, 40, 16
SPOILT, GONE = (7, 33, 60), (5, 20, 21, 80)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return spoilt_set(tmp_path_factory.mktemp("seen"))


def spoilt_set(folder: Path) -> str:
    """96 tiles, three of which have a wrong byte."""
    store = Store((folder / "set").as_uri())
    pack(write_tiles(folder / "tiles", COUNT), store, PackSettings(shard_bytes=40_000), workers=1)
    shards = ShardSet.open(store)
    for sample in SPOILT:
        row = shards.table().to_pylist()[sample]
        _, path = shards.tar(shards.locate(sample)[0])
        spoilt = bytearray(store.get(path))
        spoilt[row["offset"] + 200] ^= 0xFF
        store.put(path, bytes(spoilt))
    return store.url


def config(url: str, window: int = 4) -> Config:
    """window: chunks, of as many samples."""
    order = {"url": url, "batch": 8, "lanes": 2, "chunk_samples": window, "window_chunks": window}
    return Config.model_validate({"data": order, "train": {"steps": STEPS}})


class Trained:
    """A run that read its data in two attempts, the second from step 16 on, after images were removed."""

    def __init__(self, url: str, folder: Path, gone: tuple[int, ...] = GONE, window: int = 4) -> None:
        self.store = Store((folder / "run").as_uri())
        self.shards, self.order, self.config = open_data(config(url, window))
        self.table: list[dict[str, Any]] = self.shards.table().to_pylist()
        self.local = folder / "local"
        self.shown: dict[int, list[int]] = {}
        self.quarantine: list[list[Any]] = []
        self.attempt("started", 0, RESUMED + 3, Removed())
        remove(self.shards, [self.table[sample]["key"] for sample in gone], force=True)
        self.attempt("resumed", RESUMED, STEPS, read_removed(self.shards))

    def attempt(self, event: str, start: int, end: int, removed: Removed) -> None:
        run = Run.start(self.store, self.local, self.config, self.shards)
        run.event(event, step=start)
        if removed.hash:
            run.event("removed", step=start, count=len(removed), hash=removed.hash, lists=removed.lists)
        self.quarantine = [entry for entry in self.quarantine if entry[1] < start]
        bad = [sample for sample, *_ in self.quarantine]
        settings = ReaderSettings(max_bad_fraction=1)
        with ExitStack() as opened:  # of two ranks, each of which finds a bad image by itself
            ranks = [Reader(self.shards, self.order, [lane], start, settings, bad, removed) for lane in range(2)]
            for reader in ranks:
                opened.enter_context(reader)
            for step in range(start, end):
                self.shown[step + 1] = [sample.id for reader in ranks for sample in reader.batch(step)]
            self.quarantine += [[one.id, one.step, one.reason] for reader in ranks for one in reader.bad]
        run.upload()
        part = commit.Part(0, 1, "fingerprint", (), {"quarantine": self.quarantine})
        commit.put_manifest(self.store, commit.Place(end, run.attempt), [part], lambda: None)


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(data, tmp_path_factory.mktemp("trained"))


def places(trained: Trained, sample: int) -> list[tuple[int, int]]:
    """Where the reader really showed it: steps, and places in the batch."""
    return [(step, at) for step, ids in trained.shown.items() for at, one in enumerate(ids) if one == sample]


@pytest.mark.slow
def test_in_windows_so_small_that_any_other_stands_in_the_steps_are_those_of_the_reader_too(tmp_path: Path) -> None:
    gone = tuple(sample for sample in range(COUNT) if sample % 5 == 0)
    trained = Trained(spoilt_set(tmp_path), tmp_path, gone, window=2)
    lane_batch, beyond_the_formula = trained.order.lane_batch, 0
    for sample in range(COUNT):
        (image,) = seen(trained.store, trained.table[sample]["key"]).images
        shown = places(trained, sample)
        assert sorted([*image.shown, *(step for step, _ in image.in_place)]) == [step for step, _ in shown]
        for step, at in shown:
            lane, index = at // lane_batch, (step - 1) * lane_batch + at % lane_batch
            chain = [int(trained.order.sample(lane, *map(int, trained.order.place(lane, index)[:2])))]
            chain += [trained.order.replacement(lane, index, k) for k in range(1, 9)]
            beyond_the_formula += sample not in chain
    assert beyond_the_formula > 0


@pytest.mark.slow
def test_the_steps_that_saw_an_image_are_those_at_which_the_reader_gave_it(trained: Trained) -> None:
    expected = defaultdict(list)
    for step, ids in trained.shown.items():
        for sample in ids:
            expected[sample].append(step)
    stand_ins = 0
    for sample in sorted({*range(0, COUNT, 2), *SPOILT, *GONE}):
        (image,) = seen(trained.store, trained.table[sample]["key"]).images
        assert sorted([*image.shown, *(step for step, _ in image.in_place)]) == expected[sample], sample
        own = [step + 1 for step, _, _ in trained.order.seen(sample, STEPS - 1)]
        assert sorted([*image.shown, *image.left_out]) == own
        stand_ins += len(image.in_place)
    assert stand_ins > 0
    assert not any(expected[sample] for sample in SPOILT)
    for sample in GONE:
        assert all(step <= RESUMED for step in expected[sample])


def test_an_image_is_found_by_its_source_and_its_hash_too_and_told_in_words(trained: Trained) -> None:
    row = trained.table[20]
    by_key, by_source, by_hash = (seen(trained.store, row[name]) for name in ("key", "source", "sha256"))
    assert by_key.images == by_source.images == by_hash.images
    text = "\n".join(by_key.lines())
    assert f"{row['key']}: was shown" in text
    assert f"up to step {STEPS}, of the newest checkpoint" in text
    assert "left out, being removed or bad, at step" in text


def test_an_image_removed_after_the_last_start_is_told_of(trained: Trained) -> None:
    key = trained.table[50]["key"]
    before = seen(trained.store, key)
    remove(trained.shards, [key], force=True)
    after = seen(trained.store, key)
    trained.shards.store.delete(["removed/000002.txt"])
    assert after.images == before.images
    assert before.notes == ()
    assert "removed after the run's last start" in after.notes[0]


def test_what_is_in_no_set_of_the_run_is_told(trained: Trained) -> None:
    with pytest.raises(UserError, match=r"'holiday\.jpg' names no image of file://.*known by its key alone"):
        seen(trained.store, "holiday.jpg")


def test_without_a_checkpoint_there_is_no_answer(data: str, tmp_path: Path) -> None:
    store = Store((tmp_path / "run").as_uri())
    shards, _, filled = open_data(config(data))
    Run.start(store, tmp_path / "local", filled, shards)
    with pytest.raises(UserError, match="no checkpoint yet"):
        seen(store, "000000-000000")


def test_of_several_sets_an_image_is_found_in_each_that_has_it(tmp_path: Path) -> None:
    tiles, stores = write_tiles(tmp_path / "tiles", COUNT), [Store((tmp_path / name).as_uri()) for name in "ab"]
    for number, store in enumerate(stores):
        pack(tiles, store, PackSettings(seed=number, shard_bytes=40_000), workers=1)
    order = config(stores[0].url).data.model_dump() | {"url": None, "sources": [{"url": one.url} for one in stores]}
    run_store = Store((tmp_path / "run").as_uri())
    shards, given, filled = open_data(Config.model_validate({"data": order, "train": {"steps": STEPS}}))
    run = Run.start(run_store, tmp_path / "local", filled, shards)
    part = commit.Part(0, 1, "fingerprint", (), {"quarantine": []})
    commit.put_manifest(run_store, commit.Place(STEPS, run.attempt), [part], lambda: None)

    source = shards.sets[1].table().to_pylist()[20]["source"]
    keys = [next(row["key"] for row in one.table().to_pylist() if row["source"] == source) for one in shards.sets]
    images = seen(run_store, source).images
    assert [(image.url, image.key) for image in images] == [(s.url, key) for s, key in zip(stores, keys, strict=True)]
    for image in images:
        assert image.shown == tuple(step + 1 for step in range(STEPS) if image.id in given.batch(step).flatten())
    assert images[1].id == COUNT + 20
