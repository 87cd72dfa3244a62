"""A run that is killed and resumed learns what the undisturbed one learns, on photographs in a real S3."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.errors import UserError
from data_shards.store import Store
from jobs.site import ROOT
from pipeline.config import Config, load
from pipeline.journal import read_events, read_metrics
from pipeline.pretrained import timm_name
from pipeline.weights import point, trained_trunk
from tests.conftest import once
from tests.pipeline.test_pretrained import released, their_trunk
from tests.real.ranks import start

pytestmark = pytest.mark.slow
STEPS = 60


def config_for(tiny_set: str, runs: str, **checkpoint: Any) -> dict[str, Any]:
    """A run of 60 steps that two ranks on two cores do in some ten seconds."""
    values = load(ROOT / "conf" / "chaos.yaml", f"store={runs} watchdog.floor_s=60 watchdog.beat_s=5").dump()
    values["data"]["url"] = tiny_set
    return values | {"checkpoint": values["checkpoint"] | checkpoint}


def results(url: str) -> list[dict[str, Any]]:
    return [row["result"] for row in read_metrics(Store(url))]


def local_steps(run_dir: Path, attempt: int) -> int:
    file = run_dir / f"a{attempt:02d}" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def runs(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One place for all processes, so that one straight run serves them all."""
    return once(tmp_path_factory, "resumed-runs", lambda: str(s3.bucket("runs")))


