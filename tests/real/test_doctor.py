"""The doctor at a real S3 server and a real SLURM: what is right is ok, and each thing spoiled is found."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from data_shards.store import Store
from jobs import slurm as slurm_commands
from jobs.doctor import Finding, examine
from jobs.doctor_slurm import look_at_nodes, look_at_slurm
from jobs.doctor_store import ahead_of_store_s, look_at_shards, look_at_store
from jobs.site import Site

pytestmark = pytest.mark.slow


@pytest.fixture
def site(s3: Any, slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name, value in {**s3.environment, **slurm.environment}.items():
        monkeypatch.setenv(name, value)
    tmp_path.chmod(0o755)
    environment = {**s3.environment, **slurm.environment}
    return Site(name="here", shared_dir=str(tmp_path / "shared"), nodes=2, time_limit_min=60, environment=environment)


def by_name(found: Any) -> dict[str, Finding]:
    return {one.what: one for one in found}


def test_all_that_a_store_must_do_is_ok_and_nothing_of_it_stays(s3, runs):
    before = Store(runs).list()
    found = by_name(look_at_store(runs))
    assert {one.ok for one in found.values()} == {True}, found
    assert set(found) == {"store", "store speed", "conditions", "multipart", "clock"}
    assert Store(runs).list() == before


def test_a_bucket_that_is_not_there_and_a_wrong_key_are_one_bad_line(s3, runs, monkeypatch, tmp_path):
    (said,) = look_at_store("s3://nope/runs")
    assert (said.ok, "no such bucket" in said.says) == (False, True)
    right = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).read_text()
    lines = ["aws_secret_access_key = wrong" if "secret" in line else line for line in right.splitlines()]
    (tmp_path / "credentials").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (said,) = look_at_store(runs)
    assert (said.ok, "access denied" in said.says) == (False, True)


def test_a_clock_that_is_off_is_measured_against_the_stores(s3, runs, monkeypatch):
    here = time.time
    monkeypatch.setattr("jobs.doctor_store.time.time", lambda: here() + 90)
    ahead = ahead_of_store_s(runs)
    assert ahead is not None
    assert 85 < ahead < 95


def test_a_set_is_named_with_its_samples_and_one_that_is_not_there_is_bad(tiny_set, s3):
    there, missing = look_at_shards([tiny_set, s3.bucket("shards")])
    assert (there.ok, missing.ok) == (True, False)
    assert "make shards" in missing.says


def test_a_job_that_slurm_would_take_is_ok(site):
    found = by_name(look_at_slurm(site))
    assert {one.ok for one in found.values()} == {True}, found
    assert found["partition"].says.startswith("main is UP: ")
    low = by_name(look_at_slurm(site.model_copy(update={"partition": "low"})))
    assert low["preemption"].ok is None  # a grace of 30 s, where the site reckons with 120
    assert "requeued 30 s after the signal" in low["preemption"].says


def test_what_slurm_would_refuse_is_bad_in_its_own_words(site):
    greedy = by_name(look_at_slurm(site.model_copy(update={"cpus_per_rank": 4000})))
    assert greedy["job"].ok is False
    assert "configuration is not available" in greedy["job"].says
    missing = by_name(examine(site.model_copy(update={"partition": "nope"}), "s3://runs"))
    assert "partition: found nope; SLURM has low, main" in missing["cannot look"].says


def test_the_probe_sees_from_every_node_the_store_the_clock_and_the_signal_and_is_gone(site, runs):
    found = by_name(look_at_nodes(site, runs))
    assert {one.ok for one in found.values()} == {True}, found
    assert "all 2 nodes" in found["signal"].says
    assert "on 2 nodes" in found["nodes' store"].says
    assert re.fullmatch(
        r"all-reduce of 64 MiB over 2 nodes \(gloo, a rank each\): \d+\.\d\d GB/s", found["network"].says
    )
    assert list(Path(site.shared_dir).iterdir()) == []
    assert "doctor" not in slurm_commands.ask("squeue", "--noheader", "--format", "%j")
