"""Small labelled shard sets of real tiles, for tests."""

from pathlib import Path
from typing import Any

from data_shards.index import ShardSet
from data_shards.pack import PackSettings, Source, pack
from data_shards.store import Store
from tests.photos import write_tiles


def packed(folder: Path, sources: Path | list[Source], **settings: Any) -> ShardSet:
    store = Store(f"file://{folder}")
    pack(sources, store, PackSettings(shard_bytes=40_000, **settings))
    return ShardSet.open(store)


def labelled(folder: Path, count: int, side: int = 72) -> tuple[ShardSet, ShardSet]:
    """So many tiles of six photographs, two of three in the bank and the third held out."""
    files = sorted(write_tiles(folder / "photos", count, side).glob("*/*.jpg"))
    sources = [Source(str(path), name=f"{path.parent.name}/{path.name}", label=path.parent.name) for path in files]
    held_out = sources[::3]
    bank = [source for source in sources if source not in held_out]
    return packed(folder / "bank", bank), packed(folder / "held-out", held_out)
