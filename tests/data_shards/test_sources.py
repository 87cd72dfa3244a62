"""What is listed of folders and lists, and how it is read: from this machine, from HTTP, from anything fsspec knows."""

import io
import os
import tarfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import UserError
from data_shards.files import store_of
from data_shards.images import Refused
from data_shards.sources import (
    Source,
    SourceOptions,
    list_sources,
    list_tars,
    metadata_schema,
    one_spelling,
    read_source,
)
from data_shards.store import Denied, StoreError, Truncated, Unavailable
from tests.photos import write_tiles

MB = 10**6


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles"), 12)


def names(src: object, **options: Any) -> list[str]:
    return [source.name for source in list_sources(str(src), SourceOptions(**options))]


def refused(source: Source, max_bytes: int = MB, **options: Any) -> str:
    with pytest.raises(Refused) as found:
        read_source(source, max_bytes, **options)
    return found.value.reason


def test_a_folder_is_listed_in_the_order_of_whole_names_with_subfolders_as_labels(tiles: Path) -> None:
    found = list(list_sources(str(tiles)))
    expected = sorted(path.relative_to(tiles).as_posix() for path in tiles.rglob("*.jpg"))
    assert [source.name for source in found] == expected
    assert [source.label for source in found] == [name.split("/")[0] for name in expected]
    assert [read_source(source, MB) for source in found] == [(tiles / name).read_bytes() for name in expected]


def test_a_folder_may_be_named_by_its_url(tiles: Path) -> None:
    assert names(f"file://{tiles}") == names(tiles)


def test_images_may_be_named_by_a_pattern_with_their_folders_as_labels(tiles: Path, tmp_path: Path) -> None:
    found = list(list_sources(f"{tiles}/**/*.jpg"))
    whole = {source.name: source for source in list_sources(str(tiles))}
    assert {source.name: (source.url, source.label) for source in found} == {
        name: (source.url, source.label) for name, source in whole.items()
    }
    assert [read_source(source, MB) for source in found] == [Path(source.url).read_bytes() for source in found]
    place = store_of(f"memory://{tmp_path.name}/photos")
    assert place is not None
    for name in ("cats/a.JPG", "cats/b.txt", "dogs/a.JPG"):
        place[0].put(f"{place[1]}/{name}", b"x")
    found = list(list_sources(f"memory://{tmp_path.name}/photos/*/*.JPG"))
    assert [(source.name, source.label) for source in found] == [("cats/a.JPG", "cats"), ("dogs/a.JPG", "dogs")]
    assert [read_source(source, MB) for source in found] == [b"x", b"x"]
    (tmp_path / "odd.jpg").mkdir()
    (tmp_path / "odd.jpg" / "x.jpg").write_bytes(b"x")
    assert names(tmp_path / "*.jpg") == ["odd.jpg/x.jpg"]


def test_lists_are_searched_at_any_depth(tmp_path: Path) -> None:
    for folder in ("", "a", "a/b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "list.txt").write_text(f"{folder or 'top'}.jpg\n")
    assert names(tmp_path / "**" / "list.txt") == ["a/b.jpg", "a.jpg", "top.jpg"]


def test_a_source_has_one_spelling_with_or_without_a_slash_at_its_end() -> None:
    assert one_spelling("s3://bucket/photos/") == one_spelling("s3://bucket/photos") == "s3://bucket/photos"
    assert one_spelling("/photos/") == one_spelling("file:///photos") == "/photos"


def test_the_order_is_that_of_names_as_bytes_even_where_a_folder_is_named_like_a_file(tmp_path: Path) -> None:
    for name in ("a/x", "a.jpg", "a!b", "a/b/c", "é", os.fsdecode(b"\xff.jpg"), "Z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    found = list(list_sources(str(tmp_path)))
    assert [source.name for source in found] == sorted((source.name for source in found), key=os.fsencode)
    assert len(found) == 7
    for source in found:
        assert read_source(source, MB) == os.fsencode(source.name)
    assert {source.name: source.label for source in found}["a/b/c"] == "a/b"


def test_links_to_folders_are_left_out_so_that_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"x")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a" / "x.jpg")
    assert names(tmp_path) == ["a/x.jpg", "link.jpg"]


def test_links_to_folders_are_counted_among_what_is_left_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "again").symlink_to(tmp_path)
        (tmp_path / "src" / name / "gone").symlink_to(tmp_path / "nowhere")
    ignored = Counter[str]()
    assert len(list(list_sources(str(tmp_path / "src"), ignored=ignored))) == 2
    assert ignored == {"links to folders": 2}


