"""Sources in a real S3 store: folders, tars, zips, WebDataset shards, lists, and what is said when it is not there."""

import hashlib
import io
import tarfile
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards import files
from data_shards.errors import UserError
from data_shards.images import Refused
from data_shards.index import ShardSet
from data_shards.pack import PackSettings, pack
from data_shards.sources import Source, SourceOptions, list_sources, read_source
from data_shards.store import Denied, Store, Unavailable
from tests.photos import write_tiles

MB = 10**6


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_tiles(tmp_path_factory.mktemp("tiles"), 12)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


@pytest.fixture
def raw(s3: Any) -> Store:
    return Store(s3.bucket("shards"))


def read(src: str, **options: Any) -> dict[str, bytes]:
    return {source.name: read_source(source, MB) for source in list_sources(src, SourceOptions(**options))}


def tar_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(members: dict[str, bytes], method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_a_folder_in_a_bucket_is_a_source_with_sizes_and_labels(raw: Store, photos: dict[str, bytes]) -> None:
    for name, data in photos.items():
        raw.put(f"in/{name}", data)
    raw.put("in/ünïcode/é x.jpg", b"text")
    raw.put("beside/other.jpg", b"not in it")
    found = list(list_sources(f"{raw.url}/in/"))
    assert {source.name: read_source(source, MB) for source in found} == photos | {"ünïcode/é x.jpg": b"text"}
    assert [source.name for source in found] == sorted([*photos, "ünïcode/é x.jpg"])
    assert found[0].label == found[0].name.split("/")[0]
    assert [source.size for source in found] == [len(read_source(source, MB)) for source in found]


@pytest.mark.slow
def test_a_folder_of_more_objects_than_a_page_is_listed_whole_in_order_and_a_page_at_a_time(raw: Store) -> None:
    names = sorted(f"{n % 7}/{n:05d}" for n in range(2100))
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: raw.put(f"in/{name}", b"x"), names))
    before, walk = raw.counters.requests, raw.walk("in")
    assert next(walk).path == f"in/{names[0]}"
    assert raw.counters.requests == before + 1
    assert [source.name for source in list_sources(f"{raw.url}/in")] == names


def test_tars_and_zips_in_a_bucket_are_read_by_ranges(raw: Store, photos: dict[str, bytes]) -> None:
    raw.put("in/a.tar", tar_of(photos))
    raw.put("in/b.tar", tar_of(photos))
    raw.put("in/c.zip", zip_of(photos, zipfile.ZIP_STORED))
    raw.put("in/d.zip", zip_of(photos, zipfile.ZIP_DEFLATED))
    every = {f"{name}/{photo}": data for name in ("a.tar", "b.tar", "c.zip", "d.zip") for photo, data in photos.items()}
    assert read(f"{raw.url}/in") == every
    assert read(f"{raw.url}/in/a.tar") == photos
    assert list(read(f"{raw.url}/in/{{a,b}}.tar")) == [f"{tar}.tar/{photo}" for tar in "ab" for photo in photos]
    assert list(read(f"{raw.url}/*/[cd].zip")) == [f"in/{archive}.zip/{photo}" for archive in "cd" for photo in photos]


