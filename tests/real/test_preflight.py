"""A node that is not fit, in a real SLURM: named before the first step, and kept out of the next start."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.store import Store
from jobs.blame import excluded
from jobs.local_slurm import Record
from jobs.preflight import BadHost, try_clock
from jobs.runs import status
from jobs.start import Start, events
from pipeline.journal import read_events
from tests.real.test_submit import Scene, alone, ended, said, tails, wait

__all__ = ["alone"]
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def read_only_on(node: str, folder: Path, cluster: Path) -> Iterator[None]:
    """As a file system becomes when its disk fails; `node` alone sees it, in its own view of the mounts."""
    record = Record.load(cluster)
    assert record is not None
    view = ["nsenter", f"--target={record.running[node].pid}", "--mount"]
    subprocess.run([*view, "mount", "-t", "tmpfs", "-o", "ro", "farseer-test", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run([*view, "umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="a mount that one node alone sees takes root")
def test_a_node_whose_local_disk_fails_is_named_and_the_run_ends_on_others(alone: Scene) -> None:
    local, cluster = alone.folder / "local", Path(alone.site.environment["SLURM_CONF"]).parents[1]
    local.mkdir()
    with read_only_on("node1", local, cluster):
        job = alone.start(local_dir=str(local))
        wait(job)
    failed = [event for event in events(job.run_dir) if event["event"] == "requeued"]
    assert [event["suspects"] for event in failed] == [["node1"], ["node1"]], tails(job)
    assert f"bad host node1: {local} (local saves) cannot be written: Read-only file system" in failed[0]["reason"]
    assert ended(job, 2) == "finished", tails(job)
    assert "node1" not in {one["node"] for rank in (0, 1) for one in said(job, rank)}
    assert excluded(Path(alone.site.shared_dir), alone.site.exclude_hours) == ["node1"]
    assert status(job).state == "finished"
    assert [event["event"] for event in read_events(Store(job.store))] == ["submitted", "requeued", "requeued"]


def test_a_clock_that_is_off_by_more_than_a_minute_is_the_hosts_fault(
    s3: Any, runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Start(tmp_path / "run", "7", 0)
    ahead = try_clock(runs, start)
    assert ahead is not None
    assert abs(ahead) < 2
    here = time.time
    monkeypatch.setattr("jobs.doctor_store.time.time", lambda: here() - 90)
    start.begin(0, "log")
    (start.folder / "preflight-node1.json").write_text("{}")
    with pytest.raises(BadHost, match=r"its clock is -(89|9\d) s from the store's"):
        try_clock(runs, start)
