"""Which of many 64-bit hashes differ in a few bits, without comparing each with each: joins in DuckDB, out of core.

The bits are dealt into bands. Hashes that differ in at most d bits differ in at most d bands, so they agree on all of
some choice of the others: for each choice of bands that many hashes fall into a bucket, and only within a bucket are
bits counted. More bands make more choices, but smaller buckets; the number of hashes decides. What would be quadratic
still is a bucket that is crowded: there each hash is compared with the best ones alone. Source: Manku et al., Detecting
Near-Duplicates for Web Crawling (WWW 2007), section 3.
"""

import math
from itertools import combinations

import duckdb

from data_shards.progress import Progress, quiet

BITS = 64
_ROW = 20  # what it costs to put a hash into its bucket, in comparisons of two hashes
_SKEW = 4  # bits that are lost because photographs are alike: measured on tiles of 28 of them, with 7 bands


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
