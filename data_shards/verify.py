"""Does a shard set hold what its manifest says? Quickly by sizes and indexes, or in full by every byte of every image.

Quickly: the manifest and its version under the layout; of each shard the tar's size, and the index against the Parquet
rows. In full: also the header of each member, and the CRC32C, the SHA-256, the decode and the size in pixels of each
image of those shards whose index is right. What has been read in full is noted, so that a killed run goes on.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.fetch import ranges
from data_shards.images import PILLOW_MAX_PIXELS, Refused, Rules, examine
from data_shards.index import MANIFEST, RECORD, Manifest, ShardSet, index_path, manifest_path, shard_path, table_path
from data_shards.processes import unordered, worker_count
from data_shards.progress import Progress, quiet
from data_shards.removed import by_shard, read_removed
from data_shards.store import NotFound, Store

RANGE_BYTES = 8 * 2**20  # of a tar that are read at once; each process holds two
FOLDERS = 64  # of the 256 that shards are spread over are looked at together: requests in flight
TAKEN = Rules(min_side=1, max_aspect=1e9, max_pixels=PILLOW_MAX_PIXELS, max_bytes=2**32)  # a matter of packing

PACK = "bring back a copy of it, or pack the same SRC= under another DST="
REMOVE = "make remove takes it out of training"
HEADER = tarfile.BLOCKSIZE


class Fault(NamedTuple):
    """Something that is wrong: the object, the sample if it is about one, what is found, and what to do."""

    object: str
    key: str | None
    found: str
    mend: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.object, self.key, f"{self.found}; {self.mend}")))


@dataclass(frozen=True)
class VerifyReport:
    """`faults`: none means that all is well. resumed: shards that an earlier, interrupted run has read in full."""

    url: str
    samples: int
    shards: int
    full: bool
    faults: tuple[Fault, ...]
    resumed: int = 0

    @property
    def keys(self) -> list[str]:
        """Of samples that cannot be shown, sorted: for make remove."""
        return sorted({fault.key for fault in self.faults if fault.key and fault.mend == REMOVE})

    def lines(self, most: int = 50) -> list[str]:
        """For a terminal: the first faults, and what came out."""
        how = "every image decoded" if self.full else "sizes and indexes; FULL=1 decodes every image"
        again = f"; {self.resumed:,} shards had been read before it was interrupted" if self.resumed else ""
        count = len(self.faults)
        verdict = f"{count:,} fault{'s'[: count != 1]}" if count else "as its manifest says"
        more = count - most
        return [
            *map(str, self.faults[:most]),
            *([f"and {more:,} more; JSON=1 lists them all"] if more > 0 else []),
            f"{self.url}: {self.samples:,} images in {self.shards:,} shards: {verdict} ({how}{again})",
        ]


class Part(NamedTuple):
    """What the manifest says of a shard. elsewhere: its tar is not one of this set's, and may hold other members.

    name: what to call its tar in words.
    removed: places whose images are not shown any more, so that it does not matter what they are.
    """

    number: int
    samples: int
    bytes: int
    home: Store
    tar: tuple[Store, str]
    name: str
    elsewhere: bool
    removed: frozenset[int]


class Checked(NamedTuple):
    """What was found in a shard. fingerprint: of its index, its rows and its tar's size."""

    number: int
    fingerprint: str
    faults: tuple[Fault, ...]


