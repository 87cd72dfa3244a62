"""The rows of a run as columns, which are read once and kept."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.store import Store
from pipeline.goodput import End
from pipeline.report.rows import RowReader, columns, ends, in_order


def row(step: int, attempt: int = 1, **result: Any) -> dict[str, Any]:
    run = {"time": 100.0 * attempt + step, "step_s": 1.5, "wait_s": 0.5, "images_s": 64.0, "attempt": attempt}
    return {"result": {"step": step, "loss": 5.0 / step, "batch_hash": "ab", **result}, "run": {**run, "rank": 3}}


def text(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text(text([row(1), row(2)]))
    return tmp_path / "metrics.jsonl"


def test_a_column_has_the_numbers_of_the_rows_and_nan_where_there_is_none() -> None:
    found = columns([row(1, lr=0.1), row(2, loss=None)])
    assert found["step"].tolist() == [1, 2]
    assert found["time"].tolist() == [101.0, 102.0]
    assert (found["loss"][0], found["lr"][0]) == (5.0, 0.1)
    assert math.isnan(found["loss"][1])
    assert math.isnan(found["lr"][1])


def test_where_an_attempt_began_again_the_rows_of_those_before_it_end() -> None:
    rows = columns([row(step, 2) for step in (3, 4)] + [row(step, 1) for step in (1, 2, 3, 4, 5)] + [row(4, 2)])
    assert in_order(rows)[["attempt", "step"]].tolist() == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert ends(rows) == {1: (End(1, 101.0, 1.5), End(5, 105.0, 1.5)), 2: (End(3, 203.0, 1.5), End(4, 204.0, 1.5))}


def test_a_run_without_rows_has_none() -> None:
    assert in_order(columns([])).size == 0
    assert ends(columns([])) == {}
    assert RowReader().on_disk([]).size == 0


def test_of_a_file_that_grows_only_what_is_new_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr("pipeline.report.rows.columns", lambda rows: columns([read.append(1) or one for one in rows]))
    reader = RowReader()
    assert reader.on_disk([file])["step"].tolist() == [1, 2]
    with file.open("a") as more:
        more.write(text([row(3)]))
    assert reader.on_disk([file])["step"].tolist() == [1, 2, 3]
    assert len(read) == 3


def test_a_line_that_is_on_its_way_is_read_when_it_has_come(file: Path) -> None:
    line, reader = text([row(3)]), RowReader()
    with file.open("a") as more:
        more.write(line[:40])
    assert reader.on_disk([file])["step"].tolist() == [1, 2]
    with file.open("a") as more:
        more.write(line[40:])
    assert reader.on_disk([file])["step"].tolist() == [1, 2, 3]


def test_a_line_that_was_cut_is_left_out(file: Path) -> None:
    file.write_text(file.read_text() + '{"result": {"st\n[1]\n' + text([row(3)]))
    assert RowReader().on_disk([file])["step"].tolist() == [1, 2, 3]


def test_of_a_later_run_of_the_same_name_no_row_of_the_earlier_one_is_left(file: Path, tmp_path: Path) -> None:
    reader = RowReader()
    reader.on_disk([file])
    file.rename(tmp_path / "metrics.old")
    file.write_text(text([row(1, loss=9.0), row(2), row(3)]))
    found = reader.on_disk([file])
    assert found["step"].tolist() == [1, 2, 3]
    assert found["loss"][0] == 9.0
    assert reader.on_disk([]).size == 0


def test_a_segment_in_the_store_is_read_once(tmp_path: Path) -> None:
    store, reader = Store(f"file://{tmp_path}/run"), RowReader()
    store.put("metrics/a01-000001.jsonl", text([row(1), row(2)]).encode())
    assert reader.in_store(store)["step"].tolist() == [1, 2]
    store.put("metrics/a01-000002.jsonl", text([row(2), row(3)]).encode())  # its first line was sent twice
    before = store.counters.bytes_read
    assert in_order(reader.in_store(store))["step"].tolist() == [1, 2, 3]
    assert store.counters.bytes_read - before == len(text([row(2), row(3)]))
    store.delete(["metrics/a01-000001.jsonl"])
    assert np.array_equal(reader.in_store(store)["step"], [2, 3])


def test_a_file_that_is_put_aside_at_that_moment_has_no_rows(file: Path, tmp_path: Path) -> None:
    assert RowReader().on_disk([tmp_path / "gone.jsonl", file])["step"].tolist() == [1, 2]
