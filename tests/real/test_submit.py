"""Submitting to a real SLURM and a real S3: what is refused, and what a job lives through, with a stand-in trainer."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_shards.index import Manifest, ShardSet
from data_shards.store import Store
from jobs import local_slurm, runs, slurm_conf
from jobs import slurm as slurm_commands
from jobs.blame import excluded
from jobs.cli import main
from jobs.daemons import wait_until
from jobs.launch import launch
from jobs.runs import Job
from jobs.site import Site
from jobs.start import Start, events
from pipeline.config import load
from pipeline.run import Run
from tests.conftest import kept_environment, skip_without_slurm
from tests.jobs import stand_in

pytestmark = pytest.mark.slow
DEADLINE_S = 120.0


class Scene:
    """Two nodes of the cluster, the stand-in trainer, and folders of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.code, self.jobs = folder, stand_in.make(folder / "code"), list[Job]()
        self.site = Site(
            name="here",
            shared_dir=str(folder / "shared"),
            nodes=2,
            time_limit_min=10,
            signal_delay_s=20,
            setup=("set -euo pipefail", "cd /"),  # after which the job is what it would be without
            environment=environment,
        )

    def start(self, **config: Any) -> Job:
        values = {"steps": 15, "save_every": 5, **config}
        self.jobs.append(launch(self.site, "run", f"file://{self.folder}/store/run", values, code=self.code))
        return self.jobs[-1]


@pytest.fixture
def scene(slurm: Any, tmp_path: Path) -> Iterator[Scene]:
    tmp_path.chmod(0o755)
    scene = Scene(tmp_path, slurm.environment)
    yield scene
    for job in scene.jobs:
        if runs.state(job) is not None:
            runs.end(job)


@pytest.fixture
def alone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A cluster of its own: no other test's job takes a node, so a job gets the first ones that are not kept out."""
    skip_without_slurm()
    tmp_path.chmod(0o755)
    own = local_slurm.start_slurm(tmp_path_factory.mktemp("slurm"), slurm_conf.Settings(nodes=4))
    try:
        with kept_environment():
            os.environ.update(own.environment())
            yield Scene(tmp_path, own.environment())
    finally:
        own.stop()


def wait(job: Job) -> None:
    assert wait_until(lambda: runs.state(job) is None, DEADLINE_S, 0.2), tails(job)


def wait_for_ranks(job: Job) -> None:
    assert wait_until(lambda: bool(said(job, 0)) and bool(said(job, 1)), DEADLINE_S), tails(job)


def said(job: Job, rank: int) -> list[dict[str, Any]]:
    """What a rank said when it began, start by start."""
    path = job.run_dir / f"said-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tails(job: Job) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted((job.run_dir / "logs").glob("*.out")))


def files_with(text: bytes, *folders: Path) -> list[Path]:
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in found if text in path.read_bytes()]


def ended(job: Job, number: int) -> str | None:
    outcome = Start(job.run_dir, job.id, number).outcome()
    return outcome and outcome.outcome


def test_a_preempted_job_saves_is_requeued_and_goes_on_from_there_on_two_nodes(scene, monkeypatch):
    monkeypatch.setenv("SECRET_THING", "planted-secret")
    job = scene.start(steps=25)
    wait_for_ranks(job)
    (scene.code / "pipeline" / "train.py").write_text("raise RuntimeError('the requeued job runs edited code')")
    runs.preempt(job)
    wait(job)
    assert (ended(job, 0), ended(job, 1)) == ("preempted", "finished"), tails(job)
    first, second = said(job, 0), said(job, 1)
    assert [one["step"] for one in first] == [one["step"] for one in second]
    assert 0 < first[1]["step"] < 25
    for both in zip(first, second, strict=True):
        assert [(one["rank"], one["local_rank"], one["world"]) for one in both] == [(0, 0, 2), (1, 0, 2)]
        assert both[0]["node"] != both[1]["node"]
        assert {one["SECRET_THING"] for one in both} == {None}
        assert all(Path(one["code"]).is_relative_to(job.run_dir / "snapshot") for one in both)
    assert [one["SLURM_RESTART_COUNT"] for one in first] == [None, "1"]
    slurms_own = Path(scene.site.environment["SLURM_CONF"]).parents[1]
    assert files_with(b"planted-secret", job.run_dir, slurms_own) == []


