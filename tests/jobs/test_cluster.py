"""Processes by their identity, ports, and the configuration of the local SLURM; nothing here starts a server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_shards.errors import UserError
from jobs import cluster, daemons, local_s3, local_slurm, slurm_conf
from jobs.slurm_conf import Place, Settings


def child(code: str = "import time; time.sleep(60)") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def known(process: subprocess.Popen[bytes]) -> daemons.Process:
    found = daemons.Process.of(process.pid)
    assert found
    return found


def ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(mask >> (number - 1) & 1)


def test_a_zombie_does_not_run() -> None:
    process = child("pass")
    ours = daemons.Process.of(process.pid)
    state = Path(f"/proc/{process.pid}/stat")
    assert daemons.wait_until(lambda: ") Z " in state.read_text(), 10)
    assert daemons.Process.of(process.pid) is None
    assert ours is None or not ours.running()
    process.wait()


def test_another_process_with_the_same_id_is_not_ours() -> None:
    process = child()
    ours = known(process)
    assert ours.running()
    earlier = daemons.Process(process.pid, ours.started - 1)
    assert not earlier.running()
    daemons.stop(earlier)
    assert ours.running()
    daemons.stop(ours)
    assert not ours.running()


def test_a_process_that_ignores_the_request_to_end_is_ended() -> None:
    process = child("import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)")
    ours = known(process)
    assert daemons.wait_until(lambda: ignores(process.pid, signal.SIGTERM), 10)
    began = time.monotonic()
    daemons.stop(ours, timeout_s=0.3)
    assert not ours.running()
    assert time.monotonic() - began < 14  # it would be 15 by default


def test_a_spawned_process_is_out_of_reach_of_the_terminal_and_writes_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, time; print(os.getsid(0) == os.getpid(), dict(os.environ), flush=True); time.sleep(60)"
    process = daemons.spawn([sys.executable, "-c", code], {"ONLY": "this"}, log)
    try:
        assert daemons.wait_until(lambda: log.exists() and "this" in log.read_text(), 10)
        assert log.read_text().startswith("True")
        assert process.environment() == {"ONLY": "this"}
        assert os.getpgid(process.pid) != os.getpgid(0)
    finally:
        daemons.stop(process)
    assert daemons.Process.of(process.pid) is None


def test_free_ports_can_all_be_had_at_once() -> None:
    ports = daemons.free_ports(12)
    held = [socket.socket() for _ in ports]
    try:
        for port, holder in zip(ports, held, strict=True):
            holder.bind(("127.0.0.1", port))
            holder.listen()
        assert not any(map(daemons.is_free, ports))
    finally:
        for holder in held:
            holder.close()


def test_only_one_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    entered = threading.Event()

    def second() -> None:
        with daemons.exclusively(tmp_path / "lock"):
            entered.set()

    with daemons.exclusively(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


def test_the_servers_environment_names_files_and_no_secret(tmp_path: Path) -> None:
    local_s3._write_credentials(tmp_path)
    secret = (tmp_path / "aws" / "credentials").read_text().split("aws_secret_access_key = ")[1].strip()
    assert len(secret) >= 32
    assert set(local_s3.environment(tmp_path)) == {"AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"}
    assert secret not in str(local_s3.environment(tmp_path))


def test_keys_are_drawn_once(tmp_path: Path) -> None:
    local_s3._write_credentials(tmp_path)
    before = (tmp_path / "aws" / "credentials").read_text()
    local_s3._write_credentials(tmp_path)
    assert (tmp_path / "aws" / "credentials").read_text() == before


def test_keys_of_the_users_own_do_not_overrule_the_local_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in local_s3.OVERRIDES:
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    local_s3.activate({"AWS_PROFILE": "farseer-local"})
    assert [name for name in local_s3.OVERRIDES if name in os.environ] == []
    assert os.environ["AWS_PROFILE"] == "farseer-local"
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost"


def test_every_port_of_the_s3_server_is_ours(tmp_path: Path) -> None:
    ports = local_s3._draw_ports()
    command = local_s3._command("weed", tmp_path, ["a", "b"], ports)
    assert len(set(ports.values())) == 10
    assert all(f"-{name}={port}" in command for name, port in ports.items())
    assert "-bucket=a,b" in command


def answering(volumes: list[int]) -> ThreadingHTTPServer:
    """What S3 and its master say in a start that SeaweedFS loses a race in: buckets at once, what is stored later."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = "<Name>runs</Name>" if self.path == "/" else json.dumps({"Topology": {"Max": volumes.pop(0)}})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_the_s3_server_is_up_when_what_is_stored_can_be_read(tmp_path: Path) -> None:
    volumes = [0, 0, 45]
    fake = answering(volumes)
    ours = daemons.Process.of(os.getpid())
    assert ours
    local_s3._write_credentials(tmp_path)
    server = local_s3.Server(ours.pid, ours.started, dict.fromkeys(local_s3.SERVICES, fake.server_port))
    try:
        assert local_s3._answers(tmp_path, server, ["runs"], 10)
        assert volumes == []
    finally:
        fake.shutdown()
        fake.server_close()