def test_a_tar_in_a_bucket_is_walked_through_by_few_requests(
    raw: Store, photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_AHEAD", 16_384)
    members = {f"{n}/{name}": data for n in range(10) for name, data in photos.items()}
    whole = tar_of(members)
    raw.put("a.tar", whole)
    store = files.store_of(raw.url)
    assert store is not None
    before = store[0].counters.requests
    assert len(list(list_sources(f"{raw.url}/a.tar"))) == 120
    assert store[0].counters.requests - before < len(whole) / 16_384 + 10


def test_webdataset_shards_in_a_bucket_give_labels_and_texts(raw: Store, photos: dict[str, bytes]) -> None:
    names = list(photos)
    for shard in range(3):
        members: dict[str, bytes] = {}
        for place in range(4):
            key = f"{shard:03d}{place:03d}"
            members |= {f"{key}.jpg": photos[names[shard * 4 + place]], f"{key}.cls": b"%d" % place, f"{key}.npy": b"?"}
        raw.put(f"{shard:03d}.tar", tar_of(members))
    ignored = Counter[str]()
    found = list(list_sources(f"{raw.url}/{{000..002}}.tar", ignored=ignored))
    assert [source.label for source in found] == ["0", "1", "2", "3"] * 3
    assert [read_source(source, MB) for source in found] == list(photos.values())
    assert ignored == {"npy": 12}


def test_lists_in_a_bucket_name_objects_beside_them_and_anywhere(
    raw: Store, photos: dict[str, bytes], tmp_path: Path
) -> None:
    data, more = list(photos.values())[:2]
    raw.put("lists/near.jpg", data)
    raw.put("far.jpg", more)
    raw.put("lists/list.txt", f"near.jpg\n{raw.url}/far.jpg\n".encode())
    assert read(f"{raw.url}/lists/list.txt") == {"near.jpg": data, f"{raw.url}/far.jpg": more}
    pq.write_table(pa.table({"url": [f"{raw.url}/far.jpg"], "kind": ["x"]}), tmp_path / "list.parquet")
    raw.upload(tmp_path / "list.parquet", "lists/list.parquet")
    (source,) = list_sources(f"{raw.url}/lists/list.parquet", SourceOptions(label="kind"))
    assert (read_source(source, MB), source.label, source.columns) == (more, "x", None)


def test_objects_missing_empty_or_too_large_are_refused(raw: Store) -> None:
    raw.put("empty.jpg", b"")
    raw.put("large.jpg", b"." * 101)
    reasons = []
    for name in ("none", "empty", "large"):
        with pytest.raises(Refused) as refused:
            read_source(Source(f"{raw.url}/{name}.jpg"), 100)
        reasons.append(refused.value.reason)
    assert reasons == ["cannot be read", "empty", "too many bytes"]


def test_a_truncated_tar_in_a_bucket_is_named_with_the_byte(raw: Store, photos: dict[str, bytes]) -> None:
    raw.put("a.tar", tar_of(photos)[:5000])
    with pytest.raises(UserError, match=r"s3://.*/a\.tar: cut off at byte 5000"):
        read(f"{raw.url}/a.tar")


@pytest.mark.slow
def test_a_folder_a_tar_a_zip_and_a_list_in_a_bucket_pack_to_the_same_images(
    s3: Any, raw: Store, photos: dict[str, bytes], tmp_path: Path
) -> None:
    for name, data in photos.items():
        raw.put(f"folder/{name}", data)
    raw.put("a.tar", tar_of(photos))
    raw.put("a.zip", zip_of(photos, zipfile.ZIP_DEFLATED))
    kinds = [name.split("/")[0] for name in photos]
    listed = {"url": [f"{raw.url}/folder/{name}" for name in photos], "kind": kinds, "score": list(range(12))}
    pq.write_table(pa.table(listed), tmp_path / "list.parquet")
    raw.upload(tmp_path / "list.parquet", "list.parquet")
    found = []
    for number, src in enumerate(("folder", "a.tar", "a.zip", "list.parquet")):
        dst, options = Store(f"file://{tmp_path}/{number}"), SourceOptions(label="kind" if "list" in src else "auto")
        assert pack(f"{raw.url}/{src}", dst, PackSettings(), options=options, workers=1).samples == 12
        rows = ShardSet.open(dst).table().to_pylist()
        found.append({(row["sha256"], row["label"], row["source"].removeprefix(f"{raw.url}/folder/")) for row in rows})
    assert found[0] == {(hashlib.sha256(data).hexdigest(), name.split("/")[0], name) for name, data in photos.items()}
    assert found[1:] == found[:1] * 3
    assert {row["score"] for row in rows} == set(range(12))


@pytest.mark.parametrize(
    ("src", "words"),
    [
        ("s3://photos/x", "s3://photos: no such bucket"),
        ("s3://shards/nothing-is-here", "there is no file in it; make shards SRC="),
        ("s3://shards/nothing-is-here/*.tar", "nothing has such a name"),
        ("s3://shards/nothing-is-here/{0..1}.tar", "there is no file in it"),
    ],
)
def test_what_is_not_in_the_store_is_one_line(s3: Any, src: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        list(list_sources(src))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_store_that_is_down_or_denies_stops_the_packing_and_refuses_no_image(
    raw: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.put("a.jpg", b"x")
    for store, error in (
        (_with(monkeypatch, 1.0, AWS_ENDPOINT_URL="http://127.0.0.1:9"), Unavailable),
        (_with(monkeypatch, 60.0, AWS_ACCESS_KEY_ID="wrong", AWS_SECRET_ACCESS_KEY="wrong"), Denied),
    ):
        monkeypatch.setattr(files, "_store", lambda root, store=store: store)
        with pytest.raises(error):
            read_source(Source(f"{raw.url}/a.jpg"), MB)
        with pytest.raises(Refused, match="cannot be read"):
            read_source(Source(f"{raw.url}/a.jpg"), MB, skip_unreachable=True)


def _with(monkeypatch: pytest.MonkeyPatch, retry_seconds: float, **environment: str) -> Store:
    """A store that connects with these variables."""
    with monkeypatch.context() as changed:
        for name, value in environment.items():
            changed.setenv(name, value)
        store = Store("s3://shards", retry_seconds=retry_seconds)
        with pytest.raises(UserError):
            store.check()
    return store