def test_a_setup_that_fails_starts_no_rank_and_ends_the_job_with_its_command(scene):
    scene.site = scene.site.model_copy(update={"setup": ("export A=1", "cd /nowhere/at/all"), "max_cycles": 1})
    job = scene.start()
    wait(job)
    last = events(job.run_dir)[-1]
    assert last["event"] == "failed", tails(job)
    assert "the site's setup: `cd /nowhere/at/all` failed (exit code 1), so nothing was started" in last["reason"]
    assert said(job, 0) == []


def test_a_killed_rank_takes_the_others_along_and_the_job_is_requeued_from_its_checkpoint(scene):
    job = scene.start(die_at=12, die_from=0, die_rank=1, die_how="kill")
    wait(job)
    assert [one["step"] for one in said(job, 0)] == [0, 10], tails(job)
    assert ended(job, 1) == "finished"
    requeued = [event for event in events(job.run_dir) if event["event"] == "requeued"]
    assert [event["committed"] for event in requeued] == [10]


def test_a_host_that_failed_twice_is_kept_out_and_three_starts_without_progress_end_the_job(alone):
    job = alone.start(die_at=12, die_rank=1, die_how="kill")
    wait(job)
    first, *others = [one["node"] for one in said(job, 1)]
    assert len(others) == 3, tails(job)
    assert others[0] == first
    assert all(node != first for record in (0, 1) for node in [one["node"] for one in said(job, record)][2:])
    assert excluded(Path(alone.site.shared_dir), alone.site.exclude_hours)[0] == first
    assert runs.status(job).state.startswith("failed (3 starts without a new checkpoint (out of memory); the last")


BLINKS = 'case "$*" in *"supervise after"*) [ -e {once} ] || {{ touch {once}; exit 1; }} ;; esac; exec {python} "$@"'


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        pytest.param(BLINKS, r"Python did not judge on node\d \(exit code 1\)", id="a shared disk that blinks"),
        pytest.param(
            'exec env PATH=/nowhere {python} "$@"', r"a rank on node\d left first", id="an image without SLURM"
        ),
    ],
)
def test_the_shell_of_the_batch_script_requeues_where_python_cannot(scene, wrapper, reason):
    program, once = scene.folder / "python", scene.folder / "once"
    program.write_text(f"#!/bin/bash\n{wrapper.format(python=sys.executable, once=once)}\n")
    program.chmod(0o755)
    scene.site = scene.site.model_copy(update={"python": str(program)})
    job = scene.start(die_at=12, die_from=0, die_rank=1, die_how="kill")
    wait(job)
    assert [one["step"] for one in said(job, 0)] == [0, 10], tails(job)
    assert ended(job, 1) == "finished"
    (requeued,) = [event for event in events(job.run_dir) if event["event"] == "requeued"]
    assert re.match(reason, requeued["reason"])


def test_all_ranks_killed_at_once_are_requeued(scene):
    job = scene.start()
    wait_for_ranks(job)
    for record in job.start.ranks():
        os.kill(record.pid, signal.SIGKILL)
    wait(job)
    assert ended(job, 1) == "finished", tails(job)
    last = events(job.run_dir)[-1]
    assert re.fullmatch(r"a rank on node\d left first, without a word \(Killed\)", last["reason"]), last
    assert len(last["suspects"]) == 1


