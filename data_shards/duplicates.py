"""From the hashes of all images, which of them could go and which an evaluation set has too: SQL, in a file of DuckDB.

An image has a rank in its set: the lower, the rather it is kept. Images of the same bytes stand together, then those
of an equal perceptual hash, then near hashes. An image goes only when it is itself within the distance of one that
stays, so a chain of ever other images does not collapse into one.

    images(of, rank, bytes, sha, hash)            given; of: 0 is the set itself, others are evaluation sets
    contents(sha, hash, rank, held_out)           of the same bytes: our best, and whether evaluation sets have it
    hashes(hash, rank, held_out)                  the same of an equal perceptual hash
    near(a, b)                                    hashes that differ a little
    taken(rank, kept, bits)                       of ours, whose hash stands for whose
    gone(rank, kept, kind, bits, bytes)           the outcome; kind is exact or near
    leaks(rank, of, theirs, bits)                 images of ours, and what they show of the set `of`

Near hashes are found without comparing each with each. Their bits are dealt into bands. Hashes that differ in at most
d bits differ in at most d bands, so they agree on all of some choice of the others: for each choice of bands that many
hashes fall into a bucket, and only within a bucket are bits counted. More bands make more choices, but smaller buckets;
the number of hashes decides. What would be quadratic still is a bucket that is crowded: there each hash is compared
with the best ones alone. Source: Manku et al., Detecting Near-Duplicates for Web Crawling (WWW 2007), section 3.
"""

import math
from itertools import combinations
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards import database
from data_shards.progress import Progress, quiet

PLAIN = 24  # a hash of fewer bits than that is of an image with so little in it that others look like it by chance
BITS = 64
_ROW = 20  # what it costs to put a hash into its bucket, in comparisons of two hashes
_SKEW = 4  # bits that are lost because photographs are alike: measured on tiles of 28 of them, with 7 bands


def connect(work: Path, memory_bytes: int) -> duckdb.DuckDBPyConnection:
    """A database in the folder `work`, with an empty table of images."""
    db = database.connect(work, memory_bytes)
    db.execute("CREATE TABLE images (of UTINYINT, rank UBIGINT, bytes UINTEGER, sha UUID, hash UBIGINT)")
    return db


def decide(db: duckdb.DuckDBPyConnection, work: Path, distance: int, crowd: int, progress: Progress = quiet) -> int:
    """Make the tables gone and leaks. Returns how many hashes were in a crowd."""
    db.execute(f"""
        CREATE TABLE contents AS
        SELECT sha, min(hash) AS hash, min(rank) FILTER (of = 0) AS rank, bool_or(of > 0) AS held_out
        FROM images GROUP BY sha;
        CREATE TABLE hashes AS
        SELECT hash, min(rank) AS rank, bool_or(held_out) AS held_out
        FROM contents WHERE bit_count(hash) >= {PLAIN} GROUP BY hash
    """)
    crowded = find_pairs(db, distance, crowd, progress)
    _take(db, work / "taken.parquet")
    db.execute("""
        CREATE TABLE gone AS
        SELECT i.rank, coalesce(t.kept, h.rank, c.rank) AS kept, if(i.rank = c.rank, 'near', 'exact') AS kind,
            if(i.rank = c.rank, coalesce(t.bits, 0), 0) AS bits, i.bytes
        FROM images i JOIN contents c USING (sha) LEFT JOIN hashes h ON h.hash = c.hash
        LEFT JOIN taken t ON t.rank = h.rank
        WHERE i.of = 0 AND i.rank != coalesce(t.kept, h.rank, c.rank);

        CREATE TABLE leaks AS
        SELECT i.rank, e.of, e.rank AS theirs, 0 AS bits
        FROM contents c JOIN images i USING (sha) JOIN images e USING (sha)
        WHERE c.held_out AND c.rank IS NOT NULL AND i.of = 0 AND e.of > 0
        UNION
        SELECT i.rank, e.of, e.rank, bit_count(xor(i.hash, e.hash))
        FROM (
            SELECT hash AS ours, hash AS theirs FROM hashes WHERE held_out AND rank IS NOT NULL
            UNION ALL SELECT a, b FROM near UNION ALL SELECT b, a FROM near
        ) JOIN images i ON i.hash = ours JOIN images e ON e.hash = theirs
        WHERE i.of = 0 AND e.of > 0
    """)
    return crowded


