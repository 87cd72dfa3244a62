"""The reader against a real S3 server; what happens on the way there is in test_faults_s3.py."""

import random
from typing import Any

import pytest

from bench.s3 import put_set
from data_shards.index import ShardSet, shard_path
from data_shards.order import Order
from data_shards.reader import Reader, ReaderSettings, Sample
from data_shards.store import Store

COUNTS = (60, 60, 32, 8)
ORDER = Order(sum(COUNTS), 5, 4, 4, 16, 7, "layout")
SETTINGS = ReaderSettings(prefetch_bytes=64 * 2**20, retry_seconds=20.0, max_bad_fraction=1.0)
STEPS = range(15)


@pytest.fixture(scope="module")
def samples() -> list[bytes]:
    rng = random.Random(3)
    # read alone, none reaches the byte that the proxy makes wrong: three wrong ones in a row would be a bad sample
    return [rng.randbytes(rng.randint(2_000, 28_000)) for _ in range(sum(COUNTS))]


@pytest.fixture
def url(s3: Any, samples: list[bytes]) -> str:
    """A set of four shards in a bucket; returns where."""
    store = Store(s3.bucket("shards"))
    put_set(store, iter(samples), COUNTS, 64, 48)
    return store.url


def opened(url: str, retry_seconds: float) -> ShardSet:
    return ShardSet.open(Store(url, retry_seconds=retry_seconds))


def reader_of(
    url: str, start: int = 0, retry_seconds: float = 20.0, shards: ShardSet | None = None, **changes: Any
) -> Reader:
    settings = SETTINGS.model_copy(update={"retry_seconds": retry_seconds, **changes})
    return Reader(shards or opened(url, retry_seconds), ORDER, range(4), start, settings)


def check(batch: list[Sample], step: int, samples: list[bytes]) -> None:
    assert [sample.id for sample in batch] == ORDER.batch(step).reshape(-1).tolist()
    assert all(sample.data == samples[sample.id] and (sample.width, sample.height) == (64, 48) for sample in batch)


@pytest.mark.parametrize("start", [0, 1_000_003])
def test_batches_from_s3_are_those_of_the_order(url: str, samples: list[bytes], start: int) -> None:
    with reader_of(url, start) as reader:
        for step in STEPS:
            check(reader.batch(start + step), start + step, samples)
        assert reader.bad == []
        assert reader.counters["retries"] == 0


def test_a_flipped_bit_a_cut_shard_and_a_lost_one_are_replaced_and_told_apart(url: str, samples: list[bytes]) -> None:
    store = Store(url)
    whole = store.get(shard_path(0))
    at = whole.index(samples[7])
    store.put(shard_path(0), whole[: at + 9] + bytes([whole[at + 9] ^ 4]) + whole[at + 10 :])
    store.put(shard_path(1), store.get(shard_path(1))[:-150_000])
    store.delete([shard_path(3)])
    with reader_of(url, start=20) as reader:
        for step in range(20, 35):
            assert all(sample.data == samples[sample.id] for sample in reader.batch(step))
        reasons = {bad.id: bad.reason for bad in reader.bad}
    assert "CRC32C" in reasons[7]
    assert all("missing" in reason for sample, reason in reasons.items() if sample >= 152)
    cut = {sample for sample, reason in reasons.items() if "cut short" in reason}
    assert cut
    assert cut == set(range(min(cut), 120)) & set(reasons)
