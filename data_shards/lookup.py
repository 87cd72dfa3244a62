"""Samples of a shard set by what people know of them: keys, names of sources, sha256 of what is stored.

Keys say where a sample lies; for the others the shards' tables are read once, one after another, and joined with what
is wanted by DuckDB. Memory does not grow with the set.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_shards.database import connected, fed
from data_shards.index import ShardSet
from data_shards.progress import Progress, quiet

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SHOWN = 20  # of the lines that name nothing
_KEY = re.compile(r"(\d{6,})-(\d{6,})")
_ROWS = pa.schema({"id": pa.int64(), "key": pa.string(), "sha256": pa.string(), "source": pa.string()})


@dataclass(frozen=True)
class Found:
    """ids: of the samples, sorted, each once. lines: how many named something to find; unknown: how many in vain."""

    ids: NDArray[np.int64]
    lines: int
    unknown: int
    examples: tuple[str, ...]  # of the unknown


def find(shards: ShardSet, lines: Iterable[str], progress: Progress = quiet) -> Found:
    """The samples that any of the lines names; each line is a key, a source or a sha256 in hex.

    Raises UserError when the disk is full.
    """
    keys: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    count = 0
    with connected("looking for the images") as (db, _):
        db.execute("CREATE TABLE wanted (line VARCHAR)")
        named = filter(None, (line.strip() for line in lines))
        while some := list(islice(named, 100_000)):
            by_key, others = _by_key(shards, some)
            keys.append(np.array(by_key, np.int64))
            _want(db, others)
            count += len(some)
        ids, unknown, examples = _scan(db, shards, progress)
    return Found(np.unique(np.concatenate([*keys, ids])), count, unknown, examples)


def _by_key(shards: ShardSet, lines: list[str]) -> tuple[list[int], list[str]]:
    """Ids of the lines that are keys of this set, and the other lines. Shards that lie elsewhere have other keys."""
    if shards.manifest.tars:
        return [], lines
    counts = shards.manifest.shard_samples
    ids, others = [], []
    for line in lines:
        match = _KEY.fullmatch(line)
        shard, place = (int(match[1]), int(match[2])) if match else (len(counts), 0)
        if shard < len(counts) and place < counts[shard]:
            ids.append(int(shards.starts[shard]) + place)
        else:
            others.append(line)
    return ids, others


def _want(db: "DuckDBPyConnection", lines: list[str]) -> None:
    lowered = [line.lower() if re.fullmatch(r"[0-9A-Fa-f]{64}", line) else line for line in lines]
    db.register("batch", pa.table({"line": pa.array(lowered, pa.string())}))
    db.execute("INSERT INTO wanted SELECT line FROM batch")


def _scan(
    db: "DuckDBPyConnection", shards: ShardSet, progress: Progress
) -> tuple[NDArray[np.int64], int, tuple[str, ...]]:
    """Ids of the samples that a wanted line names; how many lines name none, and some of them."""
    if not db.execute("SELECT 1 FROM wanted LIMIT 1").fetchall():
        return np.empty(0, np.int64), 0, ()
    # what is wanted is what is held, the tables' rows go by: the engine cannot know how many these are
    db.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
    with fed(db, "rows", _ROWS, _rows(shards, progress)):
        db.execute("""
            CREATE TABLE found AS
            SELECT DISTINCT id, line FROM (SELECT id, unnest([key, sha256, source]) AS name FROM rows)
            JOIN (SELECT DISTINCT line FROM wanted) ON name = line
        """)
    ids = db.execute("SELECT DISTINCT id FROM found").fetchnumpy()["id"]
    db.execute("CREATE TABLE lost AS SELECT line FROM wanted ANTI JOIN found USING (line)")
    ((unknown,),) = db.execute("SELECT count(*) FROM lost").fetchall()
    examples = db.execute("SELECT line FROM lost ORDER BY line LIMIT ?", [SHOWN]).fetchall()
    return np.asarray(ids, np.int64), unknown, tuple(line for (line,) in examples)


def _rows(shards: ShardSet, progress: Progress) -> Iterator[pa.RecordBatch]:
    for number, table in enumerate(shards.tables(_ROWS.names[1:])):
        first = shards.starts[number]
        ids = pa.array(np.arange(first, first + table.num_rows))
        yield from table.add_column(0, "id", ids).cast(_ROWS).to_batches()
        progress("tables", number + 1, len(shards.manifest.shard_samples))