def _take(db: duckdb.DuckDBPyConnection, file: Path) -> None:
    """From the best rank on, a hash that is not taken takes those near it that are not taken either.

    Takes the memory of a byte for each hash that has a near one; `file` holds the outcome.
    """
    db.execute("""
        CREATE TABLE edges AS
        SELECT DISTINCT least(x.rank, y.rank) AS kept, greatest(x.rank, y.rank) AS rank, bit_count(xor(a, b)) AS bits
        FROM near JOIN hashes x ON x.hash = a JOIN hashes y ON y.hash = b
        WHERE x.rank IS NOT NULL AND y.rank IS NOT NULL;
        CREATE TABLE nodes AS
        SELECT rank, row_number() OVER (ORDER BY rank) - 1 AS node
        FROM (SELECT kept AS rank FROM edges UNION SELECT rank FROM edges)
    """)
    is_taken = bytearray(count_rows(db, "nodes"))
    edges = db.cursor().execute("""
        SELECT k.node, n.node, kept, edges.rank, bits
        FROM edges JOIN nodes k ON k.rank = kept JOIN nodes n ON n.rank = edges.rank ORDER BY kept, edges.rank
    """)
    schema = pa.schema([("rank", pa.uint64()), ("kept", pa.uint64()), ("bits", pa.uint8())])
    with pq.ParquetWriter(file, schema) as taken:
        while rows := edges.fetchmany(100_000):
            new = []
            for keeper, node, kept, rank, bits in rows:
                if not is_taken[keeper] and not is_taken[node]:
                    is_taken[node] = 1
                    new.append({"rank": rank, "kept": kept, "bits": bits})
            taken.write_table(pa.Table.from_pylist(new, schema=schema))
    db.execute("CREATE TABLE taken AS SELECT * FROM read_parquet(?)", [str(file)])


def masks(distance: int, count: int) -> list[int]:
    """The choices of bands for `count` hashes, each as the mask of its bits.

    Any two hashes that differ in at most `distance` bits agree on all bits of one of them.
    """
    bands = min(range(distance + 1, 2 * distance + 2), key=lambda bands: _cost(distance, bands, count))
    dealt = [sum(1 << bit for bit in range(band, BITS, bands)) for band in range(bands)]
    return [sum(chosen) for chosen in combinations(dealt, bands - distance)]


def _cost(distance: int, bands: int, count: int) -> float:
    kept = BITS * (bands - distance) // bands - _SKEW
    return math.comb(bands, distance) * (_ROW * count + count**2 * 0.5 ** (kept + 1))


def find_pairs(db: duckdb.DuckDBPyConnection, distance: int, crowd: int, progress: Progress = quiet) -> int:
    """Make the table near(a, b): hashes of 1 to `distance` bits apart, a below b; a pair may be there more than once.

    db: has a table hashes(hash, rank) of distinct hashes; pairs without any rank are not looked for. crowd: in buckets
    of more hashes each is compared with so many of the lowest rank. Returns how many hashes lay in such a bucket: pairs
    of them may be missing.
    """
    db.execute("CREATE TABLE near (a UBIGINT, b UBIGINT); CREATE TABLE crowded (hash UBIGINT)")
    choices = masks(distance, count_rows(db, "hashes")) if distance else []
    for done, mask in enumerate(choices, 1):
        db.execute(f"""
            CREATE OR REPLACE TEMP TABLE buckets AS
            SELECT hash & {mask} AS bucket, count(*) AS size FROM hashes GROUP BY bucket HAVING size > 1;
            CREATE OR REPLACE TEMP TABLE dealt AS
            SELECT hash, rank, bucket, size, row_number() OVER (PARTITION BY bucket ORDER BY rank, hash) AS place
            FROM hashes JOIN buckets ON bucket = hash & {mask};
            INSERT INTO near
            SELECT least(x.hash, y.hash), greatest(x.hash, y.hash)
            FROM dealt x JOIN dealt y ON x.bucket = y.bucket AND x.place < y.place
            WHERE x.place <= {crowd} AND bit_count(xor(x.hash, y.hash)) <= {distance}
            AND (x.rank IS NOT NULL OR y.rank IS NOT NULL);
            INSERT INTO crowded SELECT hash FROM dealt WHERE size > {crowd}
        """)
        progress("comparisons", done, len(choices))
    return count_rows(db, "(SELECT DISTINCT hash FROM crowded)")


def count_rows(db: duckdb.DuckDBPyConnection, rows: str) -> int:
    """Of a table, or of a query in brackets."""
    return int(db.execute(f"SELECT count(*) FROM {rows}").fetchall()[0][0])