def configured(hostnames: bool = True) -> str:
    place = Place(Path("/a folder/slurm"), Path("/short"), range(30000, 30004), hostnames)
    return slurm_conf.slurm_conf(Settings(nodes=3, slurmd_timeout_s=7, grace_s=11, kill_wait_s=3), place, "me")


def test_slurm_conf_holds_the_settings() -> None:
    text = configured()
    for wanted in ("SlurmdTimeout=7", "KillWait=3", "GraceTime=11", "cred_expire=5", "preempt_send_user_signal"):
        assert wanted in text
    assert text.count("NodeName=") == 3
    assert 'StateSaveLocation="/a folder/slurm/state"' in text
    assert [f"Port={port}" in text for port in range(30000, 30004)] == [True] * 4
    assert "PreemptMode=REQUEUE GraceTime=11" in text


def test_no_setting_of_slurm_conf_is_empty() -> None:
    for hostnames in (True, False):
        assert [line for line in configured(hostnames).splitlines() if line.endswith("=")] == []


def test_job_ids_of_a_later_cluster_are_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    first = slurm_conf.first_job_id()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    assert first < slurm_conf.first_job_id() < 67_043_328  # SLURM's highest


def test_sockets_go_where_their_paths_fit_and_all_can_enter(tmp_path: Path) -> None:
    short = Path("/tmp") / f"f{os.getpid()}"
    short.mkdir()
    deep = tmp_path / ("long" * 20)
    deep.mkdir()
    made = []
    try:
        assert local_slurm._socket_folder(short) == short
        for place in (deep, short / "a b"):
            place.mkdir(exist_ok=True)
            made.append(local_slurm._socket_folder(place))
            assert made[-1].parent == Path("/tmp")
        closed = short / "closed"
        (closed / "run").mkdir(parents=True)
        closed.chmod(0o700)
        made.append(local_slurm._socket_folder(closed / "run"))
        assert made[-1].parent == Path("/tmp")
    finally:
        for folder in [short / "a b", short / "closed" / "run", short / "closed", short, *made]:
            folder.rmdir()


def test_missing_programs_are_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_slurm, "PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"not installed here .slurmctld, slurmd.*; apt install slurmctld slurmd slurm-client munge"
    ):
        local_slurm.start_slurm(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_whose_own_name_has_no_address_is_told_how_it_gets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM starts there, and then stands still for ten seconds again and again."""
    monkeypatch.setattr(local_slurm, "missing_programs", list)
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-machine.invalid")
    with pytest.raises(
        UserError, match=r"no-such-machine\.invalid, which has no address; as root: echo 127\.0\.1\.1 no-such"
    ):
        local_slurm.start_slurm(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "does not run: SLURM looks up" in cluster.status(tmp_path)[1]


def test_what_runs_with_other_settings_is_told_by_the_difference() -> None:
    told = local_slurm._difference(Settings(nodes=2), Settings(nodes=4, grace_s=5))
    assert told == "SLURM runs with nodes 2, not 4, grace_s 30, not 5"


def test_status_and_down_of_a_folder_in_which_nothing_runs(tmp_path: Path) -> None:
    assert "make cluster-up" in cluster.status(tmp_path / "none")[0]
    cluster.down(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_signal_is_not_sent_to_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    process = child("pass")
    ours = daemons.Process.of(process.pid) or daemons.Process(process.pid, 0)
    process.wait()
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    daemons.stop(ours)
    assert sent == []
