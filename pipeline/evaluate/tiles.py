"""Labelled images as they lie in a shard set: encoded bytes, what they show, how large they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.removed import read_removed

MOST = 20_000  # images, of which several views lie in memory
STAMP = "stamp-"  # labels of cut-outs on a plain ground begin so; all others name the photograph that a tile is from


@dataclass(frozen=True)
class Tiles:
    """N encoded images in the order of their ids. sizes: (N, 2), height and width in pixels.

    ids: (N,), in their set, whose url and keys of them are those; all empty when they are of none.
    """

    images: Sequence[bytes]
    labels: Sequence[str]
    sizes: NDArray[np.int64]
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    url: str = ""
    keys: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def photographs(self) -> NDArray[np.int64]:
        """Places of the tiles that were cut from photographs."""
        return np.flatnonzero([not label.startswith(STAMP) for label in self.labels])

    def stamps(self) -> NDArray[np.int64]:
        """Places of the cut-outs."""
        return np.flatnonzero([label.startswith(STAMP) for label in self.labels])


def read_tiles(shards: ShardSet) -> Tiles:
    """All images of a small shard set but the removed ones.

    Raises UserError when it is none, and when some images have no label.
    """
    if shards.manifest.samples > MOST:
        raise UserError(
            f"{shards.store.url}: {shards.manifest.samples:,} images, and the report's table takes {MOST:,} at most; "
            "make evaluate takes any number"
        )
    rows, removed = shards.table(), read_removed(shards)
    ids = np.array([sample for sample in range(rows.num_rows) if sample not in removed], np.int64)
    table = rows.take(ids).to_pydict()
    labels = [label or "" for label in table["label"]]
    if "" in labels:
        raise unlabelled(shards.store.url, labels.count(""), len(labels))
    images: list[bytes] = []
    places = zip(map(shards.locate, ids.tolist()), table["offset"], table["size"], strict=True)
    for shard, group in groupby(places, lambda place: place[0][0]):
        store, path = shards.tar(shard)
        data = store.get(path)
        images += [data[offset : offset + size] for _, offset, size in group]
    sizes = np.column_stack([table["height"], table["width"]]).astype(np.int64)
    return Tiles(images, labels, sizes, ids, shards.store.url, table["key"])


def unlabelled(url: str, missing: int, images: int) -> UserError:
    """What to say of a set that has images without a label."""
    return UserError(
        f"{url}: {missing:,} of {images:,} images have no label, and an evaluation needs one for each; pack it from "
        "folders named by what they show, or evaluate on another set"
    )


def unusable(url: str, key: str, reason: str) -> UserError:
    """What to say of an image of a set that stops an evaluation: figures of what is left would be others."""
    return UserError(
        f"{url}: image {key}: {reason}; make verify DST={url} FULL=1 lists all of the kind, make remove takes them "
        "out, and the same command goes on"
    )
