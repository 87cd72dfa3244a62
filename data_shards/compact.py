"""Erases removed images from a shard set, in place: bytes, hashes and names go, every other byte stays where it is.

Of a removed sample stay its id, its key and the place where it lay. In the tar its bytes become zeros and its header
that of a volume label, which readers of tars skip; its RECORD keeps the offset and nothing else; so does its row of the
table, with the key; the packing plan keeps a hash of its source's name, so that appending does not bring it back.

Nothing moves, so nobody who reads meanwhile is disturbed. Of a shard the RECORDs go first (from then on the sample is
read as an empty place), then the tar, then the table: with it the shard is done. Killed at any moment, it can be run
again. What a bucket keeps of objects that were written over (S3 versioning) is the bucket's owner's to delete.
"""

import contextlib
import io
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_shards.errors import UserError, one_line, told_when_full
from data_shards.index import RECORD, ShardSet, dali_path, index_path, shard_path, table_path
from data_shards.plan import Plan, forgotten, load_plans
from data_shards.progress import Progress, quiet
from data_shards.removed import by_shard, read_removed
from data_shards.store import NotFound, Store

EMPTY_TYPE = b"V"  # a GNU volume label: tar, Python, webdataset and DALI pass over it and what it holds
THREADS = 4

Places = NDArray[np.int64]
Group = tuple[int, int] | None


@dataclass(frozen=True)
class CompactReport:
    """images: erased now; shards: rewritten for it; bytes: of images that became zeros; empty: places in all."""

    url: str
    images: int
    shards: int
    bytes: int
    empty: int
    versioned: bool | None

    def summary(self) -> str:
        """One line for a terminal."""
        if not self.images:
            return f"{self.url}: nothing to erase; {self.empty:,} places are empty"
        keeps = {True: "; the bucket keeps", None: "; if the bucket keeps", False: ""}[self.versioned]
        old = f"{keeps} old versions of its objects, delete those too" if keeps else ""
        return (
            f"{self.url}: {self.images:,} images erased from {self.shards:,} shards ({self.bytes / 1e6:,.1f} MB), "
            f"{self.empty:,} places are empty now{old}; caches on nodes and copies elsewhere are not touched"
        )


def compact(store: Store, progress: Progress = quiet) -> CompactReport:
    """Erase what the removal lists name. Run one at a time.

    A shard that has some is brought here and put again whole: remove much, compact seldom. Raises UserError when shards
    lie elsewhere, or the disk for temporary files is full.
    """
    shards = ShardSet.open(store)
    if shards.manifest.tars:
        raise UserError(
            f"{store.url}: its shards lie elsewhere ({shards.shard_name(0)}), and what is not its own is not written "
            f"over; make shards packs the images anew, without the removed ones"
        )
    removed = read_removed(shards).ids.astype(np.int64)
    plans, groups = load_plans(store), defaultdict(list)
    for shard, places in by_shard(shards, removed):
        groups[_group_of(plans, shard)].append((shard, places))
    done: list[tuple[int, int]] = []
    threads = ThreadPoolExecutor(THREADS)
    try:
        work = threads.map(partial(_compact_group, store, plans), groups, groups.values())
        for number, erased in enumerate(work, 1):
            done += erased
            progress("groups of shards", number, len(groups))
    finally:
        threads.shutdown(cancel_futures=True)
    images, size = (sum(column) for column in zip(*done, strict=True)) if done else (0, 0)
    return CompactReport(store.url, images, len(done), size, len(removed), store.keeps_versions())


def _group_of(plans: list[Plan], shard: int) -> Group:
    """Which plan, and which part of it, has the sources of a shard; None for a set that was made without."""
    for number, plan in enumerate(plans):
        if plan.first_shard <= shard < plan.end_shard:
            return number, plan.group_of(shard)
    return None


def _compact_group(
    store: Store, plans: list[Plan], group: Group, touched: list[tuple[int, Places]]
) -> list[tuple[int, int]]:
    """Of each shard that was not done before: how many images were erased, and their bytes."""
    tables = {shard: _table(store, shard) for shard, _ in touched}
    todo = [(shard, places) for shard, places in touched if _left(tables[shard], places)]
    with told_when_full():
        if group and todo:
            sources = {shard: tables[shard]["source"].take(places).to_pylist() for shard, places in todo}
            _erase_in_plan(store, plans[group[0]], group[1], {shard: set(names) for shard, names in sources.items()})
        return [_compact_shard(store, shard, places, tables[shard]) for shard, places in todo]


