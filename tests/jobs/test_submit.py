"""What is checked before a submission, on folders in the place of a bucket; on real parts in tests/real."""

import io
import json
import os
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.index import Manifest
from data_shards.store import Store
from jobs import launch as launching
from jobs import slurm
from jobs import submit as submitting
from jobs.daemons import Process
from jobs.launch import packed_code
from jobs.runs import Job
from jobs.site import ROOT, Site
from jobs.start import events
from jobs.submit import check, submit
from pipeline import commit
from pipeline.commit import Part, Place, Retention
from pipeline.config import Config, load
from pipeline.run import open_data, record_of


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(name="here", executor="local", shared_dir=str(tmp_path / "shared"))


def config(folder: Path, *overrides: str) -> Config:
    url = f"file://{folder}/set"
    Manifest("layout", "contents", 1000, (1000,), (4_000_000,), {}, {}).save(Store(url), create_only=False)
    return load(ROOT / "conf" / "demo.yaml", [f"data.url={url}", f"store=file://{folder}/runs", *overrides])


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_can_work_passes_and_leaves_nothing_behind(site, tmp_path):
    wanted = config(tmp_path)
    before = files(tmp_path)
    check(wanted, site, "first", Store(wanted.store))
    assert files(tmp_path) == before


def test_reasons_of_config_site_and_running_job_are_said_at_once(site, tmp_path, monkeypatch):
    wanted = config(tmp_path, "data.batch=60")
    monkeypatch.setattr(submitting, "state", lambda job: "RUNNING")
    run_dir = tmp_path / "shared" / "first"
    run_dir.mkdir(parents=True)
    Job("first", run_dir, "x", "local-1").save()
    with pytest.raises(UserError) as refused:
        check(wanted, site.model_copy(update={"nodes": 3}), "first", Store(wanted.store))
    lines = str(refused.value).splitlines()
    assert len(lines) == 2, lines
    assert "4 does not divide among 3 ranks" in lines[0]
    assert "job local-1 is on it already" in lines[1]


def test_a_run_that_began_with_another_config_goes_on_with_it_only_when_that_is_wanted(site, tmp_path):
    wanted = config(tmp_path)
    shards, _, filled = open_data(wanted)
    Store(f"{wanted.store}/first").put("run.json", json.dumps(asdict(record_of(filled, shards))).encode())
    check(wanted, site, "first", Store(wanted.store))
    other = config(tmp_path, "optim.lr=30")
    with pytest.raises(UserError, match=r"began with another config \(optim.lr: .* -> 30.*FORCE=1"):
        check(other, site, "first", Store(wanted.store))
    check(other, site, "second", Store(wanted.store))
    check(config(tmp_path, "optim.lr=30", "checkpoint.force=true"), site, "first", Store(wanted.store))


def test_a_run_that_has_begun_is_judged_by_the_data_that_it_goes_on_with(site, tmp_path):
    wanted = config(tmp_path, "reader.prefetch_bytes=8000000")
    shards, _, filled = open_data(wanted)
    Store(f"{wanted.store}/first").put("run.json", json.dumps(asdict(record_of(filled, shards))).encode())
    grown = Manifest("layout 2", "contents 2", 2000, (1000, 1000), (4_000_000, 4_000_000_000), {}, {})
    grown.save(Store(f"file://{tmp_path}/set"), create_only=False)
    check(wanted, site, "first", Store(wanted.store))
    with pytest.raises(UserError, match="prefetch_bytes"):
        check(wanted, site, "second", Store(wanted.store))


def test_a_store_that_does_not_answer_is_one_line_and_asked_no_further(site, tmp_path, monkeypatch):
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:9"), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    wanted = config(tmp_path, "data.url=s3://shards/set", "store=s3://runs")
    with pytest.raises(UserError) as refused:
        check(wanted, site, "first", Store(wanted.store, retry_seconds=0.1))
    assert len(str(refused.value).splitlines()) == 1


def test_a_job_that_completes_is_waited_for_and_one_of_another_store_is_not_on_the_run(tmp_path, monkeypatch):
    answers = iter([("COMPLETING", "COMPLETING"), ("RUNNING", "COMPLETING")])
    ids = (("12", "s3://runs/first"), ("13", "s3://others/first"))

    def queue(_):
        return [slurm.Queued(job, word, "n", "", run) for word, (job, run) in zip(next(answers), ids, strict=True)]

    monkeypatch.setattr(slurm, "queue", queue)
    (found,) = submitting._queued("first", "s3://runs/first", None)
    assert (found.job, found.state) == ("12", "RUNNING")
    answers = iter([("COMPLETING", "RUNNING")])
    monkeypatch.setattr(submitting, "COMPLETING_S", 0)
    found = submitting._queued("first", "s3://mine/first", "13")
    assert [entry.job for entry in found] == ["13"]  # by its number, whatever SLURM calls it


