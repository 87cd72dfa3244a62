"""The packing plan: which source goes into which shard, made once, kept in the store, and never made again.

    DST/plans/1/PLAN.json                 put last: with it, the plan exists; appending makes plan 2
    DST/plans/1/<identity>/0000.parquet   the sources of a group of shards in their order, one row group a shard
    DST/plans/1/commits/000012.json       a finished shard (data_shards.work)
    DST/plans/1/groups/0000.json          a finished group of shards (data_shards.merge)

The sources are listed once. A keyed permutation of their ranks puts neighbours of the listing far apart; DuckDB sorts
by it, on disk (TMPDIR) where memory does not do. So memory is bounded, whatever the number of sources.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, md5
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, PositiveInt

from data_shards.archives import TEXTS
from data_shards.database import connected
from data_shards.errors import UserError
from data_shards.images import Refused, Rules, examine
from data_shards.permutation import MAX_SIZE, Permutation
from data_shards.progress import Progress, quiet
from data_shards.shard import COLUMNS
from data_shards.sources import Source, SourceOptions, base_of, one_spelling, read_source
from data_shards.store import AlreadyExists, NotFound, Store

if TYPE_CHECKING:
    import duckdb

PLAN_VERSION = 2
MOST_GROUPS = 1000  # so many objects the last merge reads at most
BATCH = 16_384  # sources
SAMPLE = 64  # sources that are looked at where the listing does not tell what will be stored
USUAL_BYTES = 100_000  # of an image, where none of those is accepted

_IN_TAR = "512 + (size + 511) // 512 * 512"
_NAME_HASH = "CASE WHEN url IS NULL THEN try_cast(decode(name) AS UHUGEINT) ELSE md5_number(name) END"
_PATHS = ("url", "name", "label")
# `place`: of all listed sources, in the order of the shards. Paths and names need not be text.
_LISTED = pa.schema(
    {
        "place": pa.int64(),
        "url": pa.binary(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "name": pa.binary(),
        "label": pa.binary(),
        "deflated": pa.bool_(),
    }
)
_TEXTS = pa.schema({name: pa.string() for name in sorted(TEXTS)})


class PackSettings(Rules):
    """What is taken, and how the shards are made."""

    shard_bytes: PositiveInt = 256 * 2**20  # decides the number of objects only: reads are ranges
    seed: NonNegativeInt = 0  # of the order in which sources are laid out
    dali_index: bool = False  # write an index for DALI's own reader, too


class Asked(NamedTuple):
    """What a plan is made for. `source`: what list_sources takes, or a name for sources that were handed over."""

    source: str
    settings: PackSettings
    options: SourceOptions


@dataclass(frozen=True)
class Plan:
    """One packing. What is said of shards and groups follows from these numbers alone.

    identity: hash of the sources in their order and of the shards' borders. bytes: what the tars will hold, about.
    after: layout of the set that this one adds to, if it does. ignored: what the listing left out, by kind.
    """

    number: int
    identity: str
    asked: Asked
    sources: int
    bytes: int
    first_shard: int
    shards: int
    after: str | None
    ignored: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"plans/{self.number}"

    @property
    def path(self) -> str:
        return f"{self.folder}/PLAN.json"

    @property
    def end_shard(self) -> int:
        return self.first_shard + self.shards

    @property
    def groups(self) -> int:
        return min(MOST_GROUPS, self.shards)

    def group_shards(self, group: int) -> range:
        """The numbers of a group's shards."""
        first, end = (self.first_shard + _border(n, self.shards, self.groups) for n in (group, group + 1))
        return range(first, end)

    def group_of(self, shard: int) -> int:
        """The group that a shard belongs to."""
        return ((shard - self.first_shard + 1) * self.groups - 1) // self.shards

    def shard_sources(self, shard: int) -> int:
        """How many sources a shard was given."""
        number = shard - self.first_shard
        return _border(number + 1, self.sources, self.shards) - _border(number, self.sources, self.shards)

    def group_path(self, group: int) -> str:
        """Where the sources of a group are."""
        return f"{self.folder}/{self.identity}/{group:04d}.parquet"

    def commit_path(self, shard: int) -> str:
        return f"{self.folder}/commits/{shard:06d}.json"

    def summary_path(self, group: int) -> str:
        return f"{self.folder}/groups/{group:04d}.json"

    def load_sources(self, store: Store, group: int) -> tuple[pa.Schema | None, Iterator[list[Source]]]:
        """Names and types of the sources' metadata, and the sources of each of a group's shards."""
        with tempfile.TemporaryDirectory(prefix="farseer-group-") as folder:
            store.download(self.group_path(group), Path(folder, "sources"))
            # its name goes at once: whatever happens to this process, nothing stays behind
            table = pq.ParquetFile(Path(folder, "sources").open("rb"))  # noqa: SIM115
        columns = table.schema_arrow.field("columns").type if "columns" in table.schema_arrow.names else None
        parts = (table.read_row_group(number).to_pylist() for number in range(table.num_row_groups))
        return columns and pa.schema(list(columns)), ([_source(row) for row in rows] for rows in parts)

    def save(self, store: Store) -> None:
        """Raises AlreadyExists when another plan of that number is there."""
        asked = (self.asked.source, self.asked.settings.model_dump(), self.asked.options.model_dump())
        data = {"version": PLAN_VERSION, **vars(self), "asked": asked}
        store.put(self.path, json.dumps(data).encode(), create_only=True)


