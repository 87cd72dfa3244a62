"""A billion samples in 100,000 shards: what opening the set, a step's ids and a resume cost, from a real S3 server.

    python -m bench.order

Each figure is the median of several fresh processes. Opening is everything from the store's url to a set that gives
out ids, after the imports; memory is the growth of the resident set meanwhile. A first batch is from making the reader
at that step to having the batch, of a set of 128 MB. Writes open_s_1e9, open_mb_1e9, order_ms_1e9_512,
order_ms_random_step, first_batch_s_step_100 and first_batch_s_step_1e6 into var/bench.json.
"""

import os
import random
import statistics
import sys
import time
from pathlib import Path

from bench.figures import keep
from bench.images import random_images
from bench.s3 import fresh, put_set, served
from bench.stream import CHUNK_SAMPLES, SHARD_SAMPLES
from data_shards.index import Manifest, ShardSet
from data_shards.order import Order
from data_shards.reader import Reader, ReaderSettings
from data_shards.store import Store

SAMPLES, SHARDS, LANES, BATCH = 10**9, 100_000, 512, 8192
HUGE, SMALL = "s3://shards/huge", "s3://shards/small"
TURNS = 5


def main() -> None:
    with served():
        put_huge_manifest()
        put_set(Store(SMALL), random_images(), [SHARD_SAMPLES])
        opened = [fresh(opening) for _ in range(TURNS)]
        ids = [fresh(steps) for _ in range(TURNS)]
        resumed = [(fresh(first_batch, 100)[0], fresh(first_batch, 10**6)[0]) for _ in range(TURNS)]
    figures = {
        "open_s_1e9": round(statistics.median(seconds for seconds, _ in opened), 2),
        "open_mb_1e9": round(statistics.median(mb for _, mb in opened), 1),
        "order_ms_1e9_512": round(statistics.median(ms for ms, _ in ids), 2),
        "order_ms_random_step": round(statistics.median(ms for _, ms in ids), 2),
        "first_batch_s_step_100": round(statistics.median(early for early, _ in resumed), 2),
        "first_batch_s_step_1e6": round(statistics.median(late for _, late in resumed), 2),
    }
    keep(figures)
    sys.stdout.write(
        f"10^9 samples: opened in {figures['open_s_1e9']} s and {figures['open_mb_1e9']} MB; the ids of the next step "
        f"{figures['order_ms_1e9_512']} ms, of a random one {figures['order_ms_random_step']} ms; first batch at step "
        f"100 after {figures['first_batch_s_step_100']} s, at step 10^6 after {figures['first_batch_s_step_1e6']} s\n"
    )


def put_huge_manifest() -> None:
    rng = random.Random(0)
    counts = [SAMPLES // SHARDS] * SHARDS
    for k in range(0, SHARDS - 1, 2):  # no two shards alike
        moved = rng.randrange(100)
        counts[k] -= moved
        counts[k + 1] += moved
    sizes = tuple(count * rng.randint(45_000, 55_000) for count in counts)
    Manifest("huge", "huge", SAMPLES, tuple(counts), sizes, settings={}, refused={}).save(Store(HUGE))


def opening() -> tuple[float, float]:
    """Seconds and MB."""
    import s3fs  # noqa: F401  as the store does at its first use

    before, begun = resident(), time.monotonic()
    shards = ShardSet.open(Store(HUGE))
    shards.spans(SAMPLES // 2, 200)
    return time.monotonic() - begun, (resident() - before) / 1e6


def steps() -> tuple[float, float]:
    """Milliseconds for the ids of all lanes: of the next step, and of a random one."""
    order = Order(SAMPLES, 164, 64, LANES, BATCH, 0, "huge")
    order.batch(0)
    begun = time.perf_counter()
    for step in range(1, 401):
        order.batch(step)
    in_order = (time.perf_counter() - begun) / 400
    rng = random.Random(0)
    begun = time.perf_counter()
    for _ in range(50):
        order.batch(rng.randrange(10**6))
    return in_order * 1e3, (time.perf_counter() - begun) / 50 * 1e3


def first_batch(step: int) -> tuple[float, float]:
    """Seconds, and bytes that were read by then."""
    shards = ShardSet.open(Store(SMALL))
    order = Order(shards.manifest.samples, CHUNK_SAMPLES, 4, 2, 256, 0, "small")
    begun = time.monotonic()
    with Reader(shards, order, range(2), step, ReaderSettings(prefetch_bytes=2**28)) as reader:
        reader.batch(step)
        return time.monotonic() - begun, reader.counters["bytes_read"]


def resident() -> int:
    """Bytes of memory that the process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