def verify(
    store: Store,
    *,
    full: bool = False,
    workers: int | None = None,
    notes: Path | None = None,
    afresh: bool = False,
    progress: Progress = quiet,
) -> VerifyReport:
    """Check a set. full: read every shard, and check and decode every image; else only what lists and indexes tell.

    workers: processes; by default one a core, and this one alone for a small set. notes: a folder of this machine,
    where shards that were read in full are noted until all are; afresh: pay no heed to those. Raises UserError when
    there is no set.
    """
    shards = ShardSet.open(store)
    manifest = shards.manifest
    gone = {number: frozenset(places.tolist()) for number, places in by_shard(shards, read_removed(shards).ids)}
    elsewhere, none = bool(manifest.tars), frozenset[int]()
    parts = [
        Part(n, samples, size, store, shards.tar(n), shards.shard_name(n), elsewhere, gone.get(n, none))
        for n, (samples, size) in enumerate(zip(manifest.shard_samples, manifest.shard_bytes, strict=True))
    ]
    faults = _versions(store, manifest)
    quick: dict[int, str] = {}
    for checked in _quickly(parts, worker_count(workers, len(parts) // 500, store), progress):
        faults += checked.faults
        if not checked.faults:
            quick[checked.number] = checked.fingerprint
    resumed = 0
    if full:
        noted = Notes(notes and notes / _name(store, manifest), afresh)
        sound = [part for part in parts if part.number in quick]
        left = [part for part in sound if noted.of(part.number, quick[part.number]) is None]
        resumed = len(sound) - len(left)
        for checked in _fully(left, quick, worker_count(workers, manifest.samples // 1000, store), progress):
            noted.add(checked)
        faults += [fault for part in sound for fault in noted.of(part.number, quick[part.number]) or ()]
        noted.forget()
    return VerifyReport(store.url, manifest.samples, len(parts), full, tuple(faults), resumed)


def _name(store: Store, manifest: Manifest) -> str:
    told = f"{store.url} {manifest.layout_id} {manifest.contents_id}"
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest() + ".jsonl"


class Notes:
    """What has been read in full so far: a line a shard, which counts only as long as its fingerprint is the same."""

    def __init__(self, path: Path | None, afresh: bool) -> None:
        self._path = path
        self._checked: dict[int, Checked] = {}
        if afresh:
            self.forget()
        if path and path.exists():
            for line in path.read_text().splitlines():
                self._read(line)

    def of(self, number: int, fingerprint: str) -> tuple[Fault, ...] | None:
        """The faults of a shard; None when it has not been read as it is now."""
        found = self._checked.get(number)
        return found.faults if found and found.fingerprint == fingerprint else None

    def add(self, checked: Checked) -> None:
        self._checked[checked.number] = checked
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"\n{json.dumps(checked)}")  # after whatever a killed run left of a line

    def forget(self) -> None:
        if self._path:
            self._path.unlink(missing_ok=True)

    def _read(self, line: str) -> None:
        try:
            number, fingerprint, faults = json.loads(line)
        except (ValueError, TypeError):
            return  # cut by a kill
        self._checked[number] = Checked(number, fingerprint, tuple(Fault(*fault) for fault in faults))


def _versions(store: Store, manifest: Manifest) -> list[Fault]:
    """The newest manifest must be there under its layout too: runs ask for it by that name."""
    path = manifest_path(manifest.layout_id)
    try:
        found = "" if store.get(path) == store.get(MANIFEST) else f"differs from {MANIFEST}"
    except NotFound:
        found = "is missing"
    return [Fault(path, None, found, f"copy {MANIFEST} there")] if found else []


def _quickly(parts: list[Part], workers: int, progress: Progress) -> Iterator[Checked]:
    by_folder = [list(found) for _, found in groupby(sorted(parts, key=_folder), _folder)]
    progress("indexes", 0, len(parts))
    each, done = max(8, FOLDERS // workers), 0
    groups = [by_folder[first : first + each] for first in range(0, len(by_folder), each)]
    for checked in unordered(_folders, groups, workers):
        done += len(checked)
        progress("indexes", done, len(parts))
        yield from checked


def _fully(parts: list[Part], prints: dict[int, str], workers: int, progress: Progress) -> Iterator[Checked]:
    sizes = {part.number: (part.samples, part.bytes) for part in parts}
    images, bytes_read, total = 0, 0, sum(part.samples for part in parts)
    progress("images", 0, total)
    for number, faults in unordered(_images, parts, workers):
        images, bytes_read = images + sizes[number][0], bytes_read + sizes[number][1]
        progress("images", images, total, bytes=bytes_read)
        yield Checked(number, prints[number], faults)


def _folder(part: Part) -> str:
    return shard_path(part.number).rpartition("/")[0]


def _folders(folders: list[list[Part]]) -> list[Checked]:
    """A thread each: it is listed, which gives the sizes; then one shard after another is looked at."""

    def one(parts: list[Part]) -> list[Checked]:
        sizes = {entry.path: entry.size for entry in parts[0].home.walk(_folder(parts[0]))}
        return [_indexes(part, sizes) for part in parts]

    with ThreadPoolExecutor(len(folders)) as threads:
        return [checked for found in threads.map(one, folders) for checked in found]


def _tar_size(part: Part, sizes: dict[str, int]) -> int | None:
    store, path = part.tar
    try:
        return store.size(path) if part.elsewhere else sizes.get(path)
    except NotFound:
        return None


def _indexes(part: Part, sizes: dict[str, int]) -> Checked:
    """What can be said of a shard without reading its tar."""
    index, table, right = index_path(part.number), table_path(part.number), part.samples * RECORD.itemsize
    faults, tar_size = [], _tar_size(part, sizes)
    if tar_size != part.bytes:
        found = "is missing" if tar_size is None else f"has {tar_size} bytes, {part.bytes} are right"
        faults.append(Fault(part.name, None, found, "bring it back" if part.elsewhere else PACK))
    faults += [Fault(path, None, "is missing", PACK) for path in (index, table) if path not in sizes]
    if sizes.get(index, right) != right:
        faults.append(Fault(index, None, f"has {sizes[index]} bytes, {right} are right", PACK))
    if faults:
        return Checked(part.number, "", tuple(faults))
    places, rows = (read.result() for read in [part.home.submit(part.home.read(path)) for path in (index, table)])
    fingerprint = hashlib.blake2b(places + rows + b"%d" % part.bytes, digest_size=16).hexdigest()
    found_in = _records(index, table, np.frombuffer(places, RECORD), rows, part.bytes)
    return Checked(part.number, fingerprint, tuple(found_in))


def _records(index: str, table: str, records: np.ndarray, data: bytes, tar_bytes: int) -> Iterator[Fault]:
    starts = records["offset"].astype(np.int64)
    ends = starts + records["size"]
    if (starts[1:] < ends[:-1]).any() or (ends > tar_bytes).any() or (starts < HEADER).any():
        yield Fault(index, None, "its places overlap or lie outside the shard", PACK)
    emptied = records["size"] == 0
    if any(records[name][emptied].any() for name in ("crc32c", "width", "height")):
        yield Fault(index, None, "has places without bytes that are not emptied ones", PACK)
    names = ("offset", "size", "width", "height")
    try:
        rows = _rows(data, ["sha256", *names])
        columns = {name: rows[name].fill_null(0).to_numpy() for name in names}
        hashed = rows["sha256"].is_valid().to_numpy()
    except (pa.ArrowException, KeyError, OSError) as error:
        yield Fault(table, None, f"is not a Parquet file of samples: {str(error).splitlines()[0]}", PACK)
        return
    if rows.num_rows != len(records):
        yield Fault(table, None, f"has {rows.num_rows} rows, {len(records)} are right", PACK)
        return
    for name in names:
        if differ := int((columns[name] != records[name]).sum()):
            yield Fault(table, None, f"its column {name} differs from {index} in {differ} places", PACK)
    if (hashed & emptied).any():
        yield Fault(table, None, "still has the sha256 of samples whose places are empty", "make compact")


def _rows(data: bytes, columns: list[str]) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=columns, use_threads=False)


def _images(part: Part) -> tuple[int, tuple[Fault, ...]]:
    """What a whole tar tells; its index is known to be right."""
    records = np.frombuffer(part.home.get(index_path(part.number)), RECORD)
    rows = _rows(part.home.get(table_path(part.number)), ["key", "sha256"])
    keys, hashes = rows["key"].to_pylist(), rows["sha256"].to_pylist()
    faults = [
        Fault(part.name, keys[place], found, mend)
        for place, piece in _pieces(part, records)
        if place not in part.removed or not records["size"][place]
        for found, mend in _sample(piece, records[place], hashes[place], None if part.elsewhere else keys[place])
    ]
    return part.number, tuple(faults)


def _pieces(part: Part, records: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Each place with its bytes, its header first; a range is read while the one before is being checked.

    Up to the next place's header where the tar is the set's own, so that all of it is read but for its end.
    """
    store, path = part.tar
    starts = records["offset"].astype(np.int64) - HEADER
    ends = np.append(starts[1:], part.bytes)
    if part.elsewhere:
        ends = starts + HEADER + records["size"]
    pieces = list(ranges(starts.tolist(), ends.tolist(), RANGE_BYTES))
    reads = (store.submit(store.read(path, int(starts[first]), int(ends[last - 1]))) for first, last in pieces)
    coming = next(reads, None)
    for first, last in pieces:
        assert coming is not None
        data, coming = coming.result(), next(reads, None)
        for place in range(first, last):
            yield place, data[starts[place] - starts[first] : ends[place] - starts[first]]


def _sample(piece: bytes, record: Any, sha256: str | None, key: str | None) -> Iterator[tuple[str, str]]:
    """What is wrong with a sample, and what to do. piece: from its header on. key: where members are named by it."""
    size = int(record["size"])
    image = piece[HEADER : HEADER + size]
    try:
        member = tarfile.TarInfo.frombuf(piece[:HEADER], "utf-8", "surrogateescape")
        named = key is None or member.name.partition(".")[0] == key
        if member.isreg() != bool(size) or (size and (member.size != size or not named)):
            yield "its tar header is another's", PACK
    except tarfile.HeaderError as error:
        yield f"its tar header is damaged ({error})", PACK
    if not size:
        if piece[HEADER:].strip(b"\0"):
            yield "its place is empty by the index, but not in the tar", "make compact"
    elif google_crc32c.value(image) != record["crc32c"]:
        yield "its CRC32C is not the one of the index", REMOVE
    elif sha256 and hashlib.sha256(image).hexdigest() != sha256:
        yield "its sha256 is not the one of the table", REMOVE
    else:
        yield from _decoded(image, record)


def _decoded(image: bytes, record: Any) -> Iterator[tuple[str, str]]:
    try:
        photo = examine(image, TAKEN)
    except Refused as refused:
        yield f"{refused.reason} ({refused.detail})", REMOVE
        return
    if (photo.width, photo.height) != (record["width"], record["height"]):
        right = f"{record['width']} x {record['height']}"
        yield f"is {photo.width} x {photo.height} pixels, the index says {right}", REMOVE
