"""Checkpoints in a real S3: killed in the middle of an upload, cut off from the store, written by two at once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_shards.store import AlreadyExists, Store
from pipeline import commit
from pipeline.checkpoint import Checkpointer, CheckpointSettings
from pipeline.commit import Place
from pipeline.ranks import Ranks
from tests.proxy import Wire

MEGABYTES = 24  # of a state; an upload of two parts


def big(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(MEGABYTES, 2**18, generator=generator), "step": torch.tensor(step)}


class Events(list[tuple[str, int]]):
    """(name, step) of each event of a Checkpointer."""

    def __call__(self, name: str, step: int, **fields: Any) -> None:
        self.append((name, step))


def checkpointer(store: Store, local: Path, attempt: int, event: Callable[..., None]) -> Checkpointer:
    return Checkpointer(
        store, local, attempt=attempt, fingerprint="f", ranks=Ranks(0, 1, None), host="node1",
        settings=CheckpointSettings(), fence=lambda: None, event=event,
    )  # fmt: skip


def loaded_step(checkpoints: Checkpointer) -> int:
    found = checkpoints.newest()
    assert found is not None
    state = {name: torch.zeros_like(tensor) for name, tensor in big(0).items()}
    checkpoints.load(found, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in big(found.step).items())
    return found.step


def test_a_checkpoint_goes_to_s3_and_comes_back_and_its_manifest_is_written_once(s3: Any, tmp_path: Path) -> None:
    store = Store(s3.bucket("runs"))
    first = checkpointer(store, tmp_path, 1, Events())
    first.save(5, {"weight": torch.arange(10.0)}, {"note": "ä"})
    first.wait(60)
    later = checkpointer(store, tmp_path, 2, Events())
    found = later.newest()
    assert found is not None
    assert (found.step, found.extra) == (5, {"note": "ä"})
    state = {"weight": torch.zeros(10)}
    later.load(found, state)
    assert torch.equal(state["weight"], torch.arange(10.0))
    parts = commit.read_parts(store, Place(5, 1), [0])
    before = store.get(f"{found.place.path}/MANIFEST.json")
    commit.put_manifest(store, Place(5, 1), parts, lambda: None)  # the same again: an answer was lost
    other = [commit.Part(0, 1, "f", parts[0].files, {"note": "another"})]
    with pytest.raises(AlreadyExists):
        commit.put_manifest(store, Place(5, 1), other, lambda: None)
    assert store.get(f"{found.place.path}/MANIFEST.json") == before


@pytest.mark.slow
@pytest.mark.parametrize("disk_survives", [True, False])
def test_after_a_kill_in_the_middle_of_an_upload_a_whole_checkpoint_is_found(
    s3: Any, tmp_path: Path, disk_survives: bool
) -> None:
    seed = random.randrange(10**6)
    delay = random.Random(seed).uniform(0.0, 0.5)
    store, local = Store(s3.bucket("runs")), tmp_path / "disk"
    process = subprocess.Popen([sys.executable, "-m", __spec__.name, store.url, str(local)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"written\n"  # step 2 is on the disk, its upload begins
        time.sleep(delay)  # a random moment, not a wait
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    committed = [place.step for place in commit.committed(commit.survey(store))]
    events = Events()
    resumed = loaded_step(checkpointer(store, local if disk_survives else tmp_path / "other disk", 2, events))
    sent = store.exists(f"{Place(2, 1).path}/rank-0.json")  # then only the manifest was missing
    expected = 2 if disk_survives or sent else 1
    assert resumed == expected, f"seed {seed}: committed {committed}, events {events}"
    assert (("checkpoint completed", 2) in events) == (expected == 2 and 2 not in committed)


@pytest.fixture
def wire(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire(s3.server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
    yield wire
    wire.close()


@pytest.mark.slow
def test_a_store_that_is_away_during_a_save_gets_it_with_the_next_one(s3: Any, wire: Wire, tmp_path: Path) -> None:
    url = s3.bucket("runs")
    wire.faults = ["reset"] * 10_000
    events = Events()
    checkpoints = checkpointer(Store(url, retry_seconds=8), tmp_path, 1, events)
    checkpoints.save(1, {"step": torch.tensor(1)}, {})
    deadline = time.monotonic() + 60
    while ("save delayed", 1) not in events:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    wire.faults = []
    checkpoints.save(2, {"step": torch.tensor(2)}, {})
    checkpoints.wait(60)
    assert [step for name, step in events if name == "committed"] == [1, 2]


def _main(url: str, local: str) -> None:
    def tell(name: str, step: int, **fields: Any) -> None:
        if (name, step) == ("saved", 2):
            os.write(1, b"written\n")

    checkpoints = checkpointer(Store(url), Path(local), 1, tell)
    for step in (1, 2):
        checkpoints.save(step, big(step), {})
        checkpoints.wait(60)
    signal.pause()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(*sys.argv[1:])
