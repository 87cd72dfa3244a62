"""What a shard set consists of: its manifest, and for each shard the place and the checksum of every sample.

    DST/MANIFEST.json             put last: with it, the set exists; the newest version
    DST/manifests/<layout>.json   each version; appending makes one, and a run keeps the one that it began with
    DST/shards/3f/000012.tar      the samples; 3f is a hash of the number, which spreads requests over prefixes
    DST/shards/3f/000012.idx      RECORDs, one a sample in the order of the tar: a small range finds any chunk
    DST/shards/3f/000012.parquet  one row a sample, for people and DuckDB
    DST/refused/000012.jsonl      sources that were not taken, and why; of the group of shards that begins there
    DST/removed/000001.txt        keys of samples that must not be shown any more
    DST/plans/1/                  how the packing was laid out, and how far it is

A sample's id is its rank over all shards in their order. Shards that are indexed where they lie have no tar here.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_shards.errors import UserError, one_line
from data_shards.store import NotFound, Store, split

FORMAT = 2
MANIFEST = "MANIFEST.json"
REFUSED = "refused"
TABLES_AHEAD = 16

Ints = NDArray[np.int64]

# Bytes of the image itself within the tar, their CRC32C, and pixels as seen (after EXIF orientation).
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32c", "<u4"), ("width", "<u4"), ("height", "<u4")])


def shard_path(number: int) -> str:
    """Where a shard's tar lies within its set; index and table lie beside it, with .idx and .parquet."""
    prefix = blake2b(b"%d" % number, digest_size=1).hexdigest()
    return f"shards/{prefix}/{number:06d}.tar"


def index_path(number: int) -> str:
    """Where a shard's RECORDs lie within its set."""
    return shard_path(number).removesuffix(".tar") + ".idx"


def table_path(number: int) -> str:
    """Where a shard's Parquet rows lie within its set."""
    return shard_path(number).removesuffix(".tar") + ".parquet"


def dali_path(number: int) -> str:
    """Where a shard's index for DALI's own reader lies within its set, when one was asked for."""
    return shard_path(number).removesuffix(".tar") + ".dali.idx"


def shard_digest(sha256: Iterable[bytes]) -> str:
    """What a shard holds in one number: the hash of its samples' sha256 in their order (hex)."""
    return blake2b(b"".join(sha256), digest_size=16).hexdigest()


def manifest_path(layout_id: str) -> str:
    """Where the version of the manifest with that layout lies within its set."""
    return f"manifests/{layout_id}.json"


def sample_key(shard: int, place: int) -> str:
    """A sample's name within its set: unique, without a dot, and it says where the sample lies."""
    return f"{shard:06d}-{place:06d}"


@dataclass(frozen=True)
class Manifest:
    """What a set holds.

    layout_id: of the packing plan (which sources at which places), so it stays when contents are removed or repaired.
    contents_id: hash of the shards' digests (`shard_digest`) in their order.
    refused: how many sources were not taken, by reason.
    tars: urls of shards that lie elsewhere, one a shard; empty when they lie in the set's own folder.
    """

    layout_id: str
    contents_id: str
    samples: int
    shard_samples: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    settings: dict[str, Any]
    refused: dict[str, int]
    tars: tuple[str, ...] = ()

    @classmethod
    def load(cls, store: Store, layout_id: str | None = None) -> "Manifest":
        """The newest version, or the one with that layout; one request.

        Raises UserError when there is no set, no such version, or none that can be read.
        """
        path = manifest_path(layout_id) if layout_id else MANIFEST
        try:
            found = json.loads(store.get(path))
            if found.pop("format") != FORMAT:
                raise UserError(f"{store.url}: {path} is of another version of this program; pack the set again")
            for name in ("shard_samples", "shard_bytes"):
                found[name] = tuple(map(int, found[name]))
            manifest = cls(**{**found, "tars": tuple(map(str, found["tars"]))})
        except NotFound:
            if layout_id:
                raise UserError(f"{store.url}: no version of this set has the layout {layout_id} ({path})") from None
            raise UserError(
                f"{store.url}: no {MANIFEST}, so no shard set; make shards SRC=... DST={store.url}"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{store.url}: {path} is damaged ({error}); pack the set again") from error
        manifest._check(store.url)
        return manifest

    def save(self, store: Store, *, create_only: bool = True) -> None:
        """Put this version under its layout, then as the newest. Raises AlreadyExists when there is a newest one."""
        data = json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":")).encode()
        store.put(manifest_path(self.layout_id), data)
        store.put(MANIFEST, data, create_only=create_only)

    def _check(self, url: str) -> None:
        if self.samples == 0:
            raise UserError(f"{url}: the shard set is empty; make shards SRC=... DST={url}")
        shards = len(self.shard_samples)
        if sum(self.shard_samples) != self.samples or {shards} != {len(self.shard_bytes), len(self.tars) or shards}:
            raise UserError(
                f"{url}: {MANIFEST} is damaged: {self.samples} samples, {sum(self.shard_samples)} in its shards; "
                f"pack the set again"
            )


