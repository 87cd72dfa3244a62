"""The page of a shard set, from real photographs: what is on it is what is in the set, and no more is read for it."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.errors import UserError
from data_shards.index import ShardSet, shard_path, table_path
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from pipeline.report import preview as module
from pipeline.report.histogram import histogram, ratio, shares, size
from pipeline.report.preview import gather, thumbnail
from pipeline.report.preview_page import write_preview
from tests.photos import photographs, write_tiles
from tests.pipeline.test_report import Node, Tree

EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """150 tiles of 72 pixels, whole photographs in other formats, and three files that are refused."""
    folder = write_tiles(tmp_path_factory.mktemp("sources"), 150)
    photograph = photographs()[0]
    photograph.save(folder / "whole.png")
    (folder / EVIL).parent.mkdir(parents=True)
    photograph.resize((300, 100)).save(folder / EVIL, "WEBP")
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.jpg").touch()
    photograph.resize((16, 16)).save(folder / "small.jpg")
    store = Store(f"file://{tmp_path_factory.mktemp('set')}")
    pack(folder, store, PackSettings(shard_bytes=100_000))
    return store


@pytest.fixture(scope="module")
def page(packed: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "folder" / "preview.html"
    write_preview(path, gather(packed))
    return path.read_text()


def test_the_page_asks_for_nothing_from_elsewhere_and_stays_small(page: str) -> None:
    nodes = list(Tree(page).root.below())
    assert any(node.attributes.get("content", "").startswith("default-src 'none'") for node in nodes)
    links = [node.attributes[name] for node in nodes for name in ("src", "href") if name in node.attributes]
    assert links
    assert all(link.startswith("data:image/webp;base64,") for link in links)
    assert not re.search(r"url\(|@import", page)
    assert len(page) < 3_000_000


def test_a_damaged_table_is_one_line(packed: Store, tmp_path: Path) -> None:
    shutil.copytree(packed.url.removeprefix("file://"), tmp_path / "set")
    store = Store(f"file://{tmp_path}/set")
    store.put(table_path(0), b"garbage")
    with pytest.raises(UserError, match=rf"{table_path(0)}: is damaged .*; make verify DST={store.url}"):
        gather(store)


def test_the_sheet_shows_images_of_the_set_in_their_own_proportions(page: str, packed: Store) -> None:
    table = ShardSet.open(packed).table().to_pydict()
    sizes = {name: (w, h) for name, w, h in zip(table["source"], table["width"], table["height"], strict=True)}
    shots = Tree(page).root.all("figure", "shot")
    assert len(shots) == module.SHOWN
    seen = set()
    for shot in shots:
        (name,) = (node.text for node in shot.all("b"))
        seen.add(name)
        width, height = sizes[name]
        with Image.open(io.BytesIO(picture(shot))) as image:
            assert image.width / image.height == pytest.approx(width / height, rel=0.03)
        assert f"{width:,} \u00d7 {height:,}" in shot.text
    assert len(seen) == module.SHOWN


def test_numbers_on_the_page_are_those_of_the_set(page: str) -> None:
    root = Tree(page).root
    values = {n.all("dt")[0].text: n.all("dd")[0].text for n in root.all("dl", "figures")[0].all("div")}
    assert values["Images"] == "152"
    assert values["Refused"] == "3"
    rows = {row.all("span", "kind")[0].text: row.all("span", "many")[0].text for row in root.all("li")}
    assert rows["jpg"].startswith("150 ")
    assert rows["png"].startswith("1 ")
    assert rows["empty"].startswith("1 ")
    assert "notes.txt" in page


def test_a_name_from_outside_stays_text(page: str) -> None:
    assert EVIL not in page


def test_every_image_is_in_one_bar_of_each_chart(page: str) -> None:
    charts = [one for one in Tree(page).root.all("figure", "chart") if one.all("svg")]
    assert len(charts) == 4
    for chart in charts:
        counts = [int(title.text.rpartition(": ")[2].replace(",", "")) for title in chart.all("title")]
        assert sum(counts) == 152


def test_removed_and_emptied_images_are_not_shown(packed: Store, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    for entry in packed.list():
        store.put(entry.path, packed.get(entry.path))
    first = {shown.key for shown in gather(store).shown}
    gone = sorted(first)[:50]
    store.put("removed/000001.txt", "".join(f"{key}\n" for key in gone).encode())
    found = gather(store)
    assert found.removed == 50
    keys = [one.key for one in found.shown]
    assert len(keys) == len(set(keys))  # what stands in for a removed one may be sampled itself
    assert found.shown
    assert not {shown.key for shown in found.shown} & set(gone)


def test_a_large_set_is_sampled_and_the_page_says_so(
    packed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TABLES", 2)
    monkeypatch.setattr(module, "SHOWN", 3)
    shards = len(ShardSet.open(packed).manifest.shard_samples)
    before = packed.counters.bytes_read
    found = gather(packed)
    write_preview(tmp_path / "page.html", found)
    read = packed.counters.bytes_read - before
    assert found.sampled.shards <= 5 < shards
    assert f"from {found.sampled.shards} of {shards} shards" in (tmp_path / "page.html").read_text()
    assert read < sum(packed.size(entry.path) for entry in packed.list("shards")) / 2


def test_a_damaged_image_is_said_to_be_one(packed: Store, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/set")
    for entry in packed.list():
        store.put(entry.path, packed.get(entry.path))
    store.put(shard_path(0), bytes(len(store.get(shard_path(0)))))
    write_preview(tmp_path / "page.html", gather(store))
    shots = Tree((tmp_path / "page.html").read_text()).root.all("figure", "shot")
    broken = [shot for shot in shots if shot.all("em")]
    assert broken
    assert all("cannot be shown: no image is at its place in the shard" in shot.text for shot in broken)
    assert len(broken) < len(shots)


def test_where_there_is_no_set_the_user_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard set"):
        gather(Store(f"file://{tmp_path}/none"))
    assert not (tmp_path / "page.html").exists()


def test_a_thumbnail_is_upright_whole_and_never_enlarged() -> None:
    lying = Image.new("RGB", (600, 200), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    out = io.BytesIO()
    lying.save(out, "JPEG", exif=exif)
    with Image.open(io.BytesIO(thumbnail(out.getvalue()))) as image:
        assert image.size == (round(module.BOX[1] / 3), module.BOX[1])
    small = io.BytesIO()
    lying.resize((30, 10)).save(small, "PNG")
    with Image.open(io.BytesIO(thumbnail(small.getvalue()))) as image:
        assert image.size == (30, 10)


@pytest.mark.parametrize("values", [[7.0], [1.0, 1e9], [100.0, 101.0, 102.0]])
def test_a_histogram_has_room_for_all_values_whatever_their_range(values: list[float]) -> None:
    drawn = Tree(histogram("x", np.array(values), str, "")).root
    assert sum(int(title.text.rpartition(": ")[2]) for title in drawn.all("title")) == len(values)
    places = [float(re.search(r"left:([\d.]+)%", tick.attributes["style"])[1]) for tick in drawn.all("span", "x")]  # type: ignore[index]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)


def test_bars_of_kinds_are_as_long_as_their_counts() -> None:
    drawn = Tree(shares("x", {"jpg": 30, "png": 15}, 60)).root
    assert [bar.attributes["style"] for bar in drawn.all("i")] == ["width:100.00%", "width:50.00%"]
    assert [node.text for node in drawn.all("small")] == ["50.0\u00a0%", "25.0\u00a0%"]


def test_numbers_are_written_as_people_write_them() -> None:
    assert [ratio(value) for value in (1.0, 1.5, 0.5, 1.62, 4 / 3)] == ["1:1", "3:2", "1:2", "1.62:1", "4:3"]
    assert [size(count) for count in (0, 999, 84_000, 2.5e9)] == ["0\u00a0B", "999\u00a0B", "84\u00a0kB", "2.5\u00a0GB"]


def picture(shot: Node) -> bytes:
    (image,) = shot.all("img")
    return base64.b64decode(image.attributes["src"].partition("base64,")[2])