def test_a_cancel_half_way_through_a_start_ends_also_the_ranks_that_wait_for_the_others(scene):
    job = scene.start(late_rank=1)
    wait_for_ranks(job)
    runs.cancel(job)
    wait(job)
    assert ended(job, 0) == "cancelled", tails(job)
    assert [event["event"] for event in events(job.run_dir)].count("requeued") == 0
    assert runs.status(job).state == "cancelled"


def test_an_error_that_the_user_can_mend_ends_the_job_as_failed_with_the_cause(scene):
    job = scene.start(die_at=2, die_rank=1, die_how="mendable")
    wait(job)
    assert len(said(job, 0)) == 1, tails(job)
    node = said(job, 1)[0]["node"]
    assert runs.status(job).state == f"failed (rank 1 on {node}: conf/x.yaml: data.lanes: 3 does not divide)"
    shown = subprocess.run(["scontrol", "show", "job", job.id], capture_output=True, text=True, check=True)
    assert "JobState=FAILED" in shown.stdout


def test_a_cancelled_job_saves_and_is_not_requeued(scene):
    job = scene.start(steps=500)
    wait_for_ranks(job)
    runs.cancel(job)
    wait(job)
    assert (len(said(job, 0)), ended(job, 0)) == (1, "cancelled"), tails(job)
    assert any(entry.path.endswith("MANIFEST.json") for entry in Store(job.store).list("checkpoints"))


def test_a_job_cancelled_now_is_gone_at_once_and_not_requeued(scene):
    job = scene.start(steps=500)
    wait_for_ranks(job)
    runs.cancel(job, now=True)
    wait(job)
    assert runs.status(job).state == "cancelled"
    assert len(said(job, 0)) == 1


def test_what_slurm_refuses_is_one_line_and_leaves_no_folder(scene):
    site = scene.site.model_copy(update={"partition": "nope"})
    with pytest.raises(slurm_commands.SlurmError, match=r"partition: found nope; SLURM has low, main"):
        slurm_commands.check_partition(site.partition, site.nodes)
    with pytest.raises(runs.UserError, match=r"SITE=here: SLURM refused the job: .*nvalid partition") as refused:
        launch(site, "run", "s3://runs/run", {}, code=scene.code)
    assert "\n" not in str(refused.value)
    assert not (scene.folder / "shared" / "run").exists()


@pytest.fixture
def setting(s3: Any, slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Setting]":
    environment = {**s3.environment, **slurm.environment}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # what a test's site changes is put back after the test
    setting = Setting(tmp_path, s3.bucket("shards"), s3.bucket("runs"), environment)
    yield setting
    for job in setting.held:
        monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        slurm_commands.cancel(job)


class Setting:
    """A config, a site and a shard set that go together, until a test spoils one of them."""

    def __init__(self, folder: Path, data: str, store: str, environment: dict[str, str]) -> None:
        self.shared, self.store, self.data = folder / "shared", store, data
        self.conf, self.site_file = folder / "mine.yaml", folder / "here.yaml"
        self.values: dict[str, Any] = {
            "store": store,
            "data": {"url": data, "batch": 16, "lanes": 4, "chunk_samples": 4, "window_chunks": 4},
            "train": {"steps": 10},
        }
        self.site: dict[str, Any] = {"shared_dir": str(self.shared), "nodes": 2, "environment": environment}
        self.held: list[str] = []  # jobs that only wait
        self.put_manifest(samples=200)
        self.stored = Store(store)  # it keeps the key that it connected with, whatever a test does to the environment
        assert self.stored.list() == []

    def put_manifest(self, samples: int) -> None:
        shards = (samples,) if samples else ()
        manifest = Manifest("layout", "contents", samples, shards, tuple(1000 * n for n in shards), {}, {})
        manifest.save(Store(self.data), create_only=False)

    def submit(self, *more: str) -> int:
        self.conf.write_text(yaml.safe_dump(self.values))
        self.site_file.write_text(yaml.safe_dump(self.site))
        return main(["submit", str(self.conf), "--run", "run", "--site", str(self.site_file), *more])


