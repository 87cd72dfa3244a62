"""Cutting samples out of a shard's bytes: however these come, and whatever the index says."""

import itertools
import random

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.cutter import CUT_SHORT, EMPTY, Cutter, Damage, Payload, Record

START = 1000


def shard(sizes: list[int], gap: int = 7) -> tuple[bytes, list[Record], list[bytes]]:
    """The bytes from START on, the records of what is in them, and the samples; `gap` bytes between them."""
    rng, data, records, samples = random.Random(0), b"", [], []
    for size in sizes:
        data += rng.randbytes(gap)
        sample = rng.randbytes(size)
        records.append((START + len(data), size, google_crc32c.value(sample), 3, 4))
        samples.append(sample)
        data += sample
    return data, records, samples


def fed(data: bytes, records: list[Record], pieces: list[int], end: int | None = None) -> Cutter:
    """A cutter that got the data in pieces of these sizes, over and over; each is written over afterwards."""
    cutter = Cutter(START, START + len(data) if end is None else end, records)
    at, sizes = 0, itertools.cycle(pieces)
    while at < len(data):
        piece = bytearray(data[at : at + next(sizes)])
        cutter(memoryview(piece))
        at += len(piece)
        piece[:] = b"x" * len(piece)
    return cutter


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12), st.lists(st.integers(1, 200), min_size=1), st.integers(0, 9)
)
def test_samples_are_the_same_in_whatever_pieces_the_bytes_come(sizes: list[int], pieces: list[int], gap: int) -> None:
    data, records, samples = shard(sizes, gap)
    assert fed(data, records, pieces).samples == [Payload(sample, 3, 4) for sample in samples]


def test_a_wrong_byte_damages_its_own_sample_only() -> None:
    data, records, samples = shard([50, 50, 50])
    wrong = bytearray(data)
    wrong[records[1][0] - START + 49] ^= 1
    first, second, third = fed(bytes(wrong), records, [64]).samples
    assert (first, third) == (Payload(samples[0], 3, 4), Payload(samples[2], 3, 4))
    assert isinstance(second, Damage)
    assert second.reason.startswith("its bytes have CRC32C ")


@pytest.mark.parametrize("offset", [0, START - 1, START + 3, START + 10_000])
def test_a_record_that_points_elsewhere_damages_its_own_sample_only(offset: int) -> None:
    data, records, samples = shard([50, 50, 50])
    records[1] = (offset, *records[1][1:])
    first, second, third = fed(data, records, [64]).samples
    assert (first, third) == (Payload(samples[0], 3, 4), Payload(samples[2], 3, 4))
    assert second == Damage("its index record points outside its shard")


def test_a_place_that_was_emptied_is_told_from_a_record_that_is_damaged() -> None:
    data, records, samples = shard([50, 50, 50])
    records[0] = (records[0][0], 0, 0, 0, 0)
    records[1] = (0, 0, 0, 0, 0)
    assert fed(data, records, [64]).samples == [
        EMPTY,
        Damage("its index record is damaged"),
        Payload(samples[2], 3, 4),
    ]


def test_what_has_not_come_is_cut_short() -> None:
    data, records, samples = shard([50, 50, 50])
    end = START + len(data)
    found = fed(data[: records[1][0] - START + 20], records, [64], end).samples
    assert found == [Payload(samples[0], 3, 4), CUT_SHORT, CUT_SHORT]