def _table(store: Store, shard: int) -> pa.Table:
    with _whole(store, shard):
        return pq.read_table(pa.BufferReader(store.get(table_path(shard))))


@contextlib.contextmanager
def _whole(store: Store, shard: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError, tarfile.TarError) as error:
        place, why = f"{store.url}/{shard_path(shard)}", f"it, its index or its table is damaged ({one_line(error)})"
        raise UserError(f"{place}: {why}; make verify DST={store.url} FULL=1") from error


def _left(table: pa.Table, places: Places) -> int:
    """How many of these rows still tell of an image."""
    return len(places) - int(table["sha256"].take(places).null_count)


def _compact_shard(store: Store, shard: int, places: Places, table: pa.Table) -> tuple[int, int]:
    """How many images were erased, and their bytes."""
    images = _left(table, places)
    with _whole(store, shard):
        size = _erase(store, shard, places)
    store.put(table_path(shard), _without(table, places))
    return images, size


def _erase(store: Store, shard: int, places: Places) -> int:
    """In all that belongs to a shard but its table, which tells that it is done; how many bytes were images'."""
    records = np.frombuffer(store.get(index_path(shard)), RECORD).copy()
    for name in set(RECORD.names or ()) - {"offset"}:
        records[name][places] = 0
    store.put(index_path(shard), records.tobytes())
    offsets = records["offset"][places].tolist()
    _erase_in_dali_index(store, shard, set(offsets))
    return _erase_in_tar(store, shard, offsets)


def _erase_in_tar(store: Store, shard: int, offsets: list[int]) -> int:
    """Zeros in the place of members' data, whose first bytes are given, and headers that hide them; how many zeros."""
    zeros = 0
    with tempfile.TemporaryDirectory(prefix="farseer-compact-") as folder:
        local = Path(folder, "shard.tar")
        store.download(shard_path(shard), local)
        with local.open("r+b") as tar:
            for offset in offsets:
                tar.seek(offset - tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(tar.read(tarfile.BLOCKSIZE), "ascii", "strict")
                member.type = EMPTY_TYPE
                tar.seek(offset - tarfile.BLOCKSIZE)
                tar.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(member.size))
                zeros += member.size
        store.upload(local, shard_path(shard))
    return zeros


def _erase_in_dali_index(store: Store, shard: int, offsets: set[int]) -> None:
    """DALI goes where its index says; the lines of the others stay as they are."""
    try:
        head, *lines = store.get(dali_path(shard)).decode().splitlines()
    except NotFound:
        return
    kept = [line for line in lines if int(line.split()[1]) not in offsets]
    text = "\n".join([f"{head.split()[0]} {len(kept)}", *kept]) + "\n"
    store.put(dali_path(shard), text.encode())


def _erase_in_plan(store: Store, plan: Plan, group: int, sources: dict[int, set[str]]) -> None:
    """Put a hash in the place of what the plan says of these sources, by shard, as the tables name them."""
    with tempfile.TemporaryDirectory(prefix="farseer-compact-") as folder:
        before, after = Path(folder, "before"), Path(folder, "after")
        store.download(plan.group_path(group), before)
        file = pq.ParquetFile(before)
        with pq.ParquetWriter(after, file.schema_arrow, compression="zstd") as writer:
            for number, shard in enumerate(plan.group_shards(group)):
                rows = file.read_row_group(number)
                names = rows["name"].to_pylist()
                gone = np.array([_as_in_tables(name) in sources.get(shard, ()) for name in names], bool)
                kept = [forgotten(name) if out else name for name, out in zip(names, gone, strict=True)]
                rows = _emptied(rows, gone, keep=("name",))
                column = rows.schema.names.index("name")
                writer.write_table(rows.set_column(column, "name", pa.array(kept, pa.binary())))
        store.upload(after, plan.group_path(group))


def _as_in_tables(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _without(table: pa.Table, places: Places) -> bytes:
    """The table with nothing in these rows but what says that there is an empty place."""
    gone = np.zeros(table.num_rows, bool)
    gone[places] = True
    out = io.BytesIO()
    pq.write_table(_emptied(table, gone, keep=("key", "offset")), out, compression="zstd")
    return out.getvalue()


def _emptied(table: pa.Table, gone: NDArray[np.bool_], keep: tuple[str, ...]) -> pa.Table:
    """Nulls in some rows of all other columns."""
    for number, field in enumerate(table.schema):
        if field.name not in keep:
            empty = pc.if_else(pa.array(gone), pa.scalar(None, field.type), table[field.name])
            table = table.set_column(number, field, empty)
    return table
