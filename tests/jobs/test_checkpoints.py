import json
import time
from pathlib import Path

import pytest

from jobs.checkpoints import checkpoints
from jobs.cli import main
from jobs.daemons import Process
from jobs.runs import Job
from pipeline import commit
from pipeline.commit import File, Part, Place


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "shared" / "first").mkdir(parents=True)
    job = Job("first", tmp_path / "shared" / "first", f"file://{tmp_path}/store/first", "local-1", Process(1, -1))
    job.save()
    return job


def put(job: Job, step: int, attempt: int, committed: bool = True) -> Path:
    """A checkpoint of one rank and five bytes of tensors."""
    place = Place(step, attempt)
    folder = Path(job.store.removeprefix("file://")) / place.path
    folder.mkdir(parents=True)
    (folder / "rank-0.safetensors").write_bytes(b"12345")
    if committed:
        part = Part(0, 1, "print", (File.of(folder / "rank-0.safetensors"),))
        commit.put_manifest(commit.Store(job.store), place, [part], lambda: None)
    return folder


def test_each_checkpoint_has_its_step_age_size_place_and_state(job):
    put(job, 100, 1)
    put(job, 200, 2, committed=False)
    (job.run_dir / "a01").mkdir()
    event = {"time": time.time() - 90, "attempt": 1, "event": "committed", "step": 100}
    (job.run_dir / "a01" / "events.jsonl").write_text(json.dumps(event) + "\n")
    first, second = checkpoints(job)
    assert (first.step, first.attempt, first.state) == (100, 1, "committed")
    assert first.age_s == pytest.approx(90, abs=5)
    assert first.where.endswith("store/first/checkpoints/step-000000100-a1")
    assert (second.step, second.bytes, second.age_s, second.state) == (200, 5, None, "not committed")


def test_what_only_this_disk_has_is_listed_until_the_store_has_it(job):
    put(job, 100, 1)
    own = commit.local_folder(job.store)
    others = commit.local_folder("s3://elsewhere/first")  # a disk of a node may be that of all runs
    for run, name in ((own, "step-000000100-a1"), (own, "step-000000150-a1"), (others, "step-000000170-a1")):
        left = job.run_dir / "checkpoints" / run / name / "rank-0"
        left.mkdir(parents=True)
        (left / "rank-0.safetensors").write_bytes(b"123")
    assert [(one.step, one.state) for one in checkpoints(job)] == [(100, "committed"), (150, "on this disk only")]


def test_verify_reads_every_byte_names_the_damage_and_fails(job, tmp_path, capsys):
    put(job, 100, 1)
    (put(job, 200, 1) / "rank-0.safetensors").write_bytes(b"12 45")
    assert [one.state for one in checkpoints(job)] == ["committed", "committed"]
    site = tmp_path / "here.yaml"
    site.write_text(f"shared_dir: {tmp_path}/shared\nexecutor: local\n")
    assert main(["checkpoints", "--run", "first", "--site", str(site), "--verify"]) == 1
    told = capsys.readouterr().out
    assert "verified" in told
    assert "rank-0.safetensors has sha256" in told
    assert main(["checkpoints", "--run", "first", "--site", str(site), "--json"]) == 0
    assert [one["step"] for one in json.loads(capsys.readouterr().out)] == [100, 200]
