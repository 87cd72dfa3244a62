"""A run's journals on a real S3 whose answers get lost."""

from pathlib import Path
from typing import Any

import pytest

from data_shards.store import Store, Unavailable
from pipeline.journal import Journal, read_metrics
from tests.proxy import Wire


@pytest.mark.slow
def test_rows_whose_upload_arrived_but_was_never_confirmed_are_not_doubled_by_the_next_one(
    s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = s3.bucket("runs")
    direct = Store(url)
    assert direct.list() == []
    wire = Wire(s3.server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
    rows = [{"result": {"step": step}, "run": {"attempt": 1}} for step in range(1, 5)]
    journal = Journal(tmp_path / "metrics.jsonl", Store(url, retry_seconds=10), "metrics/a01")
    journal.append(rows[0])
    journal.append(rows[1])
    wire.faults = ["lost"] * 1000
    with pytest.raises(Unavailable):
        journal.upload()
    assert read_metrics(direct) == rows[:2]
    journal.append(rows[2])
    wire.faults = []
    journal.upload()
    journal.append(rows[3])
    journal.upload()
    wire.close()
    assert [line for entry in direct.list("metrics") for line in direct.get(entry.path).splitlines()] == (
        tmp_path / "metrics.jsonl"
    ).read_bytes().splitlines()
    assert read_metrics(direct) == rows
