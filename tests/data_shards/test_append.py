"""Adding to a shard set: only what is new, as shards behind the old ones, which stay as they are."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet
from data_shards.pack import PackSettings, pack, prepare
from data_shards.plan import forgotten, load_plans
from data_shards.store import Store
from tests.data_shards.test_archives import tar_of
from tests.photos import write_tiles

SMALL = PackSettings(shard_bytes=60_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiles(tmp_path / "src", 40)


def more(folder: Path, count: int) -> None:
    write_tiles(folder.parent / "other", count)
    shutil.move(folder.parent / "other", folder / "new")


def contents(store: Store, prefix: str = "") -> dict[str, bytes]:
    return {entry.path: store.get(entry.path) for entry in store.list(prefix)}


def sources(store: Store) -> list[str]:
    return [str(name) for name in ShardSet.open(store).table()["source"].to_pylist()]


def test_only_what_is_new_becomes_new_shards_and_a_new_version_behind_the_old_ones(folder: Path) -> None:
    store = Store(f"file://{folder.parent}/dst")
    first = pack(folder, store, SMALL)
    before, old_sources = contents(store), sources(store)
    more(folder, 25)
    report = pack(folder, store, SMALL, append=True)
    old, new = Manifest.load(store, first.layout_id), Manifest.load(store)
    assert (report.samples, old.samples, new.samples) == (65, 40, 65)
    assert report.layout_id == new.layout_id != old.layout_id
    assert new.shard_samples[: len(old.shard_samples)] == old.shard_samples
    assert {path: data for path, data in contents(store).items() if path in before and path != "MANIFEST.json"} == {
        path: data for path, data in before.items() if path != "MANIFEST.json"
    }
    assert sources(store)[:40] == old_sources
    assert sorted(sources(store)[40:]) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("new/*/*.jpg"))


def test_nothing_new_is_said_and_nothing_is_written(folder: Path) -> None:
    store = Store(f"file://{folder.parent}/dst")
    pack(folder, store, SMALL)
    before = contents(store)
    assert pack(folder, store, SMALL, append=True).already_there
    assert contents(store) == before


def test_the_command_that_packed_first_still_finds_its_set_there(folder: Path) -> None:
    store = Store(f"file://{folder.parent}/dst")
    pack(folder, store, SMALL)
    more(folder, 25)
    pack(folder, store, SMALL, append=True)
    again = pack(folder, store, SMALL)
    assert (again.already_there, again.samples) == (True, 65)


def test_refused_sources_are_counted_over_all_and_not_tried_again(folder: Path) -> None:
    store = Store(f"file://{folder.parent}/dst")
    (folder / "a.jpg").write_text("no image")
    pack(folder, store, SMALL)
    more(folder, 10)
    (folder / "b.jpg").touch()
    report = pack(folder, store, SMALL, append=True)
    assert report.reasons == {"empty": 1, "not an image": 1}
    assert {one.source for one in report.examples} == {"a.jpg", "b.jpg"}
    assert pack(folder, store, SMALL, append=True).already_there


def test_another_source_is_added_whole_even_when_its_names_are_the_same(folder: Path, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/dst")
    pack(folder, store, SMALL)
    shutil.copytree(folder, tmp_path / "copy")
    assert pack(tmp_path / "copy", store, PackSettings(shard_bytes=2**20), append=True).samples == 80
    assert [plan.number for plan in load_plans(store)] == [1, 2]


@pytest.mark.parametrize("wider", ["{000..002}.tar", "*.tar", ""])
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_pattern_that_has_grown_adds_what_is_new(tmp_path: Path, wider: str, kind: str) -> None:
    tiles = sorted(write_tiles(tmp_path / "tiles", 24).rglob("*.jpg"))
    tars = Store(f"file://{tmp_path}/tars" if kind == "file" else f"memory://{tmp_path.name}/tars")
    for number in range(3):
        members = {f"{path.stem}.jpg": path.read_bytes() for path in tiles[8 * number : 8 * number + 8]}
        tar_of(tmp_path / "one.tar", members)
        tars.put(f"{number:03d}.tar", (tmp_path / "one.tar").read_bytes())
    store = Store(f"file://{tmp_path}/dst")
    assert pack(f"{tars.url}/{{000..001}}.tar", store, SMALL).samples == 16
    assert pack(f"{tars.url}/{wider}", store, SMALL, append=True).samples == 24
    hashes = ShardSet.open(store).table()["sha256"].to_pylist()
    assert len(set(hashes)) == 24


def test_lists_by_a_pattern_are_other_sources_when_it_is_another_one(tmp_path: Path) -> None:
    """They name files from their own folders: the same name may be another file."""
    for folder in ("a", "b"):
        tile = next(write_tiles(tmp_path / folder, 2).rglob("*.jpg"))
        tile.rename(tmp_path / folder / "x.jpg")
        (tmp_path / folder / "list.txt").write_text("x.jpg\n")
    store = Store(f"file://{tmp_path}/dst")
    assert pack(f"{tmp_path}/[a]/list.txt", store, SMALL).samples == 1
    assert pack(f"{tmp_path}/[b]/list.txt", store, SMALL, append=True).samples == 2


@pytest.mark.parametrize("spelling", ["src/", "src/.", "/{root}/src", "file://{root}/src/", "dst/../src", "link"])
def test_a_local_source_is_the_same_one_however_it_is_typed(
    spelling: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"file://{folder.parent}/dst")
    pack(folder, store, SMALL)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(folder)
    assert pack(spelling.format(root=folder.parent), store, SMALL, append=True).already_there
    more(folder, 5)
    assert pack(spelling.format(root=folder.parent), store, SMALL, append=True).samples == 45


def test_a_source_in_a_store_is_the_same_one_with_a_slash_at_its_end(folder: Path) -> None:
    photos, store = Store("memory://spelled/photos"), Store(f"file://{folder.parent}/dst")
    for path in folder.rglob("*.jpg"):
        photos.put(path.relative_to(folder).as_posix(), path.read_bytes())
    assert pack(photos.url, store, SMALL).samples == 40
    assert pack(f"{photos.url}/", store, SMALL, append=True).already_there
    assert pack(f"{photos.url}/", store, SMALL).already_there


@pytest.mark.parametrize("spelling", ["{folder}/", "{folder}/../src", "file://{folder}"])
def test_a_set_whose_plan_has_another_spelling_of_the_source_is_gone_on_with_and_added_to(
    spelling: str, folder: Path
) -> None:
    store = Store(f"file://{folder.parent}/dst")
    prepare(folder, store, SMALL)
    plan = json.loads(store.get("plans/1/PLAN.json"))
    plan["asked"][0] = spelling.format(folder=folder)
    store.put("plans/1/PLAN.json", json.dumps(plan).encode())
    assert pack(folder, store, SMALL).samples == 40
    more(folder, 5)
    assert pack(folder, store, SMALL, append=True).samples == 45


def test_a_name_that_the_plan_has_forgotten_is_still_not_added_again(folder: Path) -> None:
    store = Store(f"file://{folder.parent}/dst")
    pack(folder, store, PackSettings(shard_bytes=2**20))
    path = load_plans(store)[0].group_path(0)
    table = pq.read_table(pa.BufferReader(store.get(path)))
    names = pa.array([forgotten(name) for name in table["name"].to_pylist()], pa.binary())
    for column, values in (("name", names), ("url", pa.nulls(40, pa.binary()))):
        table = table.set_column(table.schema.names.index(column), column, values)
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    store.put(path, out.getvalue().to_pybytes())
    assert pack(folder, store, PackSettings(shard_bytes=2**20), append=True).already_there
    more(folder, 5)
    assert pack(folder, store, PackSettings(shard_bytes=2**20), append=True).samples == 45


def test_an_append_that_is_half_done_goes_on_by_the_same_command_only(folder: Path) -> None:
    store = Store(f"file://{folder.parent}/dst")
    pack(folder, store, SMALL)
    more(folder, 25)

    def stop(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        if what == "images" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, store, SMALL, append=True, progress=stop)
    assert Manifest.load(store).samples == 40
    with pytest.raises(UserError, match=r"or the begin of one .*min_side: 32 there, 40 here"):
        pack(folder, store, PackSettings(shard_bytes=60_000, min_side=40), append=True)
    assert pack(folder, store, SMALL, append=True).samples == 65
    assert len(set(sources(store))) == 65


@pytest.mark.parametrize("there", ["nothing", "a set without a plan"])
def test_what_cannot_be_appended_to_is_one_line(folder: Path, there: str) -> None:
    store = Store(f"file://{folder.parent}/dst")
    if there != "nothing":
        Manifest("layout", "contents", 1, (1,), (1,), {}, {}, tars=("file:///a.tar",)).save(store)
    with pytest.raises(UserError, match="make shards without APPEND=1" if there == "nothing" else "indexed where"):
        pack(folder, store, SMALL, append=True)


@pytest.mark.parametrize(("kind", "pattern"), [("folder", ""), ("folder", "/*/"), ("link", ""), ("memory", "")])
def test_a_set_that_lies_among_its_sources_is_none_of_them(folder: Path, kind: str, pattern: str) -> None:
    (folder.parent / "link").symlink_to(folder)
    if kind == "memory":
        src = f"memory://{folder}"
        place = Store(src)
        for path in folder.rglob("*.jpg"):
            place.put(path.relative_to(folder).as_posix(), path.read_bytes())
    else:
        src, place = str(folder.parent / "link" if kind == "link" else folder), Store(f"file://{folder}")
    store = place.at("z/set")
    place.put("z/setting.jpg", (photo := next(folder.rglob("*.jpg"))).read_bytes())
    expected = pack(src + pattern, store, SMALL).samples
    place.put("z/new.jpg", photo.read_bytes())
    report = pack(src + pattern, store, SMALL, append=True)
    assert report.refused == 0
    assert report.samples == expected + 1
    assert not [name for name in sources(store) if "z/set/" in name]


def test_a_set_in_the_very_folder_of_its_sources_is_refused(folder: Path) -> None:
    for dst in (f"file://{folder}", f"file://{folder}/."):
        with pytest.raises(UserError, match=r"the folder of the sources itself; .*DST=.*/src/shards"):
            pack(folder, Store(dst), SMALL)


def test_a_set_whose_parts_say_different_things_of_their_images_is_one_table(folder: Path) -> None:
    store = Store(f"file://{folder.parent}/dst")
    pack(folder, store, SMALL)
    more(folder, 5)
    new = sorted(str(path) for path in (folder / "new").rglob("*.jpg"))
    pq.write_table(pa.table({"path": new, "licence": ["CC0"] * 5}), folder.parent / "list.parquet")
    pack(folder.parent / "list.parquet", store, SMALL, append=True)
    assert ShardSet.open(store).table()["licence"].to_pylist() == 40 * [None] + 5 * ["CC0"]
