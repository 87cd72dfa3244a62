"""The benchmark of a GPU, tried out on the CPU: all its parts run and are told."""

import pytest
import torch

from bench import gpu


@pytest.mark.slow
def test_every_part_of_the_table_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BATCH", 4)
    monkeypatch.setattr(gpu, "BATCHES", 2)
    rows = gpu.measure(torch.device("cpu"))
    assert [row[0] for row in rows] == ["Bytes to crops", "Decoding", "Crops"]
    assert all(row[2] > 0 for row in rows)
    assert gpu.table(rows).count("\n") == 4