def test_a_folder_of_nothing_but_links_to_folders_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"there is no file in it \(left out: 1 links to folders\); make shards SRC="):
        list(list_sources(str(tmp_path / "src")))


def test_two_dots_lead_to_the_folder_above_and_behind_a_link_out_of_what_it_points_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here/work", "there/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder).with_name("photos").mkdir()
        (tmp_path / folder).with_name("photos").joinpath(folder.replace("/", "-")).write_bytes(b"x")
    (tmp_path / "here/link").symlink_to(tmp_path / "there/deep")
    monkeypatch.chdir(tmp_path / "here/work")
    assert [source.url for source in list_sources("../photos")] == [f"{tmp_path}/here/photos/here-work"]
    assert [source.url for source in list_sources("../link/../photos")] == [f"{tmp_path}/there/photos/there-deep"]


def test_listing_does_not_hold_what_it_has_listed(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"{folder:02d}").mkdir()
        for file in range(250):
            (tmp_path / f"{folder:02d}" / f"{file:04d}.jpg").touch()
    tracemalloc.start()
    count = sum(1 for _ in list_sources(str(tmp_path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 250 * 1000  # one folder's names; all of them would be four times that


def test_labels_can_be_left_out(tiles: Path) -> None:
    assert {source.label for source in list_sources(str(tiles), SourceOptions(label="none"))} == {None}


@pytest.mark.parametrize(
    ("make", "src", "words"),
    [
        (lambda at: None, "nowhere", "no such file, and no such folder; make shards SRC="),
        (lambda at: None, "x" * 300, "File name too long"),
        (lambda at: (at / "empty").mkdir(), "empty", "there is no file in it; make shards SRC="),
        (lambda at: None, "no*thing", "nothing has such a name"),
        (lambda at: None, "{0..3}.tar", "0.tar: no such file"),
        (lambda at: None, "{0..3.tar", r"{0..3.tar: its braces do not match; .*\{000..099\}"),
        (lambda at: (at / "x").write_bytes(b"\xff\xd8\xff\0"), "x", "neither a tar, a zip nor a list"),
        (lambda at: (at / "x").touch(), "x", "there is no file in it"),
        (lambda at: (at / "x").write_bytes(b"PAR1 and so on"), "x", "not a whole Parquet file"),
    ],
)
def test_what_cannot_be_listed_is_one_line(make: Any, src: str, words: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        names(tmp_path / src)
    assert "\n" not in str(error.value)


def test_a_text_list_has_paths_from_its_own_folder_and_urls(tiles: Path, tmp_path: Path) -> None:
    images = sorted(tiles.rglob("*.jpg"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.jpg").write_bytes(b"near")
    (tmp_path / "list.txt").write_bytes(
        b"here/a.jpg\n\n" + os.fsencode(images[0]) + b"\r\nfile://" + os.fsencode(images[1]) + b"\n\xff\n"
    )
    found = list(list_sources(str(tmp_path / "list.txt")))
    assert [source.name for source in found] == ["here/a.jpg", str(images[0]), f"file://{images[1]}", "\udcff"]
    assert [read_source(source, MB) for source in found[:3]] == [b"near"] + [path.read_bytes() for path in images[:2]]
    assert refused(found[3]) == "not a file"
    assert {source.label for source in found} == {None}
    by_folder = list(list_sources(str(tmp_path / "list.txt"), SourceOptions(label="folder")))
    assert [source.label for source in by_folder[:2]] == ["here", images[0].parent.name]


def test_the_mark_that_some_editors_put_before_a_list_is_no_part_of_its_first_name(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\ufeffa.jpg\nb.jpg\n\ufeffc.jpg\n", encoding="utf-8")
    assert names(tmp_path / "list.txt") == ["a.jpg", "b.jpg", "\ufeffc.jpg"]


def test_a_tar_that_two_patterns_name_is_indexed_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.tar").touch()
    assert list_tars(f"{tmp_path}/{{b,?}}.tar") == [f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"]


def test_an_archive_that_became_shorter_is_told_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 100)
    with pytest.raises(Truncated, match=r"a\.tar: ends before byte 120, .* give it a DST of its own"):
        read_source(Source(f"{tmp_path}/a.tar", 90, 30), MB)


def test_a_list_as_find_writes_it_names_objects_as_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"./here/a.jpg\n./b//c.jpg\n")
    found = list(list_sources(str(tmp_path / "list.txt")))
    assert [source.url for source in found] == [f"{tmp_path}/here/a.jpg", f"{tmp_path}/b//c.jpg"]
    assert [source.name for source in found] == ["./here/a.jpg", "./b//c.jpg"]


def parquet_list(folder: Path, tiles: Path, column: str = "path") -> tuple[Path, pa.Table]:
    images = sorted(map(str, tiles.rglob("*.jpg")))
    table = pa.table(
        {
            "class": [f"c{n % 3}" for n in range(len(images))],
            column: images,
            "caption": [None if n == 3 else f"photo {n}" for n in range(len(images))],
            "score": pa.array(range(len(images)), pa.float32()),
            "width": pa.array(range(len(images)), pa.int16()),
            "tags": [["a", "b"]] * len(images),
        }
    )
    pq.write_table(table, folder / "list.parquet")
    return folder / "list.parquet", table


def test_a_parquet_list_keeps_its_other_columns_with_their_types(tiles: Path, tmp_path: Path) -> None:
    path, table = parquet_list(tmp_path, tiles)
    options = SourceOptions(label="class")
    found = list(list_sources(str(path), options))
    assert [source.url for source in found] == table["path"].to_pylist()
    assert [source.label for source in found] == table["class"].to_pylist()
    schema = metadata_schema(str(path), options)
    assert schema is not None
    assert {field.name: field.type for field in schema} == {
        "caption": pa.string(),
        "score": pa.float32(),
        "source_width": pa.int16(),  # the shard's own column is called width
        "tags": pa.list_(pa.string()),
    }
    kept = pa.Table.from_pylist([source.columns for source in found], schema)
    assert kept.rename_columns({"source_width": "width"}).equals(table.select(["caption", "score", "width", "tags"]))


def test_the_column_of_paths_can_be_named_or_is_called_url(tiles: Path, tmp_path: Path) -> None:
    path, table = parquet_list(tmp_path, tiles, "url")
    assert names(path) == table["url"].to_pylist()
    path, table = parquet_list(tmp_path, tiles, "where it is")
    assert names(path, path_column="where it is") == table["where it is"].to_pylist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"path_column": "file"},
            "no column file; it has class, path, caption, .*path_column=NAME",
        ),
        ({"label": "kind"}, "no column kind; it has class, path, .*label=NAME"),
    ],
)
def test_a_wrong_column_is_told_with_those_there_are(
    options: dict[str, str], words: str, tiles: Path, tmp_path: Path
) -> None:
    path, _ = parquet_list(tmp_path, tiles)
    with pytest.raises(UserError, match=words):
        names(path, **options)


def test_a_list_without_a_column_of_paths_and_a_folder_without_columns_are_told(tiles: Path, tmp_path: Path) -> None:
    path, _ = parquet_list(tmp_path, tiles, "file")
    with pytest.raises(UserError, match="no column path or url; it has class, file"):
        names(path)
    with pytest.raises(UserError, match="has no columns, so no class"):
        names(tiles, label="class")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(UserError, match=r"list\.txt: has no columns, so no class; SET=label=folder, or none"):
        names(tmp_path / "list.txt", label="class")


def test_several_lists_are_taken_by_a_pattern(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"part-{number}.txt").write_text(f"{number}.jpg\n")
    assert names(tmp_path / "part-*.txt") == ["0.jpg", "1.jpg", "2.jpg"]
    assert names(tmp_path / "part-{2,0}.txt") == ["2.jpg", "0.jpg"]


@pytest.mark.parametrize("kind", [pa.duration("s"), pa.float16(), pa.list_(pa.float16())])
def test_a_column_of_a_type_that_cannot_be_sorted_is_told_with_what_to_do(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg"], "odd": pa.nulls(1, kind)}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=r"list\.parquet: column odd is of .*; cast it, or leave it out"):
        metadata_schema(str(tmp_path / "list.parquet"))
    fine = pa.struct({"duration": pa.int32(), "halffloat": pa.float32()})
    pq.write_table(pa.table({"path": ["a.jpg"], "odd": pa.nulls(1, fine)}), tmp_path / "list.parquet")
    assert metadata_schema(str(tmp_path / "list.parquet")) == pa.schema({"odd": fine})


@pytest.mark.parametrize(
    "odd",
    [
        pa.array([1], pa.timestamp("ns")),
        pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers()),
    ],
    ids=["a time below a microsecond", "text that is none"],
)
def test_a_value_that_cannot_be_read_is_told_with_what_to_do(odd: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg"], "odd": odd}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=r"list\.parquet: a value cannot be read .*; cast its column, or leave it out"):
        names(tmp_path / "list.parquet")


def test_two_columns_that_would_bear_one_name_are_told(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    for columns in (["path", "label", "source_label"], ["path", "score", "score"]):
        pq.write_table(pa.Table.from_arrays([pa.array(["a.jpg"])] * 3, columns), path)
        for ask in (names, lambda path: metadata_schema(str(path))):
            with pytest.raises(UserError, match=r"list\.parquet: two columns (source_label|score); rename one"):
                ask(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["a.jpg"])] * 3, ["path", "label", "source_label"]), path)
    assert names(path, label="label") == ["a.jpg"]


def test_a_column_of_bytes_is_one_of_paths_too(tiles: Path, tmp_path: Path) -> None:
    """As Spark and DuckDB may write text."""
    paths = sorted(map(str, tiles.rglob("*.jpg")))
    pq.write_table(pa.table({"path": pa.array([path.encode() for path in paths])}), tmp_path / "list.parquet")
    assert names(tmp_path / "list.parquet") == paths


def test_several_parquet_lists_must_agree_in_their_columns(tiles: Path, tmp_path: Path) -> None:
    _, table = parquet_list(tmp_path, tiles)
    pq.write_table(table, tmp_path / "part-0.parquet")
    pq.write_table(table.slice(0, 3), tmp_path / "part-1.parquet")
    schema = metadata_schema(f"{tmp_path}/part-*.parquet")
    assert schema is not None
    assert len(names(f"{tmp_path}/part-*.parquet")) == 15
    assert schema.field("score").type == pa.float32()
    pq.write_table(table.set_column(3, "score", table["score"].cast(pa.string())), tmp_path / "part-2.parquet")
    with pytest.raises(UserError, match=r"part-2.parquet: other columns, or of other types, than .*part-0.parquet"):
        metadata_schema(f"{tmp_path}/part-*.parquet")


def test_files_too_large_empty_missing_or_no_files_are_refused_without_being_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(b"." * 101)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    names = ("empty", "large", "none", "pipe", "dangling", "circle", "x" * 300, "nul\0")
    assert {name: refused(Source(str(tmp_path / name)), 100) for name in names} == {
        **dict.fromkeys(names, "not a file"),
        "empty": "empty",
        "large": "too many bytes",
        "x" * 300: "cannot be read",
    }


def test_a_disk_that_does_not_answer_stops_the_packing_unless_that_is_wanted() -> None:
    broken = Source("/proc/self/mem")  # whose first byte is an input/output error
    with pytest.raises(Unavailable, match="/proc/self/mem: Input/output error; pack again"):
        read_source(broken, MB)
    assert refused(broken, skip_unreachable=True) == "cannot be read"


def test_an_fsspec_url_of_any_kind_is_read(tiles: Path) -> None:
    data = next(tiles.rglob("*.jpg")).read_bytes()
    fsspec.filesystem("memory").pipe_file("/sources/a.jpg", data)
    assert read_source(Source("memory://sources/a.jpg"), MB) == data
    place = store_of("memory://sources/a.jpg")
    assert place
    asked = place[0].counters.requests
    assert read_source(Source("memory://sources/a.jpg", size=len(data)), MB) == data
    assert place[0].counters.requests == asked + 1  # its size was listed, and is not asked for
    assert read_source(Source(f"local://{next(tiles.rglob('*.jpg'))}"), MB) == data
    assert refused(Source("memory://sources/b.jpg")) == "cannot be read"
    with pytest.raises(StoreError, match=r"nosuch://a: .*nosuch"):
        read_source(Source("nosuch://a"), MB)


class Site(BaseHTTPRequestHandler):
    """Answers by the first part of a path: a status, or a way to misbehave. Counts what was asked."""

    asked: Counter[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        kind = self.path.split("/")[1]
        if kind == "endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            block = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            try:
                while True:
                    self.wfile.write(block)
            except OSError:
                self.close_connection = True
            return
        first = self.asked[self.path] == 1
        status = {"once503": 503 if first else 200}.get(kind) or (int(kind) if kind.isdigit() else 200)
        body = b"" if kind == "empty" else b"photograph"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:4] if kind == "oncecut" and first else body)
        if kind == "oncecut" and first:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("data_shards.files.ATTEMPTS", 2)
    Site.asked = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_file_behind_http_is_read_once_and_again_when_it_came_badly(site: str) -> None:
    for kind, asked in (("plain", 1), ("once503", 2), ("oncecut", 2)):
        assert read_source(Source(f"{site}/{kind}/é x.jpg"), MB) == b"photograph"
        assert sum(n for path, n in Site.asked.items() if path.startswith(f"/{kind}/")) == asked


