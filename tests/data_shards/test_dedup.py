"""Duplicates in a shard set: found by their bytes and by what they show, listed, and kept once."""

import hashlib
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dedup import apart, changes, distances
from data_shards.dedup import DedupReport, DedupSettings, dedup
from data_shards.duplicates import find_pairs, masks
from data_shards.errors import UserError
from data_shards.index import Manifest, sample_key, table_path
from data_shards.store import Store
from jobs.cli import main
from tests.photos import photographs

MASK = 2**64 - 1
hashes = st.integers(0, MASK)
names = itertools.count()


class Row(NamedTuple):
    """An image of a synthetic set; two of the same `content` have the same bytes."""

    phash: int | None
    content: int | None
    width: int = 100
    height: int = 100
    size: int = 1000


def stored(shards: Sequence[Sequence[Row]], url: str | None = None, columns: Sequence[str] = ()) -> Store:
    """A set of these rows; columns: those that its tables have, by default all."""
    store = Store(url or f"memory://dedup-{next(names)}")
    for number, rows in enumerate(shards):
        table = pa.table(
            {
                "key": [sample_key(number, place) for place in range(len(rows))],
                "size": pa.array([row.size for row in rows], pa.uint32()),
                "width": pa.array([row.width for row in rows], pa.uint32()),
                "height": pa.array([row.height for row in rows], pa.uint32()),
                "sha256": pa.array([sha256(row.content) for row in rows], pa.string()),
                "phash": pa.array([row.phash for row in rows], pa.uint64()),
            }
        )
        out = io.BytesIO()
        pq.write_table(table.select(list(columns)) if columns else table, out)
        store.put(table_path(number), out.getvalue())
    counts = tuple(map(len, shards))
    Manifest("layout", "contents", sum(counts), counts, counts, {}, {}).save(store)
    return store


def sha256(content: int | None) -> str | None:
    return None if content is None else hashlib.sha256(str(content).encode()).hexdigest()


def flipped(phash: int, *bits: int) -> int:
    return phash ^ sum(1 << bit for bit in bits)


def photo_hashes(count: int, seed: int = 0) -> list[int]:
    """Hashes of 32 bits, as photographs have."""
    rng = np.random.default_rng(seed)
    return [sum(1 << int(bit) for bit in rng.permutation(64)[:32]) for _ in range(count)]


def listed(report: DedupReport, name: str = "duplicates.txt") -> list[str]:
    return (Path(report.folder) / name).read_text().splitlines()


def groups(report: DedupReport) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(Path(report.folder) / "groups.parquet").to_pylist()
    return rows


def pairs(db: duckdb.DuckDBPyConnection, given: set[int], distance: int, crowd: int = 10**6) -> set[tuple[int, int]]:
    db.execute("DROP TABLE IF EXISTS near; DROP TABLE IF EXISTS crowded; DROP TABLE IF EXISTS hashes")
    table = pa.table({"hash": pa.array(sorted(given), pa.uint64()), "rank": pa.array(range(len(given)), pa.uint64())})
    db.register("given", table)
    db.execute("CREATE TABLE hashes AS SELECT * FROM given")
    find_pairs(db, distance, crowd)
    return set(db.execute("SELECT a, b FROM near").fetchall())


@settings(max_examples=200)
@given(
    hashes,
    st.integers(0, 8).flatmap(lambda d: st.tuples(st.just(d), st.sets(st.integers(0, 63), max_size=d))),
    st.data(),
)
def test_two_hashes_within_the_distance_agree_on_the_bits_of_some_choice(
    one: int, drawn: tuple[int, set[int]], data: st.DataObject
) -> None:
    distance, bits = drawn
    count = data.draw(st.sampled_from([2, 10**4, 10**6, 10**7, 10**9]))
    other = flipped(one, *bits)
    assert any(one & mask == other & mask for mask in masks(distance, count))


@pytest.mark.parametrize("distance", range(1, 9))
def test_more_hashes_get_smaller_buckets_so_that_the_work_is_not_quadratic(distance: int) -> None:
    for count in (10**6, 10**7, 10**8, 10**9):
        chosen = masks(distance, count)
        fewest = min(mask.bit_count() for mask in chosen)
        assert count / 2 ** (fewest - 4) <= DedupSettings().crowd  # in a bucket; 4 bits less than of hashes by chance
    if distance == 4:
        assert len(masks(distance, 10**9)) <= 70


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.integers(0, 8),
    st.lists(st.tuples(hashes, st.lists(st.lists(st.integers(0, 63), max_size=9), max_size=4)), max_size=12),
)
def test_the_pairs_are_those_that_comparing_each_with_each_finds(
    distance: int, clusters: list[tuple[int, list[list[int]]]]
) -> None:
    with duckdb.connect() as db:
        given = {flipped(one, *set(bits)) for one, copies in clusters for bits in [[], *copies]}
        each = itertools.combinations(sorted(given), 2)
        assert pairs(db, given, distance) == {(a, b) for a, b in each if (a ^ b).bit_count() <= distance}


