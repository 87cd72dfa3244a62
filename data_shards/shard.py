"""One shard: a plain USTAR tar of images, a RECORD for each, and a Parquet row for each.

Owner, time and mode are fixed and members are named by their place, so the same samples give the same bytes, and
nothing of the machine that packed them or of a source's path is inside the tar.
"""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import UserError
from data_shards.images import convert
from data_shards.index import RECORD, sample_key, shard_path
from data_shards.store import Store


@dataclass(frozen=True, slots=True)
class Sample:
    """An accepted image: where it comes from, and what will be stored of it."""

    path: Path
    source: str
    label: str | None
    extension: str
    converted: bool
    width: int
    height: int
    size: int
    crc32c: int
    sha256: bytes

    @property
    def tar_bytes(self) -> int:
        """Its share of a tar: a header, and data in whole blocks."""
        return tarfile.BLOCKSIZE * (1 - (-self.size // tarfile.BLOCKSIZE))


def write_shard(part: tuple[int, Sequence[Sample]], dst: Store, folder: Path) -> int:
    """Write shard `part[0]` of a set with these samples; gives its bytes. `folder` holds the tar until it is uploaded.

    Raises UserError when a source is no longer what it was when it was checked.
    """
    number, samples = part
    path = shard_path(number)
    local = folder / f"{number:06d}.tar"
    try:
        offsets = _write_tar(local, number, samples)
        size = local.stat().st_size
        dst.upload(local, path)
    finally:
        local.unlink(missing_ok=True)
    dst.put(path.replace(".tar", ".idx"), _records(samples, offsets).tobytes())
    dst.put(path.replace(".tar", ".parquet"), _rows(number, samples, offsets))
    return size


def _write_tar(local: Path, number: int, samples: Sequence[Sample]) -> list[int]:
    offsets = []
    with tarfile.open(local, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, sample in enumerate(samples):
            data = _data(sample)
            member = tarfile.TarInfo(f"{sample_key(number, place)}.{sample.extension}")
            member.size = len(data)
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(member, io.BytesIO(data))
    return offsets


def _data(sample: Sample) -> bytes:
    try:
        data = sample.path.read_bytes()
    except OSError as error:
        raise UserError(f"{sample.path}: {error.strerror}, though it was there a moment ago; pack again") from error
    if sample.converted:
        data = convert(data)
    if hashlib.sha256(data).digest() != sample.sha256:
        raise UserError(f"{sample.path}: changed while it was packed; pack again when nothing writes to it")
    return data


def _records(samples: Sequence[Sample], offsets: Sequence[int]) -> np.ndarray:
    records = np.empty(len(samples), dtype=RECORD)
    records["offset"] = offsets
    for name in ("size", "crc32c", "width", "height"):
        records[name] = [getattr(sample, name) for sample in samples]
    return records


def _rows(number: int, samples: Sequence[Sample], offsets: Sequence[int]) -> bytes:
    table = pa.table(
        {
            "key": pa.array([sample_key(number, place) for place in range(len(samples))]),
            "offset": pa.array(offsets, pa.uint64()),
            "size": pa.array([sample.size for sample in samples], pa.uint32()),
            "width": pa.array([sample.width for sample in samples], pa.uint32()),
            "height": pa.array([sample.height for sample in samples], pa.uint32()),
            "format": pa.array([sample.extension for sample in samples]),
            "sha256": pa.array([sample.sha256.hex() for sample in samples]),
            "label": pa.array([_text(sample.label) for sample in samples], pa.string()),
            "source": pa.array([_text(sample.source) for sample in samples]),
        }
    )
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def _text(name: str | None) -> str | None:
    """File names need not be text; Parquet's strings must be."""
    return None if name is None else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
