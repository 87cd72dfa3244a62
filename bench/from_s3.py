"""Images a second from a real S3 server to batches of crops on two cores, beside webdataset with PIL and two workers.

    python -m bench.from_s3 [--rounds 8]

Both read the same shards of 500 x 375 JPEGs and make the crops of bench.loader, batches of 32. The peer is webdataset
as its users run it on S3: signed urls read by `pipe:curl`, shards resampled, a shuffle buffer, PIL, and a DataLoader
with two workers. Each side is tied to the same two cores and they take turns of some batches; who is not at turn is
stopped (SIGSTOP), so that nothing is made ahead meanwhile.

Counted is the processor time of each side with all that it starts, without the server's, as a busy machine changes it
little; the ratio is the median over rounds. The images a second by the clock, the server's work on the same cores
included, stand beside it. Writes loader_s3_vs_webdataset, loader_s3_images_cpu_s and webdataset_s3_images_cpu_s (images
a second of one processor), loader_s3_images_s and webdataset_s3_images_s (by the clock) into var/bench.json.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.figures import keep, options
from bench.images import photographs
from bench.loader import AUGMENT, BATCH, augmented
from bench.s3 import put_set, served
from data_shards.index import ShardSet, shard_path
from data_shards.store import Store

SET = "s3://shards/bench"
SHARDS, SHARD_SAMPLES = 8, 320  # 8 x 15 MB
TURN = 16  # batches
CORES = {0, 1}


def main() -> None:
    given = options(__doc__, rounds=8)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that server and sides end with it
    os.sched_setaffinity(0, CORES)
    with served():
        put_set(Store(SET), cycle(photographs(64)), [SHARD_SAMPLES] * SHARDS)
        figures = compare(given.rounds)
    keep(figures)
    sys.stdout.write(
        f"from S3 to batches, images a processor second: Farseer {figures['loader_s3_images_cpu_s']}, webdataset "
        f"with PIL {figures['webdataset_s3_images_cpu_s']}, ratio {figures['loader_s3_vs_webdataset']}; "
        f"by the clock on two cores {figures['loader_s3_images_s']} and {figures['webdataset_s3_images_s']}\n"
    )


def compare(rounds: int) -> dict[str, float]:
    """The figures, from `rounds` turns of each, after one that opens everything."""
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # they are killed at the end, and leave what it then frees
    context = multiprocessing.get_context("spawn")
    sides: dict[str, tuple[Any, Connection]] = {}
    turns: dict[str, list[tuple[float, float]]] = {}
    for name, batches in (("loader", ours), ("webdataset", webdataset)):
        end, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, batches))
        process.start()
        sides[name], turns[name] = (process, end), []
    try:
        for k in range(rounds + 1):
            for name, (process, end) in sides.items():
                if k:
                    os.killpg(process.pid, signal.SIGCONT)
                end.send(True)
                turns[name].append(end.recv())
                os.killpg(process.pid, signal.SIGSTOP)
    finally:
        for process, _ in sides.values():
            with contextlib.suppress(ProcessLookupError):  # its group is made by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    (wall, cpu), (peer_wall, peer_cpu) = (np.array(turns[name][1:]).T for name in sides)
    images = TURN * BATCH
    return {
        "loader_s3_vs_webdataset": round(statistics.median(peer_cpu / cpu), 2),
        "loader_s3_images_cpu_s": round(images / statistics.median(cpu), 1),
        "webdataset_s3_images_cpu_s": round(images / statistics.median(peer_cpu), 1),
        "loader_s3_images_s": round(images / statistics.median(wall), 1),
        "webdataset_s3_images_s": round(images / statistics.median(peer_wall), 1),
    }


def serve(end: Connection, batches: Callable[[], Iterator[list[Tensor]]]) -> None:
    """A process group of one side: makes a turn's batches when asked; answers with seconds by the clock and at work."""
    os.setpgrp()  # what it starts belongs to it: workers, curl
    os.sched_setaffinity(0, CORES)
    torch.set_num_threads(1)
    made = batches()
    while True:
        end.recv()
        since, worked = time.monotonic(), processor_s()
        for _ in range(TURN):
            assert len(next(made)[0]) == BATCH
        end.send((time.monotonic() - since, processor_s() - worked))


def processor_s() -> float:
    """Processor time of all processes of this group, and of their children that ended, in seconds."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended just now
        if int(fields[2]) == os.getpid():
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def ours() -> Iterator[list[Tensor]]:
    from data_shards.order import Order
    from data_shards.reader import Reader, ReaderSettings
    from pipeline.loader import Loader, LoaderSettings

    shards = ShardSet.open(Store(SET))
    order = Order(shards.manifest.samples, 160, 8, 1, BATCH, 0, "bench")
    reader = Reader(shards, order, range(1), 0, ReaderSettings(prefetch_bytes=2**28))
    for batch in Loader(reader, AUGMENT, 0, 0, 10**9, LoaderSettings(device="cpu", threads=2)):
        yield batch.crops


def webdataset() -> Iterator[list[Tensor]]:
    import webdataset as wds

    client = botocore.session.Session().create_client("s3")
    keys = [f"bench/{shard_path(number)}" for number in range(SHARDS)]
    urls = [client.generate_presigned_url("get_object", Params={"Bucket": "shards", "Key": key}) for key in keys]
    pipes = [f"pipe:curl --silent --fail '{url}'" for url in urls]
    data = wds.WebDataset(pipes, resampled=True, shardshuffle=False).shuffle(256).decode("pil").to_tuple("jpg")
    data = data.map(crops).batched(BATCH, collation_fn=stacked)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    while True:
        yield from loader


def crops(sample: tuple[Image.Image]) -> list[Tensor]:
    rng = random.Random(torch.randint(2**31, ()).item())
    return [augmented(rng, sample[0], crop.size, crop.scale) for crop in AUGMENT.crops for _ in range(crop.count)]


def stacked(samples: list[Any]) -> list[Tensor]:
    return [torch.stack(crop) for crop in zip(*samples, strict=True)]


if __name__ == "__main__":
    main()
