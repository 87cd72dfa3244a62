"""Several shard sets as one, for a run that mixes them by weight.

The ids of a set follow those of the set before it, and so do its shards; consecutive ids wrap around inside their set.
All that is read goes over the event loop of the first set's store.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet, Span
from data_shards.order import Part
from data_shards.store import Store


class Mixture(ShardSet):
    """Sets with shares of the samples, in whole numbers (data_shards.shares); their stores are on one event loop."""

    def __init__(self, sets: Sequence[ShardSet], shares: Sequence[int]) -> None:
        self._sets, self.shares = tuple(sets), tuple(shares)
        self._first_shards = np.cumsum([0, *(len(one.manifest.shard_samples) for one in sets)], dtype=np.int64)
        self._first_ids = np.cumsum([0, *(one.manifest.samples for one in sets)], dtype=np.int64)
        super().__init__(sets[0].store, _joined(sets, parts_of(sets, shares)))

    @property
    def sets(self) -> tuple[ShardSet, ...]:
        return self._sets

    @property
    def mean_bytes(self) -> float:
        """Of the samples as they come: by the sets' shares, not by their sizes."""
        means = (one.mean_bytes * share for one, share in zip(self._sets, self.shares, strict=True))
        return sum(means) / sum(self.shares)

    def index(self, shard: int) -> tuple[Store, str]:
        which, own = self._own(shard)
        return self._sets[which].index(own)

    def tar(self, shard: int) -> tuple[Store, str]:
        which, own = self._own(shard)
        return self._sets[which].tar(own)

    def shard_name(self, shard: int) -> str:
        which, own = self._own(shard)
        name = self._sets[which].shard_name(own)
        return name if "://" in name else f"{self._sets[which].store.url}/{name}"

    def spans(self, first_id: int, count: int) -> list[Span]:
        which = int(np.searchsorted(self._first_ids, first_id, side="right")) - 1
        own = self._sets[which].spans(first_id - int(self._first_ids[which]), count)
        return [replace(span, shard=int(self._first_shards[which]) + span.shard) for span in own]

    def _own(self, shard: int) -> tuple[int, int]:
        """Of a shard: which set's it is, and its number there."""
        which = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        return which, shard - int(self._first_shards[which])


def mixed(sets: Sequence[ShardSet], shares: Sequence[int]) -> ShardSet:
    """The sets as one; a single one as it is. Raises UserError when two are the same."""
    if len(sets) == 1:
        return sets[0]
    layouts = [one.manifest.layout_id for one in sets]
    for n, layout in enumerate(layouts):
        if layout in layouts[:n]:
            raise UserError(
                f"data.sources: {sets[layouts.index(layout)].store.url} and {sets[n].store.url} are the same set "
                f"(layout {layout}); give it once, with the sum of the weights"
            )
    return Mixture(sets, shares)


def parts_of(sets: Sequence[ShardSet], shares: Sequence[int]) -> tuple[Part, ...]:
    """The sets as the order knows them."""
    pairs = zip(sets, shares, strict=True)
    return tuple(Part(one.manifest.samples, one.manifest.layout_id, share, one.store.url) for one, share in pairs)


def _joined(sets: Sequence[ShardSet], parts: Sequence[Part]) -> Manifest:
    """What a single set with all their shards would say of itself; its layout is that of the parts and their shares."""
    manifests = [one.manifest for one in sets]
    identity = [[part.layout_id, part.samples, part.share] for part in parts]
    return Manifest(
        layout_id=blake2b(json.dumps(["mixture", *identity]).encode(), digest_size=16).hexdigest(),
        contents_id=blake2b(json.dumps([one.contents_id for one in manifests]).encode(), digest_size=16).hexdigest(),
        samples=sum(one.samples for one in manifests),
        shard_samples=tuple(count for one in manifests for count in one.shard_samples),
        shard_bytes=tuple(size for one in manifests for size in one.shard_bytes),
        settings={},
        refused={},
    )
