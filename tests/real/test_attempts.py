"""Two jobs for one run, as when a node comes back that SLURM had given up: they cannot harm each other."""

import signal
from pathlib import Path

import pytest

from data_shards.store import Store
from pipeline.journal import read_events
from tests.real.ranks import start
from tests.real.test_resume import STEPS, config_for, local_steps, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_of_two_attempts_alive_at_once_the_older_one_stops_and_harms_nothing(
    tiny_set: str, runs: str, tmp_path: Path
) -> None:
    run_dir, config = tmp_path / "zombie", config_for(tiny_set, runs)
    store = Store(f"{runs}/zombie")
    older = start(config, run_dir, 2)
    older.wait_until(lambda: local_steps(run_dir, 1) >= 13)
    older.signal(signal.SIGSTOP)
    newer = start(config, run_dir, 2)
    newer.wait_until(lambda: local_steps(run_dir, 2) >= 5)
    older.signal(signal.SIGCONT)
    assert all(code != 0 for code in older.wait()), older.tails()
    assert newer.wait() == [0, 0], newer.tails()
    assert "attempt 2 owns the run now" in older.tails()
    rows = results(f"{runs}/zombie")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    (resumed,) = [event for event in read_events(store) if event["event"] == "resumed"]
    steps = [int(e.path.split("step-")[1][:9]) for e in store.list("checkpoints") if e.path.endswith("MANIFEST.json")]
    assert max(steps) == STEPS
    assert all(
        "-a2/" in e.path or int(e.path.split("step-")[1][:9]) <= resumed["step"] for e in store.list("checkpoints")
    )