@dataclass(frozen=True, slots=True)
class Span:
    """Samples that lie one after another in a shard: `count` from the place `first` on."""

    shard: int
    first: int
    count: int


class ShardSet:
    """A set in a store, addressed by sample ids 0..N-1. Costs no request and no memory beyond the manifest's."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._elsewhere: dict[str, Store] = {}
        self.starts = np.cumsum([0, *manifest.shard_samples], dtype=np.int64)  # the first id of each shard, then N

    @classmethod
    def open(cls, store: Store, layout_id: str | None = None) -> "ShardSet":
        """The set in the store's folder, by one request: the newest version, or the one with that layout.

        Raises UserError when there is none.
        """
        return cls(store, Manifest.load(store, layout_id))

    @property
    def sets(self) -> tuple["ShardSet", ...]:
        """The sets that it is made of: itself, but of a mixture (data_shards.mixture) the several ones."""
        return (self,)

    @property
    def mean_bytes(self) -> float:
        """Bytes that are read for a sample, on average."""
        return sum(self.manifest.shard_bytes) / self.manifest.samples

    def index(self, shard: int) -> tuple[Store, str]:
        """The store of a shard's RECORDs, on the event loop of the set's own, and the path in it."""
        return self.store, index_path(shard)

    def tar(self, shard: int) -> tuple[Store, str]:
        """The store of a shard's tar, on the event loop of the set's own, and the path in it."""
        if not self.manifest.tars:
            return self.store, shard_path(shard)
        root, path = split(self.manifest.tars[shard])
        if root not in self._elsewhere:
            self._elsewhere[root] = self.store.beside(root)
        return self._elsewhere[root], path

    def shard_name(self, shard: int) -> str:
        """What to call a shard in words: its path in the set, or its url when it lies elsewhere."""
        return self.manifest.tars[shard] if self.manifest.tars else shard_path(shard)

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard and place in it of a sample id."""
        if not 0 <= sample < self.manifest.samples:
            raise ValueError(f"sample {sample} of a set of {self.manifest.samples}")
        shard, place = self.places(sample)
        return int(shard), int(place)

    def places(self, samples: ArrayLike) -> tuple[Ints, Ints]:
        """Shards and places in them of sample ids, which are not checked."""
        ids = np.asarray(samples, dtype=np.int64)
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        return shards, ids - self.starts[shards]

    def spans(self, first_id: int, count: int) -> list[Span]:
        """Where `count` ids from `first_id` on lie, in their order; after the last id comes the first."""
        found = []
        sample = first_id % self.manifest.samples
        while count > 0:
            shard, place = self.locate(sample)
            taken = min(count, self.manifest.shard_samples[shard] - place)
            found.append(Span(shard, place, taken))
            count -= taken
            sample = (sample + taken) % self.manifest.samples
        return found

    def table(self) -> Any:
        """The Parquet rows of all samples in the order of their ids, as a pyarrow Table. For small sets.

        A column that some shards lack, as of what was appended, is null there.
        """
        import pyarrow as pa

        return pa.concat_tables(self.tables(), promote_options="permissive")

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The same a shard at a time, a few of them asked for ahead; columns that a table lacks are left out.

        Raises UserError when one is damaged.
        """
        paths = list(map(table_path, range(len(self.manifest.shard_samples))))
        reads = (self.store.submit(self.store.read(path)) for path in paths)
        ahead = deque(islice(reads, TABLES_AHEAD))
        for path in paths:
            data = ahead.popleft().result()
            ahead.extend(islice(reads, 1))
            yield self.parsed(path, data, columns)

    def parsed(self, path: str, data: bytes, columns: Sequence[str] | None = None) -> Any:
        """The rows of a table, which lies there. Raises UserError when it is damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            url = self.store.url
            raise UserError(f"{url}/{path}: is damaged ({one_line(error)}); make verify DST={url}") from error
