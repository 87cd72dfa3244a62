"""What the images of two labelled sets show, as numbers that both share."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.removed import Removed
from pipeline.evaluate.tiles import unlabelled

Labelled = tuple[ShardSet, Removed]  # a set, and what was removed of it


@dataclass(frozen=True)
class Labels:
    """bank, held_out: (N,) of each set by id, whole numbers below len(names); -1 for removed images."""

    bank: NDArray[np.int64]
    held_out: NDArray[np.int64]
    names: list[str]

    @property
    def digest(self) -> str:
        """A hash of them all."""
        hashed = blake2b("\n".join(self.names).encode(), digest_size=8)
        for numbers in (self.bank, self.held_out):
            hashed.update(numbers.tobytes())
        return hashed.hexdigest()


def read_labels(bank: Labelled, held_out: Labelled) -> Labels:
    """Classes are the labels of the bank, in the order of the alphabet.

    Raises UserError when an image has no label, when there is but one class, or when the held-out set has others.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    urls = [shards.store.url for shards, _ in (bank, held_out)]
    columns = [_labels(*one) for one in (bank, held_out)]
    for url, column in zip(urls, columns, strict=True):
        if not pc.any(pc.not_equal(column, "")).as_py():
            raise UserError(f"{url}: all its images were removed; an evaluation needs some")
    names = sorted(name for name in pc.unique(columns[0]).to_pylist() if name)
    if len(names) < 2:
        raise UserError(f"{urls[0]}: its images have one label, {names[0]!r}; telling them apart needs two")
    numbers = [pc.fill_null(pc.index_in(column, pa.array(names)), -1) for column in columns]
    strange = pc.and_(pc.equal(numbers[1], -1), pc.not_equal(columns[1], ""))
    unknown = pc.unique(columns[1].filter(strange)).to_pylist()
    if unknown:
        raise UserError(
            f"{urls[1]}: {len(unknown)} of its labels are none of {urls[0]}'s ({unknown[0]!r}), "
            "so nothing could learn them there; pack both from folders of the same names"
        )
    of_bank, of_held_out = (column.to_numpy(zero_copy_only=False).astype(np.int64) for column in numbers)
    return Labels(of_bank, of_held_out, names)


def _labels(shards: ShardSet, removed: Removed) -> Any:
    """(N,) pyarrow strings by id, empty where an image was removed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = pa.concat_tables(shards.tables(["label"]))["label"].combine_chunks()
    gone = np.zeros(len(labels), np.bool_)
    gone[removed.ids.astype(np.int64)] = True
    labels = pc.if_else(pa.array(gone), "", pc.fill_null(labels, ""))
    if missing := int(pc.sum(pc.equal(labels, "")).as_py()) - int(gone.sum()):
        raise unlabelled(shards.store.url, missing, len(labels))
    return labels