def test_in_a_crowded_bucket_each_is_compared_with_the_best_alone_and_that_is_told(tmp_path: Path) -> None:
    base = photo_hashes(1)[0] & ~0x3FFF  # the least of them, so it has the lowest rank
    bits = [(), *itertools.combinations(range(14), 1), *itertools.combinations(range(14), 2)]
    crowd = {flipped(base, *chosen) for chosen in bits}
    with duckdb.connect() as db:
        found, every = pairs(db, crowd, 2, crowd=20), pairs(db, crowd, 2)
    assert {(base, other) for other in crowd - {base}} <= found < every
    loners = photo_hashes(20, seed=1)
    planted = [Row(flipped(one, 3, 60), 10_000 + i) for i, one in enumerate(loners)]
    rows = [Row(one, 1000 + i) for i, one in enumerate(sorted(crowd))]
    store = stored([rows, [*(Row(one, i) for i, one in enumerate(loners)), *planted]])
    report = dedup(store, tmp_path, DedupSettings(distance=2, crowd=20))
    assert report.crowded == len(crowd)
    assert sum(report.near.values()) == len(crowd) - 1 + len(planted)
    assert any(f"{len(crowd):,} have a hash that too many resemble" in line for line in report.lines())


def test_the_one_of_most_pixels_stays_and_among_equals_the_first_key(tmp_path: Path) -> None:
    one, two = photo_hashes(2)
    small, large = Row(one, 1, 100, 80, 900), Row(flipped(one, 0, 1), 2, 200, 160, 4000)
    store = stored(
        [[small, Row(two, 3, size=30)], [], [large, Row(two, 3, size=30), Row(flipped(two, 9, 8), 4, size=40)]]
    )
    found = dedup(store, tmp_path)
    assert listed(found) == ["000000-000000", "000002-000001", "000002-000002"]
    assert [(row["kept"], row["key"], row["kind"], row["bits"], row["bytes"]) for row in groups(found)] == [
        ("000002-000000", "000000-000000", "near", 2, 900),
        ("000000-000001", "000002-000001", "exact", 0, 30),
        ("000000-000001", "000002-000002", "near", 2, 40),
    ]
    assert (found.images, found.groups, found.exact, found.near, found.bytes_saved) == (5, 2, 1, {2: 2}, 970)


def test_a_chain_of_ever_other_images_does_not_collapse_into_one(tmp_path: Path) -> None:
    chain = [photo_hashes(1)[0]]
    for link in range(9):
        chain.append(flipped(chain[-1], *range(4 * link, 4 * link + 4)))
    found = dedup(stored([[Row(one, i) for i, one in enumerate(chain)]]), tmp_path)
    assert [(row["kept"], row["key"]) for row in groups(found)] == [
        (sample_key(0, place - 1), sample_key(0, place)) for place in range(1, 10, 2)
    ]


def reference(shards: Sequence[Sequence[Row]], distance: int) -> dict[str, str]:
    """What goes, and for what, by comparing each with each."""
    images = [(-r.width * r.height, sample_key(n, p), r) for n, rows in enumerate(shards) for p, r in enumerate(rows)]
    stands: dict[int, str] = {}
    kept: list[tuple[str, int]] = []
    gone = {}
    for _, key, row in sorted(image for image in images if image[2].content is not None):
        keeper = stands.get(row.content or 0)
        if keeper is None and row.phash is not None and row.phash.bit_count() >= 24:
            near = (name for name, other in kept if (row.phash ^ other).bit_count() <= distance)
            keeper = next(near, None)
            if keeper is None:
                kept.append((key, row.phash))
        if keeper:
            gone[key] = keeper
        stands.setdefault(row.content or 0, keeper or key)
    return gone


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_what_goes_is_what_comparing_each_with_each_says(
    tmp_path_factory: pytest.TempPathFactory, seed: int, distance: int
) -> None:
    rng = np.random.default_rng(seed)
    bases, known, shards = photo_hashes(6, seed), {}, []
    for count in (*rng.integers(0, 30, 3).tolist(), 1):
        rows = []
        for _ in range(count):
            content = int(rng.integers(0, 40))
            noise = rng.permutation(64)[: rng.integers(0, 5)].tolist()
            side = int(rng.integers(1, 4)) * 50
            known.setdefault(content, Row(flipped(bases[rng.integers(0, 6)], *noise), content, side))
            rows.append(known[content] if rng.random() > 0.1 else Row(None, None))
        shards.append(rows)
    found = dedup(stored(shards), tmp_path_factory.mktemp("lists"), DedupSettings(distance=distance))
    expected = reference(shards, distance)
    assert {row["key"]: row["kept"] for row in groups(found)} == expected
    assert listed(found) == sorted(expected)


