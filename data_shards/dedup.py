"""Which images of a shard set are there more than once, and which are in an evaluation set: lists, nothing is changed.

Copies of the same bytes are found by sha256, images that look alike by perceptual hash. Of images that look alike the
one of most pixels stays, of these the one whose key comes first. The shards' tables are read into a file of DuckDB
beside the lists and joined there, in as much memory as is given.

    OUT/duplicates.txt    keys of the images that could go: make remove DST=... LIST=OUT/duplicates.txt
    OUT/groups.parquet    the same with the key that stays, exact or near, bits apart, bytes
    OUT/leaks.txt         key, url of the evaluation set, the nearest key there, bits apart; between tabs
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from data_shards.duplicates import PLAIN, connect, count_rows, decide
from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.progress import Progress, quiet
from data_shards.removed import read_removed, removal
from data_shards.section import Section
from data_shards.store import Store

DUPLICATES, GROUPS, LEAKS = "duplicates.txt", "groups.parquet", "leaks.txt"
_COLUMNS = ["size", "width", "height", "sha256", "phash"]
_ID_BITS = 36  # the lower bits of a rank are the sample's id; above them are the pixels that it lacks to 2 ** 28


class DedupSettings(Section):
    """What counts as near, and what it may cost to find."""

    affects_results: ClassVar[bool] = False

    distance: int = Field(default=4, ge=0, le=8)  # bits of 64; docs/BENCHMARKS.md says what each finds
    crowd: PositiveInt = 200  # hashes in a bucket; in larger ones each is compared with the best so many alone
    memory_bytes: int = Field(default=4 * 2**30, ge=128 * 2**20)  # DuckDB's


@dataclass(frozen=True)
class DedupReport:
    """What could go, and what leaked.

    exact: images of the same bytes as one that stays; near: those that look like one, by the bits that they differ in;
    groups: how many stay for these. plain: images that show too little for their hash to count, unhashed: images that
    were packed without one; only exact copies of both are found. crowded: hashes of which near ones may be missing.
    leaks: images that are in evaluation sets too; leaked: how many of theirs.
    """

    url: str
    folder: str
    images: int
    groups: int
    exact: int
    near: dict[int, int]
    bytes_saved: int
    plain: int
    unhashed: int
    crowded: int
    leaks: int
    leaked: int
    seconds: float

    def lines(self) -> list[str]:
        """For a terminal."""
        duplicates = self.exact + sum(self.near.values())
        near = ", ".join(f"{count:,} at {bits} bits" for bits, count in self.near.items()) or "none"
        notes = {
            "show too little for a perceptual hash: only copies of the same bytes are found": self.plain,
            "were packed without a perceptual hash: only copies of the same bytes are found": self.unhashed,
            "have a hash that too many resemble: some near ones may be missing": self.crowded,
            f"are in the evaluation sets too, where they are {self.leaked:,}: {self.folder}/{LEAKS}": self.leaks,
        }
        return [
            f"{self.url}: {duplicates:,} of {self.images:,} images could go, {self.bytes_saved / 1e6:,.1f} MB, "
            f"for {self.groups:,} that stay; {self.seconds:.1f} s",
            f"same bytes: {self.exact:,}; near: {near}",
            *(f"{count:,} {note}" for note, count in notes.items() if count),
            f"lists in {self.folder}",
            *([f"next: {removal(self.url, f'{self.folder}/{DUPLICATES}')}"] if duplicates else []),
            *([f"next: {removal(self.url, f'{self.folder}/{LEAKS}')}"] if self.leaks else []),
        ]


def dedup(
    store: Store,
    folder: Path,
    settings: DedupSettings | None = None,
    *,
    against: Sequence[Store] = (),
    progress: Progress = quiet,
) -> DedupReport:
    """Find duplicates in a set, and its images that the sets `against` have too; write the lists into `folder`.

    Needs disk in `folder` while it works (docs/BENCHMARKS.md). Raises UserError when one of the sets is not there, or
    was packed without perceptual hashes.
    """
    start = time.monotonic()
    settings = settings or DedupSettings()
    urls = [store.url, *(one.url for one in against)]
    if store.url in urls[1:]:
        raise UserError(f"{store.url}: would be compared with itself; AGAINST= takes other sets")
    sets = [ShardSet.open(one) for one in (store, *against)]
    work = folder / ".working"
    shutil.rmtree(work, ignore_errors=True)  # of one that was killed
    try:
        work.mkdir(parents=True)
        with connect(work, settings.memory_bytes) as db:
            db.execute("CREATE TABLE shards (of UTINYINT, url VARCHAR, number UINTEGER, first UBIGINT)")
            for of, shards in enumerate(sets):
                _load(db, of, shards, progress)
            crowded = decide(db, work, settings.distance, settings.crowd, progress)
            _write_lists(db, work)
            found = _tally(db)
        for name in (DUPLICATES, GROUPS, LEAKS):
            (work / name).replace(folder / name)
    except (OSError, duckdb.IOException, duckdb.OutOfMemoryException) as error:
        what = str(error).partition("\n")[0]
        raise UserError(f"{folder}: {what}; OUT= takes a folder on another disk, --memory-gib more memory") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return DedupReport(store.url, str(folder), crowded=crowded, seconds=time.monotonic() - start, **found)


def _load(db: duckdb.DuckDBPyConnection, of: int, shards: ShardSet, progress: Progress) -> None:
    """The images of a set that are not removed, and the first id of each shard; of a sha256 the first 128 bits."""
    removed = read_removed(shards).ids
    cuts = np.searchsorted(removed, shards.starts)  # all at once: numbers of another type copy `removed` each time
    for number, rows in enumerate(shards.tables(_COLUMNS)):
        if "phash" not in rows.column_names:
            url = shards.store.url
            raise UserError(f"{url}: was packed without perceptual hashes; make shards SRC=... DST=... packs it anew")
        first = int(shards.starts[number])
        if rows.num_rows:
            ids = np.arange(first, first + rows.num_rows)
            gone = removed[cuts[number] : cuts[number + 1]]
            db.register("rows", rows.append_column("id", pa.array(ids)).filter(pa.array(~np.isin(ids, gone))))
            db.execute("INSERT INTO shards VALUES (?, ?, ?, ?)", [of, shards.store.url, number, first])
            # a transaction each: a longer one would keep all rows in memory
            db.execute(f"""
                INSERT INTO images
                SELECT {of}, (((1::UBIGINT << 28) - 1 - width::UBIGINT * height) << {_ID_BITS}) | id::UBIGINT,
                    size, sha256[:32]::UUID, phash
                FROM rows WHERE sha256 IS NOT NULL
            """)
        progress(f"tables of {shards.store.url}", number + 1, len(shards.manifest.shard_samples))


def _write_lists(db: duckdb.DuckDBPyConnection, work: Path) -> None:
    """Sorted by key, one line an image; of its leaks the nearest."""
    db.execute(f"""
        CREATE MACRO id(rank) AS rank & ((1::UBIGINT << {_ID_BITS}) - 1);
        CREATE MACRO key(number, rank, first) AS printf('%06d-%06d', number, id(rank) - first);
        CREATE VIEW ours AS SELECT number, first FROM shards WHERE of = 0
    """)
    groups = """
        SELECT key(k.number, kept, k.first) AS kept, key(s.number, rank, s.first) AS key, kind, bits, bytes
        FROM gone ASOF JOIN ours s ON id(rank) >= s.first ASOF JOIN ours k ON id(kept) >= k.first
        ORDER BY key"""
    leaks = """
        SELECT key(s.number, rank, s.first) AS key, t.url, key(t.number, theirs, t.first), bits
        FROM (SELECT rank, unnest(min({'bits': bits, 'of': of, 'theirs': theirs})) FROM leaks GROUP BY rank) nearest
        ASOF JOIN ours s ON id(rank) >= s.first
        ASOF JOIN shards t ON nearest.of = t.of AND id(theirs) >= t.first
        ORDER BY key"""
    db.execute(f"COPY ({groups}) TO '{_quoted(work / GROUPS)}' (FORMAT parquet, COMPRESSION zstd)")
    keys = f"SELECT key FROM read_parquet('{_quoted(work / GROUPS)}') ORDER BY key"
    db.execute(f"COPY ({keys}) TO '{_quoted(work / DUPLICATES)}' (FORMAT csv, HEADER false)")
    db.execute(f"COPY ({leaks}) TO '{_quoted(work / LEAKS)}' (FORMAT csv, HEADER false, DELIMITER '\t')")


def _tally(db: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    near = db.execute("SELECT bits, count(*) FROM gone WHERE kind = 'near' GROUP BY bits ORDER BY bits").fetchall()
    return {
        "images": count_rows(db, "images WHERE of = 0"),
        "groups": count_rows(db, "(SELECT DISTINCT kept FROM gone)"),
        "exact": count_rows(db, "gone WHERE kind = 'exact'"),
        "near": dict(near),
        "bytes_saved": int(db.execute("SELECT coalesce(sum(bytes), 0) FROM gone").fetchall()[0][0]),
        "plain": count_rows(db, f"images WHERE of = 0 AND bit_count(hash) < {PLAIN}"),
        "unhashed": count_rows(db, "images WHERE of = 0 AND hash IS NULL"),
        "leaks": count_rows(db, "(SELECT DISTINCT rank FROM leaks)"),
        "leaked": count_rows(db, "(SELECT DISTINCT of, theirs FROM leaks)"),
    }


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