def load_plans(store: Store) -> list[Plan]:
    """The set's plans, the first one first. Raises UserError for one that another version of this program made."""
    found: list[Plan] = []
    for number in count(1):
        try:
            values = json.loads(store.get(f"plans/{number}/PLAN.json"))
        except NotFound:
            return found
        if values.pop("version", None) != PLAN_VERSION:
            raise UserError(f"{store.url}: plans/{number} is of another version of this program; give a DST of its own")
        found.append(Plan(asked=_asked(*values.pop("asked")), **values))
    raise AssertionError


def _asked(source: str, settings: dict[str, Any], options: dict[str, Any]) -> Asked:
    """Out of a plan, of which older ones have a source as it was typed."""
    spelled = one_spelling(source) if _is_place(source) else source
    return Asked(spelled, PackSettings(**settings), SourceOptions(**options))


def _is_place(source: str) -> bool:
    """Rather than a name for sources that were handed over."""
    return source.startswith("/") or "://" in source


def _is_same_place(one: str, other: str) -> bool:
    """Also by way of links, and by patterns of which one has grown."""
    one, other = base_of(one), base_of(other)
    return one == other or (one[:1] == other[:1] == "/" and os.path.realpath(one) == os.path.realpath(other))


def make_plan(
    store: Store,
    asked: Asked,
    sources: Iterable[Source],
    columns: pa.Schema | None = None,
    earlier: Sequence[Plan] = (),
    after: str | None = None,
    progress: Progress = quiet,
    ignored: Mapping[str, int] | None = None,
) -> Plan | None:
    """Lay the sources out and put the plan into the store; None when all of them are in `earlier` plans.

    columns: names and types of the sources' metadata, all of which are kept; without, what archives say is. ignored:
    what the listing counts. Raises UserError when there is no source or two have one name, and what listing raises.
    """
    if taken := set(columns.names if columns else ()) & set(COLUMNS.names):
        raise UserError(f"{asked.source}: {', '.join(sorted(taken))}: the index has columns of that name; rename them")
    with connected("sorting the sources") as (database, folder):
        _list(database, asked, sources, columns, progress)
        for plan in earlier:
            if _is_same_place(plan.asked.source, asked.source):
                _leave_out(database, store, plan, folder / "earlier.parquet")
        count, size = _totals(database, asked)
        if not count:
            return None
        plan = Plan(
            number=len(earlier) + 1,
            identity="",
            asked=asked,
            sources=count,
            bytes=size,
            first_shard=earlier[-1].end_shard if earlier else 0,
            shards=min(count, max(1, -(-size // asked.settings.shard_bytes))),
            after=after,
            ignored=dict(ignored or {}),
        )
        kept = "*" if columns is not None else _said(database)
        return _put(store, replace(plan, identity=_lay_out(database, plan, kept, folder, progress)), folder)


def _border(number: int, total: int, parts: int) -> int:
    return total * number // parts


def _list(
    database: "duckdb.DuckDBPyConnection",
    asked: Asked,
    sources: Iterable[Source],
    columns: pa.Schema | None,
    progress: Progress,
) -> None:
    """Fill the table `listed`.

    The places are of a permutation larger than any listing: so they are known before the listing has ended.
    """
    key = blake2b(f"pack {PLAN_VERSION} {asked.settings.seed}".encode(), digest_size=64).digest()
    permutation, listed, rows = Permutation(MAX_SIZE, key), 0, iter(sources)
    schema = _LISTED.append(pa.field("columns", pa.struct(_TEXTS if columns is None else columns)))
    database.register("batch", schema.empty_table())
    database.execute("CREATE TABLE listed AS SELECT * FROM batch")
    while some := list(islice(rows, BATCH)):
        database.register("batch", _batch(some, permutation(np.arange(listed, listed + len(some))), schema))
        database.execute("INSERT INTO listed SELECT * FROM batch")
        listed += len(some)
        progress("listed", listed, 0)
    twice = database.execute("SELECT min(name) FROM listed GROUP BY name HAVING count(*) > 1 LIMIT 1").fetchall()
    if twice:
        raise UserError(f"{asked.source}: two sources have the name {os.fsdecode(twice[0][0])!r}; each needs its own")
    if not listed:
        raise UserError(f"{asked.source}: no image to pack: there is no file in it")


def _said(database: "duckdb.DuckDBPyConnection") -> str:
    """What is kept of a listing: of what archives may say of their images, what at least one does."""
    counts = ", ".join(f"count(columns.{name})" for name in _TEXTS.names)
    (found,) = database.execute(f"SELECT {counts} FROM listed").fetchall()  # noqa: S608
    texts = ", ".join(f"{name} := columns.{name}" for name, n in zip(_TEXTS.names, found, strict=True) if n)
    return "* EXCLUDE columns" + (f", struct_pack({texts}) AS columns" if texts else "")


def _batch(sources: list[Source], places: Any, schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = dict(zip(Source._fields, map(list, zip(*sources, strict=True)), strict=True))
    for name in _PATHS:
        columns[name] = [None if text is None else os.fsencode(text) for text in columns[name]]
    return pa.table({name: (columns | {"place": places})[name] for name in schema.names}, schema=schema)


def forgotten(name: bytes) -> bytes:
    """What a plan keeps of a source's name when the image was erased, with no url: `_leave_out` knows it by that."""
    return b"%d" % int.from_bytes(md5(name, usedforsecurity=False).digest(), "little")


def _source(row: dict[str, Any]) -> Source:
    texts = {name: None if row[name] is None else os.fsdecode(row[name]) for name in _PATHS}
    return Source(**{name: value for name, value in (row | texts).items() if name != "place"})


def _leave_out(database: "duckdb.DuckDBPyConnection", store: Store, plan: Plan, local: Path) -> None:
    """Drop from the listing what an earlier plan has; only 16 bytes a name are kept for it."""
    database.execute("CREATE OR REPLACE TABLE earlier (hash UHUGEINT)")
    for group in range(plan.groups):
        store.download(plan.group_path(group), local)
        database.execute(f"INSERT INTO earlier SELECT {_NAME_HASH} FROM read_parquet(?)", [str(local)])  # noqa: S608
    database.execute(
        "CREATE TABLE rest AS SELECT listed.* FROM listed ANTI JOIN earlier ON md5_number(listed.name) = earlier.hash;"
        "DROP TABLE listed; ALTER TABLE rest RENAME TO listed"
    )


def _totals(database: "duckdb.DuckDBPyConnection", asked: Asked) -> tuple[int, int]:
    """How many sources, and the bytes that they will take in tars: by their listed sizes, or by looking at some."""
    ((count, known, size),) = database.execute(
        f"SELECT count(*), count(size), sum({_IN_TAR}) FILTER (size <= ?) FROM listed",  # noqa: S608
        [asked.settings.max_bytes],
    ).fetchall()
    if known >= count / 2 > 0 and not asked.settings.longest_side:
        return count, int(size or 0) * count // known
    found = database.sql(f"SELECT * FROM listed ORDER BY place LIMIT {SAMPLE}").to_arrow_table()  # noqa: S608
    sizes = [_stored_bytes(_source(row), asked) for row in found.to_pylist()]
    accepted = [size for size in sizes if size]
    each = sum(512 + (size + 511) // 512 * 512 for size in accepted) / len(accepted) if accepted else USUAL_BYTES
    # one more than seen: where few are accepted, those must not all come into one shard
    return count, round(count * each * (len(accepted) + 1) / (len(sizes) + 1))


def _stored_bytes(source: Source, asked: Asked) -> int:
    """What a shard will hold of a source; 0 when it will be refused."""
    skip = asked.options.skip_unreachable
    try:
        data = read_source(source, asked.settings.max_bytes, skip_unreachable=skip)
        return len(examine(data, asked.settings).data)
    except Refused:
        return 0


def _lay_out(database: "duckdb.DuckDBPyConnection", plan: Plan, kept: str, folder: Path, progress: Progress) -> str:
    """Write folder/0000.parquet and so on, of the columns `kept`; gives the plan's identity."""
    borders = f"layout {PLAN_VERSION} {plan.first_shard} {plan.shards} {plan.sources}"
    identity = blake2b(borders.encode(), digest_size=16)
    rows = f"SELECT * EXCLUDE place FROM (SELECT {kept} FROM listed) ORDER BY place"  # noqa: S608
    reader = database.sql(rows).to_arrow_reader(BATCH)
    shards = _cut(iter(reader), map(plan.shard_sources, range(plan.first_shard, plan.end_shard)))
    for group in range(plan.groups):
        with pq.ParquetWriter(folder / f"{group:04d}.parquet", reader.schema, compression="zstd") as writer:
            for _ in plan.group_shards(group):
                table = pa.Table.from_batches(next(shards), reader.schema)
                for name in table["name"].to_pylist():
                    identity.update(b"%d " % len(name) + name)
                writer.write_table(table, row_group_size=table.num_rows)
        progress("laid out", plan.group_shards(group).stop - plan.first_shard, plan.shards)
    return identity.hexdigest()


def _cut(batches: Iterator[pa.RecordBatch], sizes: Iterable[int]) -> Iterator[list[pa.RecordBatch]]:
    """A stream of rows in pieces of so many."""
    rest = next(batches)
    for left in sizes:
        taken = []
        while left:
            rest = rest if rest.num_rows else next(batches)
            taken.append(rest.slice(0, left))
            left, rest = left - taken[-1].num_rows, rest.slice(left)
        yield taken


def _put(store: Store, plan: Plan, folder: Path) -> Plan:
    """The plan; or the one that another process put there meanwhile."""
    for group in range(plan.groups):
        store.upload(folder / f"{group:04d}.parquet", plan.group_path(group))
    try:
        plan.save(store)
    except AlreadyExists:
        return load_plans(store)[plan.number - 1]
    return plan
