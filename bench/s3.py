"""A real S3 server for a benchmark, a shard set in it, and work in processes that begin anew."""

import contextlib
import io
import multiprocessing
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import google_crc32c
import numpy as np

from bench.images import HEIGHT, WIDTH
from data_shards.index import RECORD, Manifest, index_path, shard_path
from data_shards.store import Store
from jobs import local_s3

Pair = tuple[float, float]


@contextlib.contextmanager
def served() -> Iterator[Path]:
    """A folder that goes with the server; the AWS chain of this process and of those it starts leads there."""
    with tempfile.TemporaryDirectory() as folder:
        server = local_s3.start_s3(Path(folder) / "s3")
        try:
            local_s3.activate(server.environment())
            yield Path(folder)
        finally:
            server.stop()


def put_set(
    store: Store, images: Iterator[bytes], counts: Sequence[int], width: int = WIDTH, height: int = HEIGHT
) -> None:
    """A shard set `bench` of the next images, so many in each shard; the index says that all have that size."""
    sizes = []
    for number, count in enumerate(counts):
        buffer, index = io.BytesIO(), np.zeros(count, dtype=RECORD)
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(count):
                data = next(images)
                info = tarfile.TarInfo(f"{number:06d}-{i:06d}.jpg")
                info.size = len(data)
                index[i] = (buffer.tell() + 512, len(data), google_crc32c.value(data), width, height)
                tar.addfile(info, io.BytesIO(data))
        store.put(shard_path(number), buffer.getvalue())
        store.put(index_path(number), index.tobytes())
        sizes.append(buffer.tell())
    Manifest("bench", "bench", sum(counts), tuple(counts), tuple(sizes), settings={}, refused={}).save(store)
    store.close()


def fresh(work: Callable[..., Pair], *arguments: int) -> Pair:
    """What `work` measures, in a process of its own."""
    end, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    found: Pair = end.recv()
    process.join()
    return found


def _send(end: Connection, work: Callable[..., Pair], arguments: tuple[int, ...]) -> None:
    end.send(work(*arguments))