@pytest.fixture(scope="module")
def straight(tiny_set: str, runs: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the run that nothing disturbed, at world size 2."""

    def run() -> list[dict[str, Any]]:
        ranks = start(config_for(tiny_set, runs), tmp_path_factory.mktemp("straight") / "straight", 2)
        assert ranks.wait() == [0, 0], ranks.tails()
        return results(f"{runs}/straight")

    rows = once(tmp_path_factory, "straight", run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def test_rows_say_what_all_ranks_read(straight: list[dict[str, Any]], runs: str) -> None:
    rows = [row["run"] for row in read_metrics(Store(f"{runs}/straight"))]
    assert rows[0]["bytes_read"] > 0
    assert rows[0]["requests"] > 0
    assert max(row["held_bytes"] for row in rows) > 0
    assert min(row["wait_s"] for row in rows[:-1]) > 0
    for row in rows:
        assert row["read_mb_s"] == pytest.approx(row["bytes_read"] / 1e6 / row["step_s"])
        assert row["cache_hits"] == row["cache_misses"] == row["cache_bytes"] == row["retries"] == 0
        assert row["in_flight"] >= 0
        assert row["reader_wait_s"] >= 0
        assert 0 <= row["wait_s"] <= row["step_s"]
        assert row["wait_rank"] in (0, 1)
        assert row["slow_rank"] in (0, 1)
        assert row["slow_factor"] >= 1


def test_a_run_whose_ranks_are_all_killed_at_a_random_step_ends_with_the_rows_of_the_straight_one(
    straight: list[dict[str, Any]], tiny_set: str, runs: str, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    at = random.Random(seed).randrange(11, STEPS - 5)
    run_dir, config = tmp_path / f"killed-{seed}", config_for(tiny_set, runs)
    first = start(config, run_dir, 2)
    first.wait_until(lambda: local_steps(run_dir, 1) >= at)
    first.kill()
    second = start(config, run_dir, 2)
    assert second.wait() == [0, 0], second.tails()
    rows = results(f"{runs}/{run_dir.name}")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), f"seed {seed}"
    assert rows == straight, f"seed {seed}"
    (resumed,) = [e for e in read_events(Store(f"{runs}/{run_dir.name}")) if e["event"] == "resumed"]
    assert resumed["step"] in range(10, at + 1, 10), f"seed {seed}"
    (recovered,) = [e for e in read_events(Store(f"{runs}/{run_dir.name}")) if e["event"] == "recovered"]
    assert recovered["redone"] == recovered["step"] - 1 - resumed["step"], f"seed {seed}"
    assert 0 < recovered["seconds"] < 600


def test_a_preempted_run_saves_at_the_step_where_it_stops_and_goes_on_from_there(
    straight: list[dict[str, Any]], tiny_set: str, runs: str, tmp_path: Path
) -> None:
    run_dir, config = tmp_path / "preempted", config_for(tiny_set, runs, every_steps=1000)
    first = start(config, run_dir, 2)
    first.wait_until(lambda: local_steps(run_dir, 1) >= 13)
    first.signal(signal.SIGUSR2)
    assert first.wait() == [0, 0], first.tails()
    events = read_events(Store(f"{runs}/preempted"))
    (stopped,) = [e for e in events if e["event"] == "preempted"]
    assert 13 <= stopped["step"] < STEPS
    (saved,) = [e for e in events if e["event"] == "stopped"]
    assert saved["step"] == stopped["step"]
    assert 0 < saved["seconds"] < 60
    config["efficiency"]["activation_checkpointing"] = True  # may change at any start, and changes nothing
    second = start(config, run_dir, 2)
    assert second.wait() == [0, 0], second.tails()
    (resumed,) = [e for e in read_events(Store(f"{runs}/preempted")) if e["event"] == "resumed"]
    assert resumed["step"] == stopped["step"]
    (recovered,) = [e for e in read_events(Store(f"{runs}/preempted")) if e["event"] == "recovered"]
    assert (recovered["step"], recovered["redone"]) == (stopped["step"] + 1, 0)
    assert results(f"{runs}/preempted") == straight


def test_a_run_resumed_on_one_rank_instead_of_two_sees_the_same_batches_and_crops_and_nearly_the_same_losses(
    straight: list[dict[str, Any]], tiny_set: str, runs: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "elastic"
    first = start(config_for(tiny_set, runs), run_dir, 2)
    first.wait_until(lambda: local_steps(run_dir, 1) >= 32)
    first.kill()
    second = start(config_for(tiny_set, runs), run_dir, 1)
    assert second.wait() == [0], second.tails()
    rows = results(f"{runs}/elastic")
    for key in ("step", "lr", "batch_hash", "crop_hash"):
        assert [row[key] for row in rows] == [row[key] for row in straight], key
    (resumed,) = [e for e in read_events(Store(f"{runs}/elastic")) if e["event"] == "resumed"]
    assert resumed["step"] >= 20
    after = slice(resumed["step"], resumed["step"] + 10)
    losses, reference = ([row["loss"] for row in r[after]] for r in (rows, straight))
    np.testing.assert_allclose(losses, reference, atol=1e-4)


def test_a_sharded_run_sees_the_same_batches_and_may_go_on_replicated_on_one_rank(
    straight: list[dict[str, Any]], tiny_set: str, runs: str, tmp_path: Path
) -> None:
    run_dir, config = tmp_path / "sharded", config_for(tiny_set, runs)
    config["efficiency"]["sharded"] = True
    first = start(config, run_dir, 2)
    first.wait_until(lambda: local_steps(run_dir, 1) >= 32)
    first.kill()
    config["efficiency"]["sharded"] = False
    second = start(config, run_dir, 1)
    assert second.wait() == [0], second.tails()
    told = [e["efficiency"] for e in read_events(Store(f"{runs}/sharded")) if e["event"] in ("started", "resumed")]
    assert told == ["sharded, deterministic", "deterministic"]
    rows = results(f"{runs}/sharded")
    for key in ("step", "lr", "batch_hash", "crop_hash"):
        assert [row[key] for row in rows] == [row[key] for row in straight], key
    losses, reference = ([row["loss"] for row in r] for r in (rows, straight))
    np.testing.assert_allclose(losses[:5], reference[:5], atol=1e-5)
    np.testing.assert_allclose(losses, reference, atol=0.1)  # rounding grows with the steps, most of all in AdamW


def test_a_damaged_newest_checkpoint_sends_the_resume_to_the_older_one_and_the_rows_stay_equal(
    straight: list[dict[str, Any]], tiny_set: str, runs: str, tmp_path: Path
) -> None:
    run_dir, config = tmp_path / "damaged", config_for(tiny_set, runs)
    first = start(config, run_dir, 2)
    store = Store(f"{runs}/damaged")
    first.wait_until(
        lambda: any(e.path.endswith("MANIFEST.json") and "-000000030-" in e.path for e in store.list("checkpoints"))
    )
    first.kill()
    newest = max((e for e in store.list("checkpoints") if e.path.endswith("MANIFEST.json")), key=lambda e: e.path)
    folder = newest.path.rsplit("/", 1)[0]
    file = next(f for f in json.loads(store.get(newest.path))["files"])
    path = f"{folder}/{file['name'] if isinstance(file, dict) else file}"
    data = bytearray(store.get(path))
    data[len(data) // 2] ^= 1
    store.put(path, bytes(data))
    second = start(config, run_dir, 2)
    assert second.wait() == [0, 0], second.tails()
    events = read_events(store)
    assert any("sha256" in str(e.get("reason", "")) and folder.rsplit("/", 1)[-1] in str(e) for e in events), events
    assert results(f"{runs}/damaged") == straight


def test_a_fork_begins_with_the_weights_of_another_run_and_says_where_they_come_from(
    straight: list[dict[str, Any]], tiny_set: str, runs: str, tmp_path: Path
) -> None:
    origin, config = point(Store(runs), "straight"), config_for(tiny_set, runs)
    config["train"] = {"steps": 5, "start_from": origin}
    forked = start(config, tmp_path / "forked", 2)
    assert forked.wait() == [0, 0], forked.tails()
    (event,) = [e for e in read_events(Store(f"{runs}/forked")) if e["event"] == "forked"]
    assert (event["origin"], event["weights"]) == (origin, "all")
    first, other = results(f"{runs}/forked")[0], straight[0]
    assert (first["batch_hash"], first["crop_hash"]) == (other["batch_hash"], other["crop_hash"])
    assert first["loss"] < other["loss"] - 0.01  # the same crops, and 60 steps of learning


def test_a_run_on_two_ranks_begins_with_the_trunk_of_vissls_file_in_the_store(
    s3: Any, tiny_set: str, runs: str, tmp_path: Path
) -> None:
    """Each rank saves a share of the tensors; at the first step the rate is 0."""
    models, config = s3.bucket("shards"), config_for(tiny_set, runs)
    config["train"] = {"steps": 1, "start_from": f"{models}/seer.torch"}
    theirs = their_trunk(Config.model_validate(config).model)
    torch.save(released(theirs.state_dict()), tmp_path / "seer.torch")
    Store(models).upload(tmp_path / "seer.torch", "seer.torch")
    begun = start(config, tmp_path / "pretrained", 2)
    assert begun.wait() == [0, 0], begun.tails()
    store = Store(f"{runs}/pretrained")
    (event,) = [e for e in read_events(store) if e["event"] == "forked"]
    assert (event["origin"], event["weights"]) == (f"{models}/seer.torch", "trunk")
    trunk, _ = trained_trunk(store, Config.model_validate(config))
    expected = {timm_name(name): parameter for name, parameter in theirs.named_parameters()}
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trunk.named_parameters())


def test_a_fork_from_nowhere_is_refused_with_what_there_is(straight: list[dict[str, Any]], runs: str) -> None:
    with pytest.raises(UserError, match=r"FROM=straight@7: .* there are: 40, 50, 60; a run of another"):
        point(Store(runs), "straight@7")
    with pytest.raises(UserError, match=r"FROM=gone: .* there are: none; a run of another"):
        point(Store(runs), "gone")