def wrong_key(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    right = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).read_text()
    lines = ["aws_secret_access_key = wrong" if "secret" in line else line for line in right.splitlines()]
    path = setting.conf.with_name("credentials")
    path.write_text("\n".join(lines) + "\n")
    setting.site["environment"] = {**setting.site["environment"], "AWS_SHARED_CREDENTIALS_FILE": str(path)}


def dead_controller(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    text = Path(setting.site["environment"]["SLURM_CONF"]).read_text()
    path = setting.conf.with_name("slurm.conf")
    lines = ["SlurmctldPort=9" if line.startswith("SlurmctldPort") else line for line in text.splitlines()]
    path.write_text("\n".join(["MessageTimeout=2" if "MessageTimeout" in line else line for line in lines]) + "\n")
    setting.site["environment"] = {**setting.site["environment"], "SLURM_CONF": str(path)}


def no_slurm_conf(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    setting.site["environment"] = {**setting.site["environment"], "SLURM_CONF": "/nowhere/slurm.conf"}


def another_config(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    setting.conf.write_text(yaml.safe_dump(setting.values))
    config = load(setting.conf)
    Run.start(
        Store(setting.store).at("run"), setting.conf.parent / "before", config, ShardSet.open(Store(setting.data))
    )
    setting.values["optim"] = {"lr": 0.7}


def busy(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    command = [
        "sbatch",
        "--parsable",
        "--hold",
        "--job-name=farseer-run",
        f"--comment={setting.store}/run",
        "--output=/dev/null",
        "--wrap",
        "true",
    ]
    setting.held.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


SPOILED: dict[str, tuple[Callable[[Setting, pytest.MonkeyPatch], None], str]] = {
    "no such bucket for shards": (
        lambda s, _: s.values["data"].update(url="s3://photos/x"),
        "no such bucket at http://.*; it has: runs, shards",
    ),
    "no such bucket for runs": (lambda s, _: s.values.update(store="s3://nope"), "s3://nope: no such bucket"),
    "wrong key": (wrong_key, "key"),
    "no shards at that place": (lambda s, _: s.values["data"].update(url="s3://shards/nowhere"), "make shards"),
    "empty shard list": (lambda s, _: s.put_manifest(0), "the shard set is empty"),
    "too small a set": (lambda s, _: s.put_manifest(40), "data"),
    "ranks do not divide lanes": (lambda s, _: s.site.update(nodes=3), "3 ranks"),
    "unknown config key": (lambda s, _: s.values["data"].update(lane=4), "data.lane: unknown key.*did you mean lanes"),
    "unknown site key": (lambda s, _: s.site.update(partitoin="x"), "partitoin: unknown key"),
    "unwritable shared folder": (
        lambda s, _: s.site.update(shared_dir="/proc/nowhere"),
        "shared_dir: /proc/nowhere cannot",
    ),
    "SLURM not reachable": (dead_controller, "SLURM does not answer .*make cluster-up"),
    "no slurm.conf": (no_slurm_conf, "SLURM does not answer .*/nowhere/slurm.conf"),
    "no such partition": (lambda s, _: s.site.update(partition="gpu"), "partition: found gpu; SLURM has low, main"),
    "too many nodes": (
        lambda s, _: [s.site.update(nodes=16), s.values["data"].update(lanes=16, window_chunks=2)],
        "nodes: found 16; part",
    ),
    "a job is on it": (busy, "is on it already"),
    "another config": (another_config, "optim.lr: 0.3 -> 0.7.*FORCE=1"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_work_is_one_line_exit_code_2_and_nothing_written(name, setting, monkeypatch, capsys):
    spoil, says = SPOILED[name]
    spoil(setting, monkeypatch)
    before = setting.stored.list()
    assert setting.submit() == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("farseer: ")
    assert told.err.count("\n") == 1, told.err
    assert re.search(says, told.err), told.err
    assert not setting.shared.exists()
    assert setting.stored.list() == before
