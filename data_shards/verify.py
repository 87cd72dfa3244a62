"""Does a shard set hold what its manifest says? Quickly by sizes and indexes, or in full by every byte of every image.

What it finds is a list of faults, each with the shard, so that one knows what to pack again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.images import PILLOW_MAX_PIXELS, Refused, examine
from data_shards.index import RECORD, Manifest, shard_path
from data_shards.store import NotFound, Store

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VerifyReport:
    """`faults`: one line each; none means that all is well."""

    url: str
    samples: int
    shards: int
    full: bool
    faults: tuple[str, ...]


def verify(store: Store, *, full: bool = False, progress: Progress | None = None) -> VerifyReport:
    """Check a set. full: read every shard, and check and decode every image; else only what lists and indexes tell.

    Raises UserError when there is no set.
    """
    manifest = Manifest.load(store)
    sizes = {entry.path: entry.size for entry in store.list("shards")}
    faults: list[str] = []
    for number in range(len(manifest.shard_samples)):
        faults += _shard(store, manifest, number, sizes, full)
        if progress:
            progress("shards", number + 1, len(manifest.shard_samples))
    return VerifyReport(store.url, manifest.samples, len(manifest.shard_samples), full, tuple(faults))


def _shard(store: Store, manifest: Manifest, number: int, sizes: dict[str, int], full: bool) -> Iterator[str]:
    tar, count = shard_path(number), manifest.shard_samples[number]
    index, table = tar.replace(".tar", ".idx"), tar.replace(".tar", ".parquet")
    wanted = {tar: manifest.shard_bytes[number], index: count * RECORD.itemsize, table: None}
    found = {path: sizes.get(path) for path in wanted}
    missing = [path for path, size in found.items() if size is None]
    yield from (f"{path}: is missing" for path in missing)
    wrong = [path for path, size in wanted.items() if size is not None and found[path] not in (None, size)]
    yield from (f"{path}: has {found[path]} bytes, {wanted[path]} are right" for path in wrong)
    if missing or wrong:
        return
    try:
        records = np.frombuffer(store.get(index), dtype=RECORD)
        rows = pq.read_table(pa.BufferReader(store.get(table)))
        yield from _records(index, table, records, rows, manifest.shard_bytes[number])
        if full:
            yield from _images(tar, store.get(tar), records, rows)
    except NotFound as error:
        yield str(error)
    except pa.ArrowInvalid as error:
        yield f"{table}: is not a Parquet file: {error}"


def _records(index: str, table: str, records: np.ndarray, rows: pa.Table, tar_bytes: int) -> Iterator[str]:
    starts, ends = records["offset"].astype(np.int64), (records["offset"] + records["size"]).astype(np.int64)
    if (starts[1:] < ends[:-1]).any() or int(ends[-1]) > tar_bytes:
        yield f"{index}: its places overlap or lie outside the shard"
    if rows.num_rows != len(records):
        yield f"{table}: has {rows.num_rows} rows, {len(records)} are right"
        return
    for name in ("offset", "size", "width", "height"):
        if not np.array_equal(rows[name].to_numpy(), records[name]):
            yield f"{table}: its column {name} differs from {index}"


def _images(tar: str, data: bytes, records: np.ndarray, rows: pa.Table) -> Iterator[str]:
    for row, record in zip(rows.to_pylist(), records, strict=True):
        image = data[int(record["offset"]) : int(record["offset"]) + int(record["size"])]
        if google_crc32c.value(image) != record["crc32c"]:
            yield f"{tar}: {row['key']}: its CRC32C is not the one of the index"
            continue
        try:
            photo = examine(image, min_side=1, max_pixels=PILLOW_MAX_PIXELS)
        except Refused as refused:
            yield f"{tar}: {row['key']}: {refused.reason} ({refused.detail})"
            continue
        if photo.sha256.hex() != row["sha256"]:
            yield f"{tar}: {row['key']}: its sha256 is not the one of the table"
        if (photo.width, photo.height) != (record["width"], record["height"]):
            yield f"{tar}: {row['key']}: is {photo.width} x {photo.height}, the index says otherwise"
