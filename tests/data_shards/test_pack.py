"""Packing real photographs into shards, and reading them back by programs that are not ours."""

import hashlib
import io
import shutil
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_shards.errors import UserError
from data_shards.files import store_of
from data_shards.index import RECORD, Manifest, ShardSet, dali_path, shard_path
from data_shards.merge import read_refused
from data_shards.pack import PackSettings, Source, pack
from data_shards.shard import COLUMNS
from data_shards.store import Store
from tests.photos import write_tiles

SMALL = PackSettings(shard_bytes=60_000)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles"), 90)


@pytest.fixture(scope="module")
def packed(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    store = Store(f"file://{tmp_path_factory.mktemp('packed')}")
    pack(tiles, store, SMALL)
    return ShardSet(store, Manifest.load(store))


def every_object(store: Store) -> dict[str, bytes]:
    return {entry.path: store.get(entry.path) for entry in store.list()}


def test_every_source_is_in_the_shards_once_byte_for_byte(tiles: Path, packed: ShardSet) -> None:
    assert packed.manifest.samples == 90
    assert len(packed.manifest.shard_samples) > 3
    rows = packed.table().to_pylist()
    assert sorted(row["source"] for row in rows) == sorted(
        p.relative_to(tiles).as_posix() for p in tiles.rglob("*.jpg")
    )
    for sample, row in enumerate(rows):
        shard, _ = packed.locate(sample)
        data = packed.store.get(shard_path(shard), row["offset"], row["offset"] + row["size"])
        assert data == (tiles / row["source"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert row["label"] == row["source"].split("/")[0]
        assert (row["width"], row["height"], row["format"]) == (72, 72, "jpg")


def test_the_binary_index_proves_every_sample(packed: ShardSet) -> None:
    for shard, count in enumerate(packed.manifest.shard_samples):
        tar = packed.store.get(shard_path(shard))
        assert len(tar) == packed.manifest.shard_bytes[shard]
        records = np.frombuffer(packed.store.get(shard_path(shard).replace(".tar", ".idx")), dtype=RECORD)
        assert len(records) == count
        for record in records:
            data = tar[int(record["offset"]) : int(record["offset"]) + int(record["size"])]
            assert google_crc32c.value(data) == record["crc32c"]
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (record["width"], record["height"])


def test_a_tar_shows_nothing_of_the_machine_or_the_source_and_keys_say_the_place(packed: ShardSet) -> None:
    keys = []
    for shard, count in enumerate(packed.manifest.shard_samples):
        with tarfile.open(fileobj=io.BytesIO(packed.store.get(shard_path(shard)))) as tar:
            members = tar.getmembers()
        assert len(members) == count
        for place, member in enumerate(members):
            assert member.name == f"{shard:06d}-{place:06d}.jpg"
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert (member.mode, member.type, member.pax_headers) == (0o644, tarfile.REGTYPE, {})
        keys += [member.name.split(".")[0] for member in members]
    assert keys == packed.table()["key"].to_pylist()
    assert len(set(keys)) == 90


def test_neighbours_in_a_folder_are_far_apart_in_the_shards(packed: ShardSet) -> None:
    order = np.argsort(packed.table()["source"].to_pylist())
    distances = np.abs(np.diff(order))
    assert np.median(distances) > 15  # a random order of 90: about 26
    assert not np.array_equal(order, np.arange(90))


@pytest.mark.slow
def test_the_shards_are_the_same_bytes_however_many_processes_write_them(tiles: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    for copy in range(9):
        shutil.copytree(tiles, many / f"{copy}")
    found = []
    for workers in (1, 3):
        store = Store(f"file://{tmp_path}/{workers}")
        pack(many, store, SMALL, workers=workers)
        found.append(every_object(store))
    assert len(found[0]) > 30
    assert found[0] == found[1]


def test_another_seed_gives_another_order_and_another_layout(tiles: Path, packed: ShardSet, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    pack(tiles, store, PackSettings(shard_bytes=60_000, seed=1))
    other = ShardSet(store, Manifest.load(store))
    assert other.manifest.layout_id != packed.manifest.layout_id
    assert other.table()["source"].to_pylist() != packed.table()["source"].to_pylist()


def test_bad_files_are_refused_by_rule_and_listed_and_the_rest_is_packed(tiles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiles, folder)
    one = next(tiles.rglob("*.jpg")).read_bytes()
    (folder / "cut.jpg").write_bytes(one[: len(one) // 2])
    (folder / "empty.png").touch()
    (folder / "page.html.jpg").write_text("<html>")
    (folder / "notes\n.txt").write_text("hello")
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    Image.new("RGB", (64, 64)).save(folder / "still.gif")
    store = Store(f"file://{tmp_path}/dst")
    report = pack(folder, store, SMALL)
    assert report.samples == 91
    assert report.reasons == {"damaged": 1, "empty": 1, "not an image": 2, "too small": 1}
    assert report.refused == 5
    assert f"91 images in {report.shards} shards" in report.summary()
    assert "refused 5 (1 damaged, 1 empty, 2 not an image, 1 too small)" in report.summary()
    assert "'empty.png': empty" in report.refused_lines()
    assert not any("\n" in line for line in report.refused_lines())
    assert {(one.source, one.reason) for one in read_refused(store)} == {
        ("cut.jpg", "damaged"),
        ("empty.png", "empty"),
        ("page.html.jpg", "not an image"),
        ("notes\n.txt", "not an image"),
        ("small.png", "too small"),
    }
    assert Manifest.load(store).refused == report.reasons
    (gif,) = [r for r in ShardSet(store, Manifest.load(store)).table().to_pylist() if r["source"] == "still.gif"]
    assert (gif["format"], gif["label"]) == ("png", None)


def test_names_that_are_no_text_and_nasty_ones_are_packed_but_never_become_paths(tiles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nasty"
    folder.mkdir()
    data = next(tiles.rglob("*.jpg")).read_bytes()
    for number, name in enumerate((b"\xff\xfe.jpg", b"a.b.c.jpg", b"-rf .jpg", "\u202egpj.jpg".encode(), b"'\";.jpg")):
        (folder / Path(str(name, "utf-8", "surrogateescape"))).write_bytes(data + b"\0" * number)
    store = Store(f"file://{tmp_path}/dst")
    assert pack(folder, store, SMALL).samples == 5
    paths = [entry.path for entry in store.list()]
    assert all(path.isascii() and " " not in path for path in paths)
    assert "\\xff\\xfe.jpg" in ShardSet(store, Manifest.load(store)).table()["source"].to_pylist()


def test_packing_the_same_again_says_it_is_there_and_reads_and_writes_nothing(tiles: Path, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    first = pack(tiles, store, SMALL)
    before = store.counters.bytes_written
    again = pack(str(tiles) + "/", store, SMALL, progress=lambda *_, **__: pytest.fail("it works"))
    assert (first.already_there, again.already_there) == (False, True)
    assert (again.samples, again.shards, again.bytes) == (first.samples, first.shards, first.bytes)
    assert store.counters.bytes_written == before


def test_a_place_that_holds_another_set_is_refused_and_left_as_it_is(tiles: Path, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/dst")
    pack(tiles, store, SMALL)
    before = every_object(store)
    with pytest.raises(
        UserError, match=r"holds another shard set.*min_side: 32 there, 33 here.*DST of its own"
    ) as error:
        pack(tiles, store, PackSettings(shard_bytes=60_000, min_side=33))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"source: {tiles} there, {tiles}/photo-1 here"):
        pack(tiles / "photo-1", store, SMALL)
    store.delete(path for path in before if path.startswith("plans/"))
    with pytest.raises(UserError, match=r"holds another shard set \(90 samples\)"):
        pack(tiles, store, SMALL)
    assert {path: data for path, data in before.items() if not path.startswith("plans/")} == every_object(store)


def test_progress_counts_what_is_listed_then_images_and_bytes_to_their_totals(tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "src").symlink_to(tiles)
    seen: list[tuple[str, int, int, int, int]] = []

    def note(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        seen.append((what, done, total, bytes, refused))

    pack(tmp_path / "src", Store(f"memory://{tmp_path.name}"), SMALL, progress=note)
    assert seen[0] == ("listed", 90, 0, 0, 0)
    images = [one for one in seen if one[0] == "images"]
    assert images == sorted(images)
    assert images[-1] == ("images", 90, 90, sum(path.stat().st_size for path in tiles.rglob("*.jpg")), 0)


def test_sources_may_be_handed_over_with_labels_of_their_own(tiles: Path, tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    pack([Source(str(path), name=path.name, label=path.name[-5]) for path in tiles.rglob("*.jpg")], store, SMALL)
    assert set(ShardSet(store, Manifest.load(store)).table()["label"].to_pylist()) == set("0123456789")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "no such file, and no such folder; make shards SRC="),
        (lambda folder: folder.mkdir(), "there is no file in it"),
        (lambda folder: (folder.mkdir(), (folder / "a").touch()), "no image to pack: 1 empty"),
    ],
)
def test_a_source_without_images_is_one_clear_line_and_leaves_nothing(prepare: Any, words: str, tmp_path: Path) -> None:
    prepare(tmp_path / "src")
    store = Store(f"file://{tmp_path}/dst")
    with pytest.raises(UserError, match=words) as error:
        pack(tmp_path / "src", store, SMALL)
    assert "\n" not in str(error.value)
    assert every_object(store) == {}


def test_two_sources_of_one_name_are_refused(tiles: Path, tmp_path: Path) -> None:
    one = str(next(tiles.rglob("*.jpg")))
    with pytest.raises(UserError, match="two sources have the name 'a'"):
        pack([Source(one, name="a"), Source(one, name="a")], Store(f"memory://{tmp_path.name}"), SMALL)


@pytest.mark.slow
def test_webdataset_reads_the_shards(tiles: Path, packed: ShardSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [
        f"{packed.store.url.removeprefix('file://')}/{shard_path(n)}" for n in range(len(packed.manifest.shard_samples))
    ]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    rows = packed.table().to_pylist()
    assert [sample["__key__"] for sample in found] == [row["key"] for row in rows]
    assert [sample["jpg"] for sample in found] == [(tiles / row["source"]).read_bytes() for row in rows]


def test_metadata_columns_are_kept_with_their_types(tiles: Path, tmp_path: Path) -> None:
    columns = pa.schema([("taken", pa.timestamp("us")), ("tags", pa.list_(pa.string())), ("quality", pa.float32())])
    values = {"taken": datetime(2026, 1, 2, 3, 4, 5), "tags": ["a", "b"], "quality": 0.5}
    paths = sorted(str(path) for path in tiles.rglob("*.jpg"))
    listed = pa.table(
        {"path": paths, **{name: pa.array([values[name]] * 90, columns.field(name).type) for name in values}}
    )
    pq.write_table(listed, tmp_path / "list.parquet")
    store = Store(f"memory://{tmp_path.name}")
    pack(tmp_path / "list.parquet", store, SMALL)
    table = ShardSet(store, Manifest.load(store)).table()
    assert pa.schema([table.schema.field(name) for name in values]) == columns
    assert table.select(list(values)).to_pylist() == [values] * 90


def test_captions_are_kept_however_many_images_without_any_come_first(tiles: Path, tmp_path: Path) -> None:
    image = str(next(tiles.rglob("*.jpg")))
    bare = [Source(image, name=f"{n:04d}", label="3") for n in range(1100)]
    told = [Source(image, name="a", columns={"txt": "a dog"}), Source(image, name="b", columns={"cls": "4", "txt": ""})]
    store = Store(f"memory://{tmp_path.name}")
    pack([*bare, *told], store, PackSettings())
    table = ShardSet.open(store).table()
    assert table.column_names == [*COLUMNS.names, "cls", "txt"]  # nobody says any json
    rows = {row["source"]: (row["cls"], row["txt"]) for row in table.to_pylist()}
    assert {name: said for name, said in rows.items() if any(said)} == {"a": (None, "a dog"), "b": ("4", "")}


def test_the_index_of_images_alone_has_no_columns_for_captions(packed: ShardSet) -> None:
    assert packed.table().column_names == COLUMNS.names


def test_images_that_a_pattern_names_are_packed_and_found_packed_again(tiles: Path, tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    one = sorted(path.name for path in tiles.iterdir())[0]
    report = pack(f"{tiles}/{one}/*.jpg", store, SMALL)
    rows = ShardSet.open(store).table().to_pylist()
    assert sorted(row["source"] for row in rows) == sorted(path.name for path in (tiles / one).glob("*.jpg"))
    assert len(rows) == report.samples > 1
    assert pack(f"{tiles}/{one}/*.jpg", store, SMALL).already_there


def test_a_column_of_a_list_is_kept_though_nothing_is_in_it(tiles: Path, tmp_path: Path) -> None:
    path = str(next(tiles.rglob("*.jpg")))
    pq.write_table(pa.table({"path": [path], "txt": pa.nulls(1, pa.string())}), tmp_path / "list.parquet")
    store = Store(f"memory://{tmp_path.name}")
    pack(tmp_path / "list.parquet", store, SMALL)
    assert ShardSet.open(store).table()["txt"].to_pylist() == [None]


def test_a_source_whose_sizes_are_listed_is_read_once(tiles: Path, tmp_path: Path) -> None:
    place = store_of(f"memory://{tmp_path.name}/src")
    assert place is not None
    source, _ = place
    for path in tiles.rglob("*.jpg"):
        source.put(f"{tmp_path.name}/src/{path.name}", path.read_bytes())
    before = source.counters.bytes_read
    pack(f"memory://{tmp_path.name}/src", Store(f"file://{tmp_path}/dst"), SMALL, workers=1)
    assert source.counters.bytes_read - before == sum(path.stat().st_size for path in tiles.rglob("*.jpg"))


@pytest.mark.slow
def test_dalis_webdataset_reader_reads_the_shards_by_the_index_that_was_asked_for(tiles: Path, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    shutil.copytree(tiles, tmp_path / "src")
    for path in sorted((tmp_path / "src").rglob("*.jpg"))[::3]:
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        path.unlink()
    store = Store(f"file://{tmp_path}/dst")
    pack(tmp_path / "src", store, PackSettings(shard_bytes=200_000, dali_index=True))
    rows = ShardSet.open(store).table().to_pylist()
    shards = range(len(Manifest.load(store).shard_samples))
    assert {row["format"] for row in rows} == {"jpg", "png"}

    @dali.pipeline_def(batch_size=len(rows), num_threads=1, device_id=None)
    def read() -> Any:
        return dali.fn.readers.webdataset(
            paths=[f"{tmp_path}/dst/{shard_path(n)}" for n in shards],
            index_paths=[f"{tmp_path}/dst/{dali_path(n)}" for n in shards],
            ext=["jpg;png"],
        )

    pipeline = read()
    pipeline.build()
    (batch,) = pipeline.run()
    for place, row in enumerate(rows):
        assert bytes(np.asarray(batch.at(place))) == (tmp_path / "src" / row["source"]).read_bytes()
