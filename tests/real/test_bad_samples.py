"""Images that went bad in the store after packing: replaced, counted, listed, the same after a resume; capped."""

import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from data_shards.index import RECORD, shard_path
from data_shards.store import Store
from pipeline.journal import read_events, read_metrics
from tests.real.ranks import start
from tests.real.test_resume import config_for, local_steps, results

pytestmark = pytest.mark.slow
STEPS = 40
BAD = {3: "flipped", 57: "half", 101: "noise", 150: "page"}  # sample id -> what happened to it


def spoil(data: bytes, kind: str) -> bytes:
    """As many bytes as there were."""
    if kind == "flipped":
        return data[:-9] + bytes([data[-9] ^ 0xFF]) + data[-8:]
    if kind == "half":
        return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    if kind == "noise":
        return np.random.default_rng(0).bytes(len(data))
    return b"<!DOCTYPE html>".ljust(len(data), b" ")


@pytest.fixture(scope="module")
def spoilt_set(tiny_set: str, s3: Any) -> str:
    """The tiny set with four images spoilt: one whose checksum tells, three that only a decoder can tell."""
    whole, spoilt = Store(tiny_set), Store(s3.bucket("shards"))
    for entry in whole.list():
        spoilt.put(entry.path, whole.get(entry.path))
    sizes = json.loads(whole.get("MANIFEST.json"))["shard_samples"]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for sample, kind in BAD.items():
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        spoil_in(spoilt, shard, sample - int(starts[shard]), kind)
    return spoilt.url


def spoil_in(store: Store, shard: int, place: int, kind: str) -> None:
    path, index = shard_path(shard), shard_path(shard).replace(".tar", ".idx")
    tar, records = bytearray(store.get(path)), np.frombuffer(store.get(index), RECORD).copy()
    first, size = int(records[place]["offset"]), int(records[place]["size"])
    tar[first : first + size] = spoil(bytes(tar[first : first + size]), kind)
    if kind != "flipped":
        records[place]["crc32c"] = google_crc32c.value(bytes(tar[first : first + size]))
    store.put(path, bytes(tar))
    store.put(index, records.tobytes())


def config(url: str, runs: str, **reader: Any) -> dict[str, Any]:
    values = config_for(url, runs)
    return {**values, "train": {"steps": STEPS}, "reader": {"max_bad_fraction": 0.1, **reader}}


def quarantine(url: str) -> dict[int, str]:
    """What the newest checkpoint lists: sample id -> reason."""
    store = Store(url)
    newest = max(e.path for e in store.list("checkpoints") if e.path.endswith("MANIFEST.json"))
    return {sample: reason for sample, _, reason in json.loads(store.get(newest))["extra"]["quarantine"]}


def test_bad_images_are_replaced_counted_and_listed_and_a_resumed_run_replaces_them_alike(
    spoilt_set: str, runs: str, tmp_path: Path
) -> None:
    values = config(spoilt_set, runs)
    undisturbed = start(values, tmp_path / "bad-straight", 2)
    assert undisturbed.wait() == [0, 0], undisturbed.tails()
    straight = results(f"{runs}/bad-straight")
    assert [row["step"] for row in straight] == list(range(1, STEPS + 1))
    assert sum(row["run"]["replaced"] for row in read_metrics(Store(f"{runs}/bad-straight"))) >= len(BAD)
    assert set(quarantine(f"{runs}/bad-straight")) == set(BAD)

    first = start(values, tmp_path / "bad-killed", 2)
    first.wait_until(lambda: local_steps(tmp_path / "bad-killed", 1) >= 23)
    first.kill()
    second = start(values, tmp_path / "bad-killed", 1)
    assert second.wait() == [0], second.tails()
    resumed = results(f"{runs}/bad-killed")
    for key in ("step", "batch_hash", "crop_hash"):
        assert [row[key] for row in resumed] == [row[key] for row in straight], key
    assert any(event["event"] == "resumed" for event in read_events(Store(f"{runs}/bad-killed")))


def test_too_many_bad_images_stop_the_run_with_one_line_that_names_the_shards(
    spoilt_set: str, runs: str, tmp_path: Path
) -> None:
    ranks = start(config(spoilt_set, runs, max_bad_fraction=0), tmp_path / "capped", 1)
    assert ranks.wait() == [2], ranks.tails()
    (line,) = [line for line in ranks.logs[0].read_text().splitlines() if line.startswith("farseer: ")]
    assert "shards/" in line, line
    assert "Traceback" not in ranks.logs[0].read_text()
