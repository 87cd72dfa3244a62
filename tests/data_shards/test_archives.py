"""Images in tars and zips: found by offsets, never unpacked; and WebDataset shards as a source."""

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import random
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_shards.archives import images, inflated
from data_shards.errors import UserError
from data_shards.images import Refused
from data_shards.pack import PackSettings, pack
from data_shards.sources import Source, SourceOptions, list_sources, read_source
from data_shards.store import Store
from tests.photos import write_tiles

MB = 10**6
LONG = "a folder with a long name/" * 8 + "é" * 60 + ".jpg"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_tiles(tmp_path_factory.mktemp("tiles"), 12)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def tar_of(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def listed(src: object, ignored: Counter[str] | None = None, **options: Any) -> list[Source]:
    return list(list_sources(str(src), SourceOptions(**options), ignored))


def read(src: object) -> dict[str, bytes]:
    return {source.name: read_source(source, MB) for source in listed(src)}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tars_images_are_read_by_their_offsets(form: int, photos: dict[str, bytes], tmp_path: Path) -> None:
    members = photos | ({} if form == tarfile.USTAR_FORMAT else {LONG: b"long"})
    path = tar_of(tmp_path / "a.tar", members, format=form)
    assert read(path) == members
    whole = path.read_bytes()
    for source in listed(path):
        assert (source.url, source.deflated) == (str(path), False)
        assert source.offset is not None
        assert whole[source.offset :][: source.size] == members[source.name]
    assert [source.label for source in listed(path)][:12] == [name.split("/")[0] for name in photos]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zips_images_are_read_stored_and_deflated(method: int, photos: dict[str, bytes], tmp_path: Path) -> None:
    members = photos | {"ü/é.jpg": b"text " * 100}
    assert read(zip_of(tmp_path / "a.zip", members, method)) == members


def test_a_zip_behind_another_file_is_read(photos: dict[str, bytes], tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", photos)
    path.write_bytes(b"PK\3\4 is not where it begins" + path.read_bytes())
    assert read(path) == photos


def test_archives_in_a_folder_and_by_patterns_are_opened_and_named(photos: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        tar_of(tmp_path / f"in/{number}.tar", photos)
    zip_of(tmp_path / "in/z.zip", photos)
    (tmp_path / "in/alone.jpg").write_bytes(b"alone")
    expected = {
        f"{archive}/{name}": data for archive in ("0.tar", "1.tar", "2.tar", "z.zip") for name, data in photos.items()
    }
    assert read(tmp_path / "in") == expected | {"alone.jpg": b"alone"}
    assert list(read(f"{tmp_path}/in/{{1..2}}.tar")) == [f"{n}.tar/{name}" for n in (1, 2) for name in photos]
    assert list(read(f"{tmp_path}/*/[02].tar")) == [f"in/{n}.tar/{name}" for n in (0, 2) for name in photos]
    assert read(tmp_path / "in/0.tar") == photos


@pytest.mark.parametrize(
    ("name", "compress", "program"),
    [
        ("a.tar.gz", gzip.compress, "gunzip a.tar.gz"),
        ("a.tgz", gzip.compress, "gunzip a.tgz"),
        ("a.tar", gzip.compress, "gunzip a.tar"),  # by what it is, not by its name
        ("a.tar.bz2", bz2.compress, "bunzip2"),
        ("a.tar.xz", lzma.compress, "unxz a.tar.xz"),
        ("a.tar.zst", lambda data: b"\x28\xb5\x2f\xfd" + data, "unzstd a.tar.zst"),
    ],
)
def test_a_compressed_tar_is_refused_with_what_to_type(
    name: str, compress: Any, program: str, photos: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(compress(tar_of(tmp_path / "plain", photos).read_bytes()))
    (tmp_path / "plain").unlink()
    for src in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=f"{name}: compressed, .*; {program}") as error:
            listed(src)
        assert "\n" not in str(error.value)


def test_a_tar_cut_off_anywhere_is_refused_with_file_and_byte(photos: dict[str, bytes], tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "a.tar", photos).read_bytes()
    images_end = len(whole.rstrip(b"\0"))
    choose = random.Random(0)
    for cut in [0, 1, 511, 512, 513, 600, images_end, *(choose.randrange(images_end) for _ in range(40))]:
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"a.tar: cut off at byte {cut}: .*fetch it again"):
            listed(tmp_path / "a.tar")


def test_a_tar_with_a_damaged_header_is_refused_with_the_byte(photos: dict[str, bytes], tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", photos)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[5].offset
    data[at : at + 100] = b"\xaa" * 100
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"a.tar: no tar header at byte {at}"):
        listed(path)


def test_a_zip_cut_off_encrypted_or_compressed_otherwise_is_refused(photos: dict[str, bytes], tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", photos)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.zip: cut off or damaged"):
            listed(path)
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(UserError, match="is encrypted; unzip it"):
        listed(path)
    with pytest.raises(UserError, match="compressed by method 12; unzip it"):
        listed(zip_of(path, photos, zipfile.ZIP_BZIP2))


def pax_of(record: bytes) -> bytes:
    """A tar of two images; a pax header with this record stands before the second."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    first, second = (tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT) for name in ("first.jpg", "a.jpg"))
    return first + header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + second + bytes(1024)


@pytest.mark.parametrize(
    "record",
    [
        b"14 size=-1536\n",  # back to the pax header
        b"13 size=-600\n",
        b"11 size=-1\n",
        b"31 size=9999999999999999999999\n",
        b"25 GNU.sparse.map=a,b,c\n",
    ],
)
def test_a_tar_whose_headers_lead_nowhere_is_refused_in_one_line(record: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pax_of(record))
    found = itertools.islice(list_sources(str(tmp_path / "a.tar")), 100)
    with pytest.raises(UserError, match=r"a\.tar: (no tar header|cut off) at byte \d+.*; fetch it again") as error:
        assert len(list(found)) < 100
    assert "\n" not in str(error.value)


def test_a_zip_for_a_later_program_is_refused(photos: dict[str, bytes], tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", photos)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 6] = 99
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip: cut off or damaged: .*version 9\.9"):
        listed(path)


def test_whatever_is_wrong_in_a_header_an_archive_is_listed_or_refused(tmp_path: Path) -> None:
    members = {f"{n}.jpg": b"text " * 100 for n in range(3)}
    wholes = [
        tar_of(tmp_path / "0", members, format=tarfile.PAX_FORMAT, pax_headers={"size": "500"}).read_bytes(),
        tar_of(tmp_path / "1", members, format=tarfile.GNU_FORMAT).read_bytes(),
        zip_of(tmp_path / "2", members).read_bytes(),
    ]
    rng = random.Random(1)
    for _ in range(300):
        for kind, whole in zip(("tar", "tar", "zip"), wholes, strict=True):
            data = bytearray(whole)
            block = 512 * rng.randrange(5)
            for at in rng.sample(range(block, block + 160) if kind == "tar" else range(len(data)), 3):
                data[at] = rng.choice((0, 48, 128, 255))
            if kind == "tar":
                data[block + 124] = rng.choice((48, 128, 255))  # the size: octal, a large number, one below zero
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
            with contextlib.suppress(UserError):
                for member in itertools.islice(images(io.BytesIO(data), "a", kind, Counter()), 100):
                    assert member.size >= 0
                    assert 0 <= member.offset <= len(data)


def test_a_deflated_bomb_is_refused_and_never_inflated_whole(tmp_path: Path) -> None:
    (source,) = listed(zip_of(tmp_path / "a.zip", {"a.jpg": b"\0" * 50 * MB}, zipfile.ZIP_DEFLATED))
    with pytest.raises(Refused, match="too many bytes"):
        read_source(source, MB)


def test_deflated_bytes_that_are_damaged_are_refused(photos: dict[str, bytes], tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"a.jpg": b"text " * 1000}, zipfile.ZIP_DEFLATED)
    (source,) = listed(path)
    data = bytearray(path.read_bytes())
    assert source.offset is not None
    data[source.offset : source.offset + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(Refused, match="damaged"):
        read_source(source, MB)


def test_deflated_bytes_that_end_too_soon_are_refused() -> None:
    deflated = zlib.compressobj(wbits=-15)
    data = deflated.compress(bytes(range(256)) * 8) + deflated.flush()
    assert inflated(data, MB) == bytes(range(256)) * 8
    with pytest.raises(Refused, match="end too soon"):
        inflated(data[:-3], MB)


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed: apt install tar")
def test_a_file_with_holes_which_a_tar_holds_in_parts_is_left_out(photos: dict[str, bytes], tmp_path: Path) -> None:
    one = next(iter(photos.values()))
    (tmp_path / "plain.jpg").write_bytes(one)
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.write(one)
        file.truncate(50_000_000)
    command = ["tar", "--sparse", "--format=gnu", "-C", str(tmp_path), "-cf", str(tmp_path / "a.tar")]
    subprocess.run([*command, "sparse.jpg", "plain.jpg"], check=True)
    assert (tmp_path / "a.tar").stat().st_size < 10_000_000
    ignored = Counter[str]()
    (found,) = listed(tmp_path / "a.tar", ignored)
    assert (found.name, read_source(found, MB)) == ("plain.jpg", one)
    assert ignored == {"not a plain file": 1}


def test_an_archive_that_became_shorter_since_it_was_listed_stops_the_packing(
    photos: dict[str, bytes], tmp_path: Path
) -> None:
    path = tar_of(tmp_path / "a.tar", photos)
    last = listed(path)[-1]
    path.write_bytes(path.read_bytes()[: (last.offset or 0) + 10])
    with pytest.raises(UserError, match=r"a\.tar: ends before byte"):
        read_source(last, MB)


def test_names_of_members_are_names_only(photos: dict[str, bytes], tmp_path: Path) -> None:
    one = next(iter(photos.values()))
    members = [("../../etc/passwd.jpg", one), ("/abs/olute.jpg", one), ("a\n\x1b[31m.jpg", one), ("a.jpg", one)]
    path = tar_of(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("folder.jpg"))
    ignored = Counter[str]()
    found = listed(path, ignored)
    assert {source.url for source in found} == {str(path)}
    assert [read_source(source, MB) for source in found[:4]] == [one] * 4
    assert ignored == {"not a plain file": 1}


def sample(key: str, data: bytes, **more: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", data), *((f"{key}.{name}", text.encode()) for name, text in more.items())]


def test_a_webdataset_shard_gives_its_images_with_labels_and_texts(photos: dict[str, bytes], tmp_path: Path) -> None:
    first, second, third = list(photos.values())[:3]
    members = [
        *sample("000", first, cls="7", json='{"a": 1}', npy="..."),
        *sample("dir.x/schlüssel", second, txt=" ein Hund\n"),
        ("002.seg.png", b"mask"),
        *reversed(sample("002", third, cls="3")),
    ]
    ignored = Counter[str]()
    path = tar_of(tmp_path / "a.tar", members)
    found = listed(path, ignored)
    assert [(source.name, source.label, source.columns) for source in found] == [
        ("000.jpg", "7", {"json": '{"a": 1}'}),
        ("dir.x/schlüssel.jpg", "dir.x", {"txt": "ein Hund"}),
        ("002.jpg", "3", None),
    ]
    assert [read_source(source, MB) for source in found] == [first, second, third]
    assert ignored == {"npy": 1, "png": 1}
    assert [source.label for source in listed(path, label="folder")] == [None, "dir.x", None]
    with pytest.raises(UserError, match=r"has no \.class; SET=label=folder"):
        listed(path, label="class")


def test_labels_and_captions_in_a_zip_are_read_deflated_too(photos: dict[str, bytes], tmp_path: Path) -> None:
    one = next(iter(photos.values()))
    said = {"0.cls": b"cat" * 10, "0.txt": b"two cats\n" * 3, "1.txt": b"x" * (2**20 + 1), "1.json": b"{}"}
    path = zip_of(tmp_path / "a.zip", dict(sorted(({"0.jpg": one, "1.jpg": one} | said).items())), zipfile.ZIP_DEFLATED)
    ignored = Counter[str]()
    first, second = listed(path, ignored)
    assert (first.label, first.columns) == ("cat" * 10, {"txt": ("two cats\n" * 3).strip()})
    assert second.columns == {"json": "{}"}
    assert ignored == {"txt": 1}


def test_a_text_in_a_zip_that_is_damaged_or_swells_is_left_out(photos: dict[str, bytes], tmp_path: Path) -> None:
    one = next(iter(photos.values()))
    members = {"0.jpg": one, "0.txt": b"two cats " * 30, "1.jpg": one, "1.txt": bytes(2**27)}
    path = zip_of(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("0.txt").header_offset + 30 + len("0.txt")
    data = bytearray(path.read_bytes())
    data[at : at + 4] = b"\xff" * 4
    path.write_bytes(data)
    ignored = Counter[str]()
    tracemalloc.start()
    assert [source.columns for source in listed(path, ignored)] == [None, None]
    assert tracemalloc.get_traced_memory()[1] < 20 * MB
    tracemalloc.stop()
    assert ignored == {"txt": 2}


def test_images_that_are_told_apart_by_what_follows_the_first_dot_are_all_taken(
    photos: dict[str, bytes], tmp_path: Path
) -> None:
    one = next(iter(photos.values()))
    names = ["IMG_1.jpg", "IMG_1.edited.jpg", "2020.01.02.jpg", "2020.jpg"]
    assert list(read(tar_of(tmp_path / "a.tar", dict.fromkeys(names, one)))) == names


def test_members_that_are_no_images_are_counted_in_the_report_of_a_packing(
    photos: dict[str, bytes], tmp_path: Path
) -> None:
    members = [(f"{n}.{end}", data) for n, data in enumerate(photos.values()) for end in ("jpg", "npy", "\x1b[31m\n")]
    dst = Store(f"memory://{tmp_path.name}")
    report = pack(tar_of(tmp_path / "a.tar", members), dst, PackSettings())
    assert (report.samples, report.ignored) == (12, {"npy": 12, "other": 12})
    assert "none refused; left out besides the images: 12 npy, 12 other; " in report.summary()
    again = pack(tmp_path / "a.tar", dst, PackSettings())
    assert (again.already_there, again.ignored) == (True, report.ignored)


def test_duplicate_keys_get_names_of_their_own_and_images_of_one_key_are_all_taken(
    photos: dict[str, bytes], tmp_path: Path
) -> None:
    first, second = list(photos.values())[:2]
    path = tar_of(tmp_path / "a.tar", [("a.jpg", first), ("b.jpg", first), ("a.jpg", second), ("a.png", first)])
    found = listed(path)
    assert [source.name for source in found[:2]] == ["a.jpg", "b.jpg"]
    assert found[2].name == f"a.jpg#{found[2].offset}"
    assert found[3].name == "a.png"
    assert [read_source(source, MB) for source in found] == [first, first, second, first]


def test_photographs_with_dots_or_without_any_extension_are_taken(photos: dict[str, bytes], tmp_path: Path) -> None:
    one = next(iter(photos.values()))
    members = {"IMG.1.jpg": one, "IMG.2.jpg": one, "n0144_3": one, "README": b"text", "x.json": b"{}"}
    ignored = Counter[str]()
    found = listed(tar_of(tmp_path / "a.tar", members), ignored)
    assert [source.name for source in found] == ["IMG.1.jpg", "IMG.2.jpg", "n0144_3", "README"]
    assert ignored == {"json": 1}


@pytest.mark.slow
def test_ten_thousand_tiny_images_and_a_giant_one_are_listed_and_only_the_giant_is_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(f"{n:05d}.png", b"x" * (n % 3 + 1)) for n in range(10_000)])
    giant = tarfile.TarInfo("giant.jpg")
    giant.size = 300 * MB
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    with path.open("r+b") as file:  # most of it a hole
        file.seek(end)
        file.write(giant.tobuf())
        file.truncate(end + 512 + giant.size + 10_240)
    *tiny, last = [*list_sources(str(path))]
    assert [(source.name, source.size) for source in tiny] == [(f"{n:05d}.png", n % 3 + 1) for n in range(10_000)]
    assert read_source(tiny[4321], MB) == b"x" * (4321 % 3 + 1)
    with pytest.raises(Refused, match="too many bytes"):
        read_source(last, MB)


def test_a_shard_without_samples_among_others_is_nothing_special(photos: dict[str, bytes], tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", {})
    tar_of(tmp_path / "1.tar", photos)
    assert len(listed(tmp_path)) == 12
    with pytest.raises(UserError, match="there is no file in it"):
        listed(tmp_path / "0.tar")


def test_a_list_in_an_archives_place_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("these are words\n" * 100)
    with pytest.raises(UserError, match=r"a\.tar: no tar header at byte 0"):
        listed(tmp_path)
