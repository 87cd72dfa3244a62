"""WebDataset tars indexed where they lie: what is taken, what is left out, what is refused as a whole."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards.adopt import index_shards
from data_shards.errors import UserError
from data_shards.images import Rules
from data_shards.index import MANIFEST, RECORD, ShardSet, index_path
from data_shards.pack import INDEXED, PackSettings, pack
from data_shards.store import Store
from data_shards.verify import verify
from tests.data_shards.test_archives import tar_of
from tests.photos import write_tiles


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = write_tiles(tmp_path_factory.mktemp("tiles"), 12)
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]


def gif() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "GIF")
    return out.getvalue()


@pytest.fixture
def tars(tmp_path: Path, photos: list[bytes]) -> Path:
    """A shard of ordinary samples, an empty one, and one with everything that may go wrong with a sample."""
    (tmp_path / "tars").mkdir()
    tar_of(tmp_path / "tars/0.tar", [(f"{n}.jpg", data) for n, data in enumerate(photos[:4])])
    tar_of(tmp_path / "tars/1.tar", {})
    members = [
        ("a/ключ.jpg", photos[4]),
        ("a/ключ.cls", b"7"),
        ("a/ключ.npz", b"..."),
        ("cut.jpg", photos[5][:500]),
        ("moving.gif", gif()),
        ("empty.jpg", b""),
        ("twice.jpg", photos[6]),
        ("text.json", b"{}"),
        ("twice.jpg", photos[7]),
    ]
    tar_of(tmp_path / "tars/2.tar", members)
    (tmp_path / "tars/notes.txt").write_text("not a tar")
    return tmp_path / "tars"


def test_samples_are_found_in_any_shape_of_tar_and_what_the_rules_refuse_is_left_out_and_listed(
    tars: Path, tmp_path: Path, photos: list[bytes]
) -> None:
    dst = Store(f"file://{tmp_path}/dst")
    report, _ = index_shards(str(tars), dst, Rules())
    assert (report.samples, report.shards, report.reasons) == (7, 3, {"damaged": 1, "empty": 1, "unusual coding": 1})
    assert {one.source for one in report.examples} == {"2.tar/cut.jpg", "2.tar/moving.gif", "2.tar/empty.jpg"}
    shards = ShardSet.open(dst)
    assert shards.manifest.shard_samples == (4, 0, 3)
    assert shards.manifest.tars == tuple(f"file://{tars}/{n}.tar" for n in range(3))
    rows = shards.table().to_pylist()
    assert [row["source"].split("#")[0] for row in rows[4:]] == [
        "2.tar/a/ключ.jpg",
        "2.tar/twice.jpg",
        "2.tar/twice.jpg",
    ]
    assert len({row["source"] for row in rows}) == 7
    assert [row["label"] for row in rows] == [None] * 4 + ["7", None, None]
    assert [row["key"] for row in rows[3:5]] == ["000000-000003", "000002-000000"]
    for sample, row in enumerate(rows):
        store, path = shards.tar(shards.locate(sample)[0])
        assert store.get(path, row["offset"], row["offset"] + row["size"]) == (photos[:5] + photos[6:8])[sample]
    assert verify(dst, full=True).faults == ()


def test_the_same_tars_give_the_same_set_wherever_they_lie_and_another_order_another_layout(
    tars: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").mkdir()
    for path in tars.glob("*.tar"):
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    layouts = [
        index_shards(str(src), Store(f"file://{tmp_path}/dst{n}"), Rules())[0].layout_id
        for n, src in enumerate((tars, tmp_path / "moved", f"{tars}/{{2,1,0}}.tar"))
    ]
    assert layouts[0] == layouts[1] != layouts[2]


def test_a_place_that_holds_something_else_is_refused_and_left_as_it_is(tars: Path, tmp_path: Path) -> None:
    dst = Store(f"file://{tmp_path}/dst")
    index_shards(str(tars), dst, Rules())
    before = {entry.path: dst.get(entry.path) for entry in dst.list()}
    with pytest.raises(UserError, match="index of other tars, or by other rules; give a DST of its own"):
        index_shards(str(tars), dst, Rules(min_side=64))
    with pytest.raises(UserError, match="index of other tars"):
        index_shards(str(tars / "0.tar"), dst, Rules())
    assert {entry.path: dst.get(entry.path) for entry in dst.list()} == before
    packed = Store(f"file://{tmp_path}/packed")
    pack(write_tiles(tmp_path / "tiles", 5), packed, PackSettings())
    with pytest.raises(UserError, match="holds another shard set"):
        index_shards(str(tars), packed, Rules())


def test_of_two_sets_that_were_begun_in_one_place_the_second_is_refused_and_the_first_goes_on(
    tars: Path, tmp_path: Path
) -> None:
    """Also where the first was killed before its manifest."""
    dst = Store(f"file://{tmp_path}/dst")
    first, _ = index_shards(str(tars), dst, Rules())
    dst.delete([MANIFEST])
    with pytest.raises(UserError, match=r"holds the begin of an index of tars \(IN_PLACE=1\); give a DST of its own"):
        pack(write_tiles(tmp_path / "tiles", 5), dst, PackSettings())
    again, _ = index_shards(str(tars), dst, Rules())
    assert (again.already_there, again.samples, again.layout_id) == (False, first.samples, first.layout_id)


def test_an_index_is_never_written_over_that_of_packed_shards(tars: Path, tmp_path: Path) -> None:
    """A set that was packed, before such was refused, where an index had been begun."""
    dst, begun = Store(f"file://{tmp_path}/dst"), Store(f"file://{tmp_path}/begun")
    index_shards(str(tars), begun, Rules())
    pack(write_tiles(tmp_path / "tiles", 5), dst, PackSettings())
    dst.put(INDEXED, begun.get(INDEXED))
    before = {entry.path: dst.get(entry.path) for entry in dst.list()}
    with pytest.raises(UserError, match="holds another shard set"):
        index_shards(str(tars), dst, Rules())
    assert {entry.path: dst.get(entry.path) for entry in dst.list()} == before


def test_labels_do_not_tell_how_an_archive_was_made(tmp_path: Path, photos: list[bytes]) -> None:
    """`tar -C photos .` has ./cat/1.jpg where `tar cat` has cat/1.jpg."""
    names, found = ("cat/1.jpg", "dog/2.jpg", "top.jpg"), list[list[str | None]]()
    for n, start in enumerate(("", "./")):
        tar_of(tmp_path / f"{n}.tar", {start + name: data for name, data in zip(names, photos, strict=False)})
        packed, indexed = Store(f"file://{tmp_path}/packed{n}"), Store(f"file://{tmp_path}/indexed{n}")
        pack(str(tmp_path / f"{n}.tar"), packed, PackSettings())
        index_shards(str(tmp_path / f"{n}.tar"), indexed, Rules())
        for dst in (packed, indexed):
            labels = [label for table in ShardSet.open(dst).tables(["label"]) for label in table["label"].to_pylist()]
            found.append(sorted(labels, key=str))
    assert found == [[None, "cat", "dog"]] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tars: (tars / "2.tar").write_bytes((tars / "2.tar").read_bytes()[:3000]),
            r"2\.tar: cut off at byte 3000",
        ),
        (lambda tars: (tars / "0.tar").write_bytes(gzip.compress(b"x")), r"0\.tar: compressed.*gunzip"),
        (lambda tars: [path.unlink() for path in tars.glob("*.tar")], r"no \.tar is there"),
        (lambda tars: [tar_of(path, {}) for path in tars.glob("*.tar")], "no image to index"),
    ],
)
def test_tars_that_cannot_be_indexed_are_one_line_and_no_set(
    change: Any, words: str, tars: Path, tmp_path: Path
) -> None:
    change(tars)
    dst = Store(f"file://{tmp_path}/dst")
    with pytest.raises(UserError, match=words) as error:
        index_shards(str(tars), dst, Rules())
    assert "\n" not in str(error.value)
    assert not dst.exists("MANIFEST.json")


def test_what_would_change_images_or_lies_on_the_web_is_refused(tars: Path, tmp_path: Path) -> None:
    dst = Store(f"file://{tmp_path}/dst")
    for rules in (Rules(longest_side=100), Rules(drop_exif=True)):
        with pytest.raises(UserError, match="cannot be changed: leave out"):
            index_shards(str(tars), dst, rules)
    with pytest.raises(UserError, match="https://a: not the url of a store"):
        index_shards("https://a/b.tar", dst, Rules())
    assert not (tmp_path / "dst").exists()


def test_how_well_sorted_tars_are_is_told(tmp_path: Path, photos: list[bytes]) -> None:
    members: list[tuple[str, bytes]] = []
    for n, data in enumerate(photos[:8]):
        members += [(f"{n}.jpg", data), (f"{n}.cls", b"%d" % (n // 4))]
    tar_of(tmp_path / "a.tar", members)
    _, about = index_shards(str(tmp_path / "a.tar"), Store(f"file://{tmp_path}/dst"), Rules())
    assert "(86% of neighbours have the same label)" in about  # 6 of 7
    assert "\n" not in about


def test_records_and_rows_agree(tars: Path, tmp_path: Path) -> None:
    dst = Store(f"file://{tmp_path}/dst")
    index_shards(str(tars), dst, Rules())
    records = np.frombuffer(dst.get(index_path(2)), dtype=RECORD)
    with tarfile.open(tars / "2.tar") as tar:
        offsets = [m.offset_data for m in tar if m.name.endswith(".jpg") and m.name not in ("cut.jpg", "empty.jpg")]
    assert records["offset"].tolist() == offsets
    assert json.loads(dst.get("MANIFEST.json"))["settings"]["in_place"] is True
