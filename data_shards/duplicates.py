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
"""

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.near import count_rows, find_pairs
from data_shards.progress import Progress, quiet

PLAIN = 24  # a hash of fewer bits than that is of an image with so little in it that others look like it by chance


def connect(work: Path, memory_bytes: int, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """A database in the folder `work`, with an empty table of images. threads: by default one a core."""
    db = duckdb.connect(str(work / "images.duckdb"))
    db.execute(f"SET memory_limit = '{memory_bytes // 2**20}MiB'")
    db.execute("SET temp_directory = ?", [str(work / "spilled")])
    db.execute("SET preserve_insertion_order = false")  # else rows are kept in memory until all are there
    db.execute("SET autoinstall_known_extensions = false")  # nodes may have no internet
    if threads:
        db.execute(f"SET threads = {threads}")
    db.execute("CREATE TABLE images (of UTINYINT, rank UBIGINT, bytes UINTEGER, sha UUID, hash UBIGINT)")
    return db


def decide(db: duckdb.DuckDBPyConnection, work: Path, distance: int, crowd: int, progress: Progress = quiet) -> int:
    """Make the tables gone and leaks. Returns how many hashes were in a crowd (data_shards.near)."""
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
