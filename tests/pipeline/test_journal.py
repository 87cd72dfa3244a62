"""Reading a run's lines without its folder on the shared disk."""

import itertools
import os
from typing import Any

import pytest

from data_shards.store import Store
from pipeline.journal import Journal, newest_rows

NUMBERS = itertools.count()


@pytest.fixture
def store() -> Store:
    return Store(f"memory://journal-{os.getpid()}-{next(NUMBERS)}")


def row(step: int) -> dict[str, Any]:
    return {"result": {"step": step}, "run": {}}


def test_the_newest_rows_are_those_of_the_last_segment_of_the_last_attempt(store: Store, tmp_path: Any) -> None:
    assert newest_rows(store) == []
    for prefix, steps in (("a02", (60, 70)), ("a10", (10, 20)), ("a09", (80,)), ("a10-left-by-a09", (90,))):
        journal = Journal(tmp_path / f"{prefix}.jsonl", store, f"metrics/{prefix}")
        for step in steps:
            journal.append(row(step))
            journal.append(row(step + 1))
            journal.upload()
    assert newest_rows(store) == [row(20), row(21)]
