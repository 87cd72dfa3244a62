"""One shard: a plain USTAR tar of images, a RECORD for each, a Parquet row for each, and DALI's own index on request.

Owner, time and mode are fixed and members are named by their place, so the same images give the same bytes, and
nothing of the machine that packed them or of a source's path is inside the tar.
"""

import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import told_when_full
from data_shards.images import Photo
from data_shards.index import RECORD, dali_path, index_path, sample_key, shard_digest, shard_path, table_path
from data_shards.sources import Source
from data_shards.store import Store

# One row a sample; the columns of the sources' own metadata follow.
COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "offset": pa.uint64(),
        "size": pa.uint32(),
        "width": pa.uint32(),
        "height": pa.uint32(),
        "format": pa.string(),
        "sha256": pa.string(),
        "phash": pa.uint64(),
        "label": pa.string(),
        "source": pa.string(),
    }
)


class Written(NamedTuple):
    """A shard in the store: its samples, its tar's bytes, and the digest of what the samples hold (hex)."""

    samples: int
    bytes: int
    digest: str


class Row(NamedTuple):
    """What the index says of a sample: a row of its table, and the CRC32C of its bytes."""

    columns: dict[str, Any]
    crc32c: int


def write_shard(
    number: int, images: Iterable[tuple[Source, Photo]], store: Store, columns: pa.Schema | None, dali_index: bool
) -> Written:
    """Write a shard: its tar, then its index. columns: types of the sources' metadata. Keeps one image in memory."""
    # a file without a name: whatever happens to this process, nothing of it stays on the disk
    with told_when_full(), tempfile.TemporaryFile(prefix="farseer-shard-") as file:
        rows = [*_write_tar(file, number, images)]
        file.flush()
        store.upload(Path(f"/proc/self/fd/{file.fileno()}"), shard_path(number))
        if dali_index:
            store.put(dali_path(number), _dali(rows).encode())
        return put_index(store, number, rows, columns, file.tell())


def row(number: int, place: int, offset: int, source: Source, photo: Photo) -> Row:
    """Of the sample at a place of shard `number`, whose bytes begin at `offset` of the tar."""
    columns = {
        "key": sample_key(number, place),
        "offset": offset,
        "size": len(photo.data),
        "width": photo.width,
        "height": photo.height,
        "format": photo.extension,
        "sha256": photo.sha256.hex(),
        "phash": photo.phash,
        "label": _text(source.label),
        "source": _text(source.name),
    }
    return Row({**(source.columns or {}), **columns}, google_crc32c.value(photo.data))


def put_index(store: Store, number: int, rows: Sequence[Row], columns: pa.Schema | None, size: int) -> Written:
    """Put a shard's RECORDs and its table. columns: types of the sources' metadata. size: bytes of the tar."""
    records = np.empty(len(rows), dtype=RECORD)
    for name in ("offset", "size", "width", "height"):
        records[name] = [one.columns[name] for one in rows]
    records["crc32c"] = [one.crc32c for one in rows]
    table = io.BytesIO()
    schema = pa.schema([*COLUMNS, *(columns or ())])
    pq.write_table(pa.Table.from_pylist([one.columns for one in rows], schema=schema), table, compression="zstd")
    store.put(index_path(number), records.tobytes())
    store.put(table_path(number), table.getvalue())
    return Written(len(rows), size, shard_digest(bytes.fromhex(one.columns["sha256"]) for one in rows))


def _write_tar(file: IO[bytes], number: int, images: Iterable[tuple[Source, Photo]]) -> Iterator[Row]:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (source, photo) in enumerate(images):
            member = tarfile.TarInfo(f"{sample_key(number, place)}.{photo.extension}")
            member.size = len(photo.data)
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(photo.data))
            yield row(number, place, offset, source, photo)


def _dali(rows: Sequence[Row]) -> str:
    """As `wds2idx` writes it: a version, then extension, offset, size and name of each sample's one member."""
    found = [one.columns for one in rows]
    lines = (f"{one['format']} {one['offset']} {one['size']} {one['key']}.{one['format']}" for one in found)
    return "\n".join([f"v1.2 {len(found)}", *lines]) + "\n"


def _text(name: str | None) -> str | None:
    """File names need not be text; Parquet's strings must be."""
    return None if name is None else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