def test_what_a_server_does_not_have_is_refused_at_once(site: str) -> None:
    assert [refused(Source(f"{site}/{status}/x")) for status in (404, 410, 400)] == ["cannot be read"] * 3
    assert refused(Source(f"{site}/empty/x")) == "empty"
    assert set(Site.asked.values()) == {1}


def test_a_file_without_end_is_refused_when_the_limit_is_reached(site: str) -> None:
    tracemalloc.start()
    assert refused(Source(f"{site}/endless/x"), 2 * MB) == "too many bytes"
    assert tracemalloc.get_traced_memory()[1] < 10 * MB
    tracemalloc.stop()


class Ranges(BaseHTTPRequestHandler):
    """Gives parts of one file; the `failing`-th GET is answered by 503, or its body is cut."""

    protocol_version = "HTTP/1.1"
    data: bytes
    failing: int
    cut: bool
    asked: int

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        type(self).asked += 1
        bad = self.asked == self.failing
        start, end = (int(place) for place in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.data[start : end + 1]
        self.send_response(503 if bad and not self.cut else 206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.data)}")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if bad else body)
        self.close_connection = bad

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


def listed_behind_http(name: str, data: bytes, failing: int, cut: bool) -> list[Source]:
    Ranges.data, Ranges.failing, Ranges.cut, Ranges.asked = data, failing, cut, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return [
            source._replace(url=name) if name.endswith(".tar") else source
            for source in list_sources(f"http://127.0.0.1:{server.server_port}/{name}")
        ]
    finally:
        server.shutdown()
        server.server_close()