def test_images_that_show_nothing_and_images_without_a_hash_are_compared_by_their_bytes_alone(tmp_path: Path) -> None:
    blank = [Row(1 << 63, 1), Row(1 << 63, 2), Row(1 << 63, 1)]
    unhashed = [Row(None, 3), Row(None, 4), Row(None, 4), Row(None, 4)]
    found = dedup(stored([blank, unhashed]), tmp_path)
    assert listed(found) == ["000000-000002", "000001-000002", "000001-000003"]
    assert (found.exact, found.near, found.plain, found.unhashed) == (3, {}, 3, 4)
    assert "only copies of the same bytes" in "\n".join(found.lines())


def test_what_is_removed_already_neither_stays_nor_goes_and_an_empty_place_is_no_image(tmp_path: Path) -> None:
    one, two = photo_hashes(2)
    best, middle, small = (Row(flipped(one, *range(bits)), bits, side) for bits, side in ((0, 300), (2, 200), (4, 100)))
    compacted = Row(None, None)
    store = stored([[Row(two, 9), compacted], [small, best, middle, Row(two, 9), compacted]])
    store.put("removed/000001.txt", b"000000-000000\n000001-000001\n")
    found = dedup(store, tmp_path)
    assert [(row["kept"], row["key"]) for row in groups(found)] == [("000001-000002", "000001-000000")]
    assert found.images == 3


