"""Streaming alone: MB/s of the reader from a real S3 server, beside curl's with as many connections on the same cores.

    python -m bench.stream [--rounds 5] [--connections 16]

Both fetch the same ranges of about 8 MiB of one shard set, by turns, each in a process of its own; the server runs on
the same cores. curl throws the bytes away; the reader checks each sample's CRC32C, keeps the window's order and gives
out batches. Processor time is the client's alone, user and system. Writes stream_vs_curl (the median of the rounds'
ratios), stream_mb_s, curl_mb_s, stream_cpu_s_gb and curl_cpu_s_gb into var/bench.json.
"""

import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import botocore.session

from bench.figures import keep, options
from bench.images import random_images
from bench.s3 import fresh, put_set, served
from data_shards.index import ShardSet, shard_path
from data_shards.order import Order
from data_shards.reader import Reader, ReaderSettings
from data_shards.store import Store

SET = "s3://shards/bench"
SHARDS, SHARD_SAMPLES = 4, 2960  # 4 x 133 MB, as a set of photographs of 45 kB has them
CHUNK_SAMPLES, BATCH = 185, 256
EPOCHS = 5
CORES = {0, 1}


class Turn(NamedTuple):
    """What one fetch of the whole set, EPOCHS times, took."""

    mb_s: float
    cpu_s_gb: float


def main() -> None:
    given = options(__doc__, rounds=5, connections=16)
    if shutil.which("curl") is None:
        sys.exit("bench.stream: curl, the peer, is not installed; as root: apt install curl")
    with served() as folder:
        figures = compare(given.rounds, given.connections, folder)
    keep(figures)
    sys.stdout.write(
        f"on {len(CORES)} cores with {given.connections} connections: the reader {figures['stream_mb_s']} MB/s "
        f"({figures['stream_cpu_s_gb']} CPU s a GB), curl {figures['curl_mb_s']} MB/s "
        f"({figures['curl_cpu_s_gb']} CPU s a GB), ratio {figures['stream_vs_curl']}\n"
    )


def compare(rounds: int, connections: int, folder: Path) -> dict[str, float]:
    """The figures, from `rounds` turns of each after one that warms up."""
    os.sched_setaffinity(0, CORES)
    put_set(Store(SET), random_images(), [SHARD_SAMPLES] * SHARDS)
    urls = curl_config(ShardSet.open(Store(SET)), folder / "curl.txt")
    turns = [(Turn(*fresh(read, connections)), curl(urls, connections)) for _ in range(rounds + 1)][1:]
    reader, peer = zip(*turns, strict=True)
    return {
        "stream_vs_curl": round(statistics.median(r.mb_s / c.mb_s for r, c in turns), 2),
        "stream_mb_s": round(statistics.median(turn.mb_s for turn in reader)),
        "curl_mb_s": round(statistics.median(turn.mb_s for turn in peer)),
        "stream_cpu_s_gb": round(statistics.median(turn.cpu_s_gb for turn in reader), 2),
        "curl_cpu_s_gb": round(statistics.median(turn.cpu_s_gb for turn in peer), 2),
    }


def read(connections: int) -> tuple[float, float]:
    """A fetch by the reader."""
    os.sched_setaffinity(0, CORES)
    shards = ShardSet.open(Store(SET, connections=connections))
    samples = shards.manifest.samples
    order = Order(samples, CHUNK_SAMPLES, 16, 1, BATCH, 0, "bench")
    settings = ReaderSettings(prefetch_bytes=2**29, connections=connections)
    begun, cpu = time.monotonic(), time.process_time()
    with Reader(shards, order, range(1), 0, settings) as reader:
        for step in range(EPOCHS * samples // BATCH):
            reader.batch(step)
        gb = reader.counters["bytes_read"] / 1e9
    return gb * 1e3 / (time.monotonic() - begun), (time.process_time() - cpu) / gb


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