def test_the_partition_of_who_submits_counts_where_the_site_leaves_it_open(tmp_path, monkeypatch):
    sinfo = tmp_path / "sinfo"
    sinfo.write_text("#!/bin/sh\nprintf 'debug*|2\\nbig|64\\n'\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("SBATCH_PARTITION", "big")
    monkeypatch.setattr(submitting, "_queued", lambda *_: [])
    site = Site(name="mine", shared_dir=str(tmp_path / "shared"), nodes=8)
    submitting._check_free(site, "first", "s3://runs/first")
    named = site.model_copy(update={"partition": "debug"})
    with pytest.raises(UserError, match="nodes: found 8; partition debug has 2"):
        submitting._check_free(named, "first", "s3://runs/first")


def test_a_beginning_that_is_not_there_is_refused_before_anything_is_written(site, tmp_path):
    wanted = config(tmp_path)
    before = files(tmp_path)
    for origin, said in (
        (f"{tmp_path}/seer.torch", "seer.torch: no such file; valid is a file .torch, "),
        ("old@7", "FROM=old@7: .*/runs/old has no such checkpoint; there are: none"),
    ):
        with pytest.raises(UserError, match=said):
            submit(wanted, site, "first", origin=origin)
        with pytest.raises(UserError, match=said):
            submit(config(tmp_path, f"train.start_from={origin}"), site, "first")
    assert files(tmp_path) == before


def test_a_run_that_goes_on_needs_what_it_began_with_no_more(site, tmp_path):
    wanted = config(tmp_path, f"train.start_from=file://{tmp_path}/gone.torch")
    with pytest.raises(UserError, match=r"gone\.torch: no such file"):
        check(wanted, site, "first", Store(wanted.store))
    Store(f"{wanted.store}/first").put("checkpoints/step-000000005-a1/MANIFEST.json", b"{}")
    check(wanted, site, "first", Store(wanted.store))


def test_the_checkpoint_that_a_run_begins_with_is_kept_for_it_and_a_closed_folder_is_no_reason_to_stop(
    site, tmp_path, monkeypatch
):
    monkeypatch.setattr(launching, "_on_this_machine", begun)
    wanted, place = config(tmp_path), Place(5, 1)
    for name in ("open", "closed"):
        commit.put_manifest(Store(f"{wanted.store}/{name}"), place, [Part(0, 1, "print", ())], lambda: None)
    (tmp_path / "runs" / "closed" / "eval").touch()
    for name, told in (("open", ["submitted"]), ("closed", ["submitted", "origin not kept"])):
        submit(wanted, site, f"from-{name}", code=small_code(tmp_path), origin=f"{name}@5")
        assert [event["event"] for event in events(site.run_dir(f"from-{name}"))] == told
    assert Retention(1).for_ever(Store(f"{wanted.store}/open"))(place)


def test_a_store_that_takes_nothing_is_refused_before_anything_is_written(site, tmp_path):
    wanted = config(tmp_path, "store=file:///proc/runs")
    with pytest.raises(UserError, match="/proc/runs"):
        check(wanted, site, "first", Store(wanted.store))
    assert not (tmp_path / "shared").exists()


def small_code(folder: Path) -> Path:
    (folder / "code" / "jobs").mkdir(parents=True, exist_ok=True)
    (folder / "code" / "jobs" / "a.py").write_text("code")
    return folder / "code"


def begun(site: Site, run: str, store: str, config: dict[str, Any]) -> Job:
    """A job that has compiled its code at once, and is over."""
    compiled = site.run_dir(run) / "snapshot" / "jobs" / "__pycache__"
    compiled.mkdir(parents=True)
    (compiled / "a.pyc").write_text("secret")
    return Job(run, site.run_dir(run), store, "42", Process(1, 1))


def test_what_a_job_runs_from_is_kept_in_the_store_and_nothing_that_the_job_has_made_of_it(site, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "_on_this_machine", begun)
    wanted = config(tmp_path)
    submit(wanted, site, "first", code=small_code(tmp_path))
    with tarfile.open(fileobj=io.BytesIO(Store(f"{wanted.store}/first").get("code/42.tar.gz"))) as archive:
        assert archive.extractfile("snapshot/jobs/a.py").read() == b"code"  # type: ignore[union-attr]
        assert "snapshot/jobs/__pycache__/a.pyc" not in archive.getnames()


def test_a_store_that_does_not_take_the_code_stops_no_job(tmp_path):
    job = Job("first", tmp_path / "first", "x", "42")
    job.run_dir.mkdir()
    packed_code(job.run_dir).touch()
    submitting._keep_code(job, Store("file:///proc/nowhere"))
    assert events(job.run_dir)[-1]["event"] == "upload failed"