def tar_of_noise() -> bytes:
    """20 MB, more than is read at once."""
    random, file = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n in range(20):
            member = tarfile.TarInfo(f"{n:02d}.jpg")
            member.size = 10**6
            tar.addfile(member, io.BytesIO(random.bytes(10**6)))
    return file.getvalue()


def list_of_urls() -> bytes:
    """Of 14 MB, which are not read at once either."""
    file, noise = io.BytesIO(), np.random.default_rng(0)
    urls = [f"https://a/{noise.bytes(3000).hex()}.jpg" for _ in range(2300)]
    pq.write_table(pa.table({"url": urls}), file, compression="none", use_dictionary=False)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("made", [tar_of_noise, list_of_urls])
def test_an_archive_or_list_behind_http_is_read_whole_whichever_answer_comes_badly(
    made: Callable[[], bytes], cut: bool
) -> None:
    name, data = "x.tar" if made is tar_of_noise else "x.parquet", made()
    whole = listed_behind_http(name, data, 0, cut)
    asked = Ranges.asked
    assert len(whole) >= 20
    assert asked > 1
    for failing in range(1, asked + 1):
        assert listed_behind_http(name, data, failing, cut) == whole, failing


def test_a_server_that_is_down_or_lets_nobody_in_stops_the_packing_unless_that_is_wanted(site: str) -> None:
    for url, error in (
        (f"{site}/500/x", Unavailable),
        (f"{site}/403/x", Denied),
        ("http://127.0.0.1:9/x", Unavailable),
    ):
        with pytest.raises(error, match=url):
            read_source(Source(url), MB)
        assert refused(Source(url), skip_unreachable=True) == "cannot be read"
