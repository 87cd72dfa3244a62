"""Reading a run's lines without its folder on the shared disk."""

import itertools
import json
import os
from typing import Any

import pytest

from data_shards.store import Store
from pipeline.journal import Journal, newest_events, newest_rows, read_lines

NUMBERS = itertools.count()


@pytest.fixture
def store() -> Store:
    return Store(f"memory://journal-{os.getpid()}-{next(NUMBERS)}")


def row(step: int) -> dict[str, Any]:
    return {"result": {"step": step}, "run": {}}


def test_the_newest_rows_are_those_of_the_last_segment_of_the_last_attempt(store: Store, tmp_path: Any) -> None:
    assert newest_rows(store, [1, 2]) == []
    for prefix, steps in (("a02", (60, 70)), ("a10", (10, 20)), ("a09", (80,)), ("a10-left-by-a09", (90,))):
        journal = Journal(tmp_path / f"{prefix}.jsonl", store, f"metrics/{prefix}")
        for step in steps:
            journal.append(row(step))
            journal.append(row(step + 1))
            journal.upload()
    assert newest_rows(store, [2, 9, 10, 11]) == [row(20), row(21)]


def test_the_newest_events_are_those_of_the_last_segments_with_how_the_last_attempts_began(
    store: Store, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.journal.TAIL_SEGMENTS", 3)
    assert newest_events(store) == ([], [])
    times = itertools.count(1)
    for prefix, count in (("a09", 4), ("a10", 6), ("a11", 1), ("a11-left-by-a10", 1), ("jobs-7", 2)):
        journal = Journal(tmp_path / f"{prefix}.jsonl", store, f"events/{prefix}")
        for number in range(count):
            journal.append({"time": next(times), "event": f"{prefix} {number}"})
            journal.upload()
    told, attempts = newest_events(store)
    assert attempts == [9, 10, 11]
    assert [event["event"] for event in told] == [
        *("a10 0", "a10 4", "a10 5", "a11 0"),
        *("a11-left-by-a10 0", "jobs-7 0", "jobs-7 1"),
    ]


def test_a_row_that_a_full_disk_has_cut_takes_no_other_with_it(store: Store, tmp_path: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, store, "metrics/a01")
    journal.append(row(1))
    path.write_bytes(path.read_bytes() + b'{"result": {"st')  # of row 2, which the store has got
    journal.append(row(3))
    assert read_lines(path) == [row(1), row(3)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 100])
def test_the_last_of_any_number_of_segments_is_found_without_a_list(
    store: Store, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for number in range(1, count + 1):
        store.put(f"metrics/a01-{number:06d}.jsonl", json.dumps(row(number)).encode() + b"\n")
    asked, exists = list[str](), Store.exists
    monkeypatch.setattr(Store, "exists", lambda self, path: asked.append(path) or exists(self, path))
    monkeypatch.delattr(Store, "list")
    assert newest_rows(store, [1]) == [row(count)]
    assert len(asked) <= 2 * count.bit_length()
