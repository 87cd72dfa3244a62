"""Streaming alone: MB/s of the reader from a real S3 server, beside curl's with as many connections on the same cores.

    python -m bench.stream [--rounds 5] [--connections 16]

Both fetch the same ranges of about 8 MiB of one shard set, by turns, each in a process of its own; the server runs on
the same cores. curl throws the bytes away; the reader checks each sample's CRC32C, keeps the window's order and gives
out batches. Processor time is the client's alone, user and system. Writes stream_vs_curl (the median of the rounds'
ratios), stream_mb_s, curl_mb_s, stream_cpu_s_gb and curl_cpu_s_gb into var/bench.json.
"""

import argparse
import io
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import botocore.session
import google_crc32c
import numpy as np

from bench.figures import keep
from data_shards.index import RECORD, Manifest, ShardSet, index_path, shard_path
from data_shards.order import Order
from data_shards.reader import Reader, ReaderSettings
from data_shards.store import Store
from jobs import local_s3

SHARDS, SHARD_SAMPLES = 4, 2960  # 4 x 133 MB, as a set of photographs of 45 kB has them
CHUNK_SAMPLES, BATCH = 185, 256
EPOCHS = 5
CORES = {0, 1}


class Turn(NamedTuple):
    """What one fetch of the whole set, EPOCHS times, took."""

    mb_s: float
    cpu_s_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=16)
    given = parser.parse_args()
    if shutil.which("curl") is None:
        sys.exit("bench.stream: curl, the peer, is not installed; as root: apt install curl")
    with tempfile.TemporaryDirectory() as folder:
        server = local_s3.start_s3(Path(folder))
        try:
            local_s3.activate(server.environment())
            figures = compare(given.rounds, given.connections, Path(folder))
        finally:
            server.stop()
    keep(figures)
    sys.stdout.write(
        f"on {len(CORES)} cores with {given.connections} connections: the reader {figures['stream_mb_s']} MB/s "
        f"({figures['stream_cpu_s_gb']} CPU s a GB), curl {figures['curl_mb_s']} MB/s "
        f"({figures['curl_cpu_s_gb']} CPU s a GB), ratio {figures['stream_vs_curl']}\n"
    )


def compare(rounds: int, connections: int, folder: Path) -> dict[str, float]:
    """The figures, from `rounds` turns of each after one that warms up."""
    os.sched_setaffinity(0, CORES)
    shards = build(Store("s3://shards/bench"))
    urls = curl_config(shards, folder / "curl.txt")
    turns = [(ours(connections), curl(urls, connections)) for _ in range(rounds + 1)][1:]
    reader, peer = zip(*turns, strict=True)
    return {
        "stream_vs_curl": round(statistics.median(r.mb_s / c.mb_s for r, c in turns), 2),
        "stream_mb_s": round(statistics.median(turn.mb_s for turn in reader)),
        "curl_mb_s": round(statistics.median(turn.mb_s for turn in peer)),
        "stream_cpu_s_gb": round(statistics.median(turn.cpu_s_gb for turn in reader), 2),
        "curl_cpu_s_gb": round(statistics.median(turn.cpu_s_gb for turn in peer), 2),
    }


def build(store: Store, shards: int = SHARDS) -> ShardSet:
    """A shard set of random bytes in the sizes of photographs."""
    rng, sizes = random.Random(0), []
    for number in range(shards):
        buffer, index = io.BytesIO(), np.zeros(SHARD_SAMPLES, dtype=RECORD)
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(SHARD_SAMPLES):
                info = tarfile.TarInfo(f"{number:06d}-{i:06d}.jpg")
                info.size = rng.randint(20_000, 70_000)
                data = rng.randbytes(info.size)
                index[i] = (buffer.tell() + 512, len(data), google_crc32c.value(data), 500, 375)
                tar.addfile(info, io.BytesIO(data))
        store.put(shard_path(number), buffer.getvalue())
        store.put(index_path(number), index.tobytes())
        sizes.append(buffer.tell())
    samples = (SHARD_SAMPLES,) * shards
    Manifest("bench", "bench", sum(samples), samples, tuple(sizes), settings={}, refused={}).save(store)
    store.close()
    return ShardSet(store, Manifest.load(store))


def ours(connections: int) -> Turn:
    """A fetch by the reader, in a fresh process."""
    end, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=read, args=(theirs, connections), daemon=True)
    process.start()
    turn = end.recv()
    process.join()
    return Turn(*turn)


def read(end: Connection, connections: int) -> None:
    os.sched_setaffinity(0, CORES)
    shards = ShardSet.open(Store("s3://shards/bench", connections=connections))
    samples = shards.manifest.samples
    order = Order(samples, CHUNK_SAMPLES, 16, 1, BATCH, 0, "bench")
    settings = ReaderSettings(prefetch_bytes=2**29, connections=connections)
    begun, cpu = time.monotonic(), time.process_time()
    with Reader(shards, order, range(1), 0, settings) as reader:
        for step in range(EPOCHS * samples // BATCH):
            reader.batch(step)
        bytes_read = reader.counters["bytes_read"]
    seconds, cpu_s = time.monotonic() - begun, time.process_time() - cpu
    end.send((bytes_read / 1e6 / seconds, cpu_s / (bytes_read / 1e9)))


def curl_config(shards: ShardSet, path: Path) -> Path:
    """The same chunks in one order, as signed urls with ranges for curl."""
    client = botocore.session.Session().create_client("s3")
    lines = []
    for first in range(0, shards.manifest.samples - CHUNK_SAMPLES + 1, CHUNK_SAMPLES):
        for span in shards.spans(first, CHUNK_SAMPLES):
            start = shards.manifest.shard_bytes[span.shard] * span.first // SHARD_SAMPLES
            size = shards.manifest.shard_bytes[span.shard] * span.count // SHARD_SAMPLES
            where = {"Bucket": "shards", "Key": f"bench/{shard_path(span.shard)}"}
            url = client.generate_presigned_url("get_object", Params=where)
            span_bytes = f"range = {start}-{start + size - 1}"
            lines.append(f'url = "{url}"\n{span_bytes}\noutput = /dev/null\nwrite-out = "%{{size_download}} "\n')
    order = random.Random(0)
    path.write_text("next\n".join(line for _ in range(EPOCHS) for line in order.sample(lines, len(lines))))
    return path


def curl(config: Path, connections: int) -> Turn:
    """A fetch by curl."""
    options = ["--parallel", "--parallel-immediate", "--parallel-max", str(connections), "--fail", "--silent"]
    command = ["curl", *options, "--config", str(config)]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    gb = sum(map(int, done.stdout.split())) / 1e9
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Turn(gb * 1e3 / seconds, cpu_s / gb)


if __name__ == "__main__":
    main()
