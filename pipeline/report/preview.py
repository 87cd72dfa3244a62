"""What is in a shard set, on one page: pictures sampled evenly, and how large, long, heavy and of what kind they are.

Costs as much for a billion images as for a million: rows of TABLES + SHOWN shards at most and SHOWN images are read.
"""

import io
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data_shards.errors import one_line
from data_shards.index import Manifest, ShardSet, table_path
from data_shards.merge import Refusal, read_refused
from data_shards.removed import Removed, read_removed
from data_shards.store import Store

SHOWN = 120  # pictures
TABLES = 200  # shards whose rows are read for the charts
REFUSED = 40  # are listed
THREADS = 16
BOX = (400, 176)  # pixels: twice what the page shows, for sharp screens

COLUMNS = ["key", "offset", "size", "width", "height", "format", "label", "source"]


@dataclass(frozen=True)
class Shown:
    """A sampled image; size: in bytes. Its picture is WebP, empty when it cannot be had, and `why` says so."""

    key: str
    source: str | None
    label: str | None
    format: str
    width: int
    height: int
    size: int
    picture: bytes
    why: str = ""


@dataclass
class Sampled:
    """Rows of some shards: sides in pixels and bytes of each image, counts of formats and labels."""

    shards: int = 0
    width: list[NDArray[Any]] = field(default_factory=list)
    height: list[NDArray[Any]] = field(default_factory=list)
    size: list[NDArray[Any]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, rows: pa.Table) -> None:
        """Those that are not emptied."""
        rows = rows.filter(pc.greater(rows["size"], 0))
        self.shards += 1
        for name in ("width", "height", "size"):
            getattr(self, name).append(rows[name].to_numpy())
        for name, counter in (("format", self.formats), ("label", self.labels)):
            counter.update({one["values"]: one["counts"] for one in rows[name].drop_null().value_counts().to_pylist()})

    def column(self, name: str) -> NDArray[np.float64]:
        return np.concatenate(getattr(self, name)).astype(np.float64)


@dataclass(frozen=True)
class Preview:
    """What the page shows. removed: how many images the removal lists name. refused: the first of them."""

    url: str
    manifest: Manifest
    sampled: Sampled
    shown: list[Shown]
    refused: list[Refusal]
    removed: int
    time: float


def gather(store: Store) -> Preview:
    """Read what a page needs of a set. Raises UserError when there is none, or a table is damaged."""
    shards = ShardSet.open(store)
    manifest = shards.manifest
    removed = read_removed(shards)
    wanted: dict[int, list[int]] = {shard: [] for shard in _evenly(len(manifest.shard_samples), TABLES)}
    for sample in _evenly(manifest.samples, SHOWN):
        shard, place = shards.locate(sample)
        wanted.setdefault(shard, []).append(place)
    sampled, shown = Sampled(), []
    with ThreadPoolExecutor(THREADS) as threads:
        for rows, found in threads.map(lambda one: _shard(shards, removed, *one), sorted(wanted.items())):
            sampled.add(rows)
            shown += found
    refused = list(islice(read_refused(store), REFUSED))
    return Preview(store.url, manifest, sampled, shown, refused, len(removed), time.time())


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of 0 to count - 1, each in the middle of its share."""
    taken = min(count, most)
    return [(2 * n + 1) * count // (2 * taken) for n in range(taken)]


def _shard(shards: ShardSet, removed: Removed, shard: int, places: list[int]) -> tuple[pa.Table, list[Shown]]:
    """A shard's rows but their keys and sources, and the images at these places or next to them."""
    rows = shards.parsed(path := table_path(shard), shards.store.get(path), COLUMNS)
    first = int(shards.starts[shard])
    chosen = dict(filter(None, (_present(rows, removed, first, place) for place in places)))
    found = [_shown(shards, shard, row) for row in chosen.values()]
    return rows.select(["size", "width", "height", "format", "label"]), found


def _present(rows: pa.Table, removed: Removed, first: int, place: int) -> tuple[int, dict[str, Any]] | None:
    """Where an image may be shown, that place or the next, and the row there. first: the shard's first id."""
    for at in [*range(place, len(rows)), *range(place)]:
        if rows["size"][at].as_py() and first + at not in removed:
            row: dict[str, Any] = rows.slice(at, 1).to_pylist()[0]
            return at, row
    return None


def _shown(shards: ShardSet, shard: int, row: dict[str, Any]) -> Shown:
    store, path = shards.tar(shard)
    picture, why = b"", ""
    try:
        picture = thumbnail(store.get(path, row["offset"], row["offset"] + row["size"]))
    except UnidentifiedImageError:
        why = "no image is at its place in the shard"
    except Exception as error:  # noqa: BLE001  # a page is still worth having, and it says which image is damaged
        why = one_line(error)[:200]
    return Shown(
        row["key"], row["source"], row["label"], row["format"], row["width"], row["height"], row["size"], picture, why
    )


def thumbnail(image: bytes) -> bytes:
    """The whole image within BOX, upright, as WebP; never larger than it is."""
    with Image.open(io.BytesIO(image)) as opened:
        opened.draft("RGB", (2 * BOX[0], 2 * BOX[1]))
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    upright.thumbnail(BOX, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    upright.save(out, "WEBP", quality=78)
    return out.getvalue()