def test_a_leak_is_told_with_both_keys_and_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = photo_hashes(30)
    ours = stored([[Row(one, i) for i, one in enumerate(many[:20])], [Row(1, 900)]], f"file://{tmp_path}/ours")
    first = stored([[Row(flipped(many[3], 5, 6), 100), Row(many[3], 101), Row(many[25], 102)]], f"file://{tmp_path}/a")
    second = stored(
        [[], [Row(many[26], 103)], [Row(2, 900), Row(flipped(many[7], *range(5)), 104)]], f"file://{tmp_path}/b"
    )
    out = tmp_path / "lists"
    code = main(["dedup", ours.url, "--against", first.url, second.url, "--out", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 1
    assert (found["leaks"], found["leaked"], found["exact"], found["near"]) == (2, 3, 0, {})
    assert (out / "leaks.txt").read_text().splitlines() == [
        f"000000-000003\t{first.url}\t000000-000001\t0",
        f"000001-000000\t{second.url}\t000002-000000\t0",
    ]
    assert main(["dedup", ours.url, "--against", first.url, "--out", str(out), "--distance", "0"]) == 1
    assert "1 are in the evaluation sets too, where they are 1" in capsys.readouterr().out


def test_no_leak_is_exit_code_0_and_the_last_line_says_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = photo_hashes(2)
    ours = stored([[Row(one, 1), Row(one, 1)]], f"file://{tmp_path}/ours")
    other = stored([[Row(two, 2)]], f"file://{tmp_path}/other")
    assert main(["dedup", ours.url, "--against", other.url, "--out", str(tmp_path / "lists")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"next: make remove DST={ours.url} LIST={tmp_path}/lists/duplicates.txt")


def refused(call: Any) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_report_counts_what_could_go_and_says_nothing_of_what_there_is_not() -> None:
    nothing = DedupReport("s3://set", "out", 1000, 0, 0, {}, 0, 0, 0, 0, 0, 0, 1.25)
    assert nothing.lines() == [
        "s3://set: 0 of 1,000 images could go, 0.0 MB, for 0 that stay; 1.2 s",
        "same bytes: 0; near: none",
        "lists in out",
    ]
    some = replace(nothing, groups=4, exact=3, near={1: 2, 4: 1}, bytes_saved=1_500_000, unhashed=7)
    assert some.lines() == [
        "s3://set: 6 of 1,000 images could go, 1.5 MB, for 4 that stay; 1.2 s",
        "same bytes: 3; near: 2 at 1 bits, 1 at 4 bits",
        "7 were packed without a perceptual hash: only copies of the same bytes are found",
        "lists in out",
        "next: make remove DST=s3://set LIST=out/duplicates.txt",
    ]
    leaks = replace(nothing, url="file:///a set", leaks=2, leaked=2).lines()
    assert leaks[-1] == "next: make remove DST='file:///a set' LIST=out/leaks.txt"


def test_what_a_user_can_mend_is_one_line_and_no_list_is_written(tmp_path: Path) -> None:
    whole, lists = stored([[Row(5, 1)]]), tmp_path / "lists"
    missing = Store(f"memory://none-{next(names)}")
    assert "no shard set" in refused(lambda: dedup(missing, lists))
    assert f"{missing.url}: no MANIFEST.json" in refused(lambda: dedup(whole, lists, against=[missing]))
    old = stored([[Row(5, 1)]], columns=["key", "size", "width", "height", "sha256"])
    assert f"{old.url}: was packed without perceptual hashes; make shards" in refused(lambda: dedup(old, lists))
    assert "compared with itself" in refused(lambda: dedup(whole, lists, against=[Store(whole.url)]))
    whole.put(table_path(0), b"PAR1 no more")
    assert f"make verify DST={whole.url}" in refused(lambda: dedup(whole, lists))
    whole.delete([table_path(0)])
    assert "000000.parquet" in refused(lambda: dedup(whole, lists))
    assert not lists.exists() or not list(lists.iterdir())
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(lambda: dedup(old, tmp_path / "file"))


def test_a_bad_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dedup", stored([[Row(5, 1)]]).url, "--distance", "12"]) == 2
    assert capsys.readouterr().err == "farseer: dedup: distance: found 12; valid is less than or equal to 8\n"


def test_what_a_killed_one_left_is_cleared_away_and_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".working").mkdir()
    (tmp_path / ".working" / "work.duckdb").write_bytes(b"torn")
    (tmp_path / "duplicates.txt").write_text("000009-000009\n")
    found = dedup(stored([[Row(photo_hashes(1)[0], 1)] * 2]), tmp_path)
    assert listed(found) == ["000000-000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["duplicates.txt", "groups.parquet", "leaks.txt"]


@pytest.mark.slow
def test_the_tables_of_one_shard_after_another_do_not_stay_in_memory(tmp_path: Path) -> None:
    store, count = stored([[Row(one, i) for i, one in enumerate(photo_hashes(5000))]]), 40
    for number in range(1, count):
        store.put(table_path(number), store.get(table_path(0)))
    Manifest("layout", "contents", 5000 * count, (5000,) * count, (1,) * count, {}, {}).save(store, create_only=False)
    held: list[int] = []

    def look(what: str, done: int, total: int) -> None:
        held.append(pa.total_allocated_bytes())

    found = dedup(store, tmp_path, DedupSettings(distance=0), progress=look)
    assert (found.images, found.exact, found.groups) == (5000 * count, 5000 * (count - 1), 5000)
    assert held[count - 1] - held[0] < 5 * 5000 * 100  # a few tables' columns


@pytest.mark.slow
def test_a_million_images_stay_within_the_memory_that_is_given_and_nothing_planted_is_missed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.dedup", "one", "--images", "1e6", "--memory-mib", "192"]
    found = json.loads(subprocess.check_output([*command, "--folder", str(tmp_path)], stderr=subprocess.DEVNULL))
    assert found["planted"] > 140_000
    assert found["found"] == found["right"] == found["planted"]
    assert found["peak_mib"] < 192 + 250  # DuckDB's, and that of Python with its libraries


@pytest.mark.slow
def test_on_photographs_most_copies_are_found_and_no_other_is_taken_for_one() -> None:
    cuts = [
        photo.crop((x, y, x + 150, y + 150))
        for photo in photographs()
        for x, y in itertools.product(range(0, photo.width - 149, 150), range(0, photo.height - 149, 150))
    ]
    found = {name: (distances(cuts, change) <= DedupSettings().distance).mean() for name, change in changes().items()}
    encoded = [share for name, share in found.items() if "quality" in name]
    resized = [share for name, share in found.items() if "resized" in name]
    assert min(encoded) >= 0.8
    assert np.mean(encoded) >= 0.9
    assert min(resized) >= 0.95
    assert found["cropped by 2% a side"] >= 0.5
    assert apart(cuts).min() >= 12
