"""What a node finds out about itself before the first step."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from data_shards.errors import UserError
from data_shards.store import Denied, Store, Unavailable
from jobs import preflight as looks
from jobs.preflight import BadHost, multiplies, preflight, try_clock, try_gpu
from jobs.start import Start, events
from pipeline.config import Config


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setattr(looks, "OTHERS_S", 0.3)
    start = Start(tmp_path / "shared" / "run", "7", 0)
    start.begin(0, "log")
    return start


def config(retry_seconds: float = 60.0, **checkpoint: str) -> Config:
    more = {"checkpoint": checkpoint, "reader": {"retry_seconds": retry_seconds}, "train": {"steps": 1}}
    return Config.model_validate({"store": "s3://runs", "data": {"url": "s3://x", "batch": 2, "lanes": 1}, **more})


def fit(start: Start, host: str = "node1") -> None:
    """Another node, which has found itself fit."""
    (start.folder / f"preflight-{host}.json").write_text("{}")


class Refusing(BaseHTTPRequestHandler):
    """A store that takes no request of a node whose clock is off."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"<Error><Code>RequestTimeTooSkewed</Code><Message>too large</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield "s3://runs/x"
        server.shutdown()


def away(monkeypatch: pytest.MonkeyPatch) -> str:
    """A store at which nobody listens."""
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(looks, "ANSWER_S", 0.2)
    return "s3://runs/x"


def test_a_fit_node_says_so_and_leaves_nothing_in_the_store_or_on_its_disk(start, tmp_path, capsys):
    url, local = f"file://{tmp_path}/store/run", tmp_path / "local"
    preflight(start, url, config(local_dir=str(local)), 0, 0)
    assert capsys.readouterr().out.startswith(f"farseer: node7 is fit: 0 GPUs, {local}, {url} (")
    assert json.loads((start.folder / "preflight-node7.json").read_text())["ahead_s"] is None
    assert (list(local.iterdir()), Store(url).list(), events(start.run_dir)) == ([], [], [])


def test_a_file_in_the_place_of_the_local_folder_is_the_hosts_fault_and_worth_another_start(start, tmp_path):
    (tmp_path / "local").write_text("")
    fit(start)
    with pytest.raises(BadHost, match=rf"bad host node7: {tmp_path}/local \(local saves\) cannot be written") as found:
        preflight(start, f"file://{tmp_path}/store/run", config(local_dir=str(tmp_path / "local")), 0, 0)
    start.fail(0, found.value)
    (failure,) = start.failures()
    assert (failure.suspects, failure.exit_code) == (["node7"], None)


def test_a_local_folder_that_no_node_can_write_is_told_and_no_host_is_to_blame(start, tmp_path):
    (tmp_path / "local").write_text("")
    with pytest.raises(UserError, match=rf"node7: {tmp_path}/local \(local saves\) cannot be written") as found:
        preflight(start, f"file://{tmp_path}/store/run", config(local_dir=str(tmp_path / "local")), 0, 0)
    start.fail(0, found.value)
    (failure,) = start.failures()
    assert (failure.suspects, failure.exit_code) == ([], None)


def test_a_clock_is_off_where_those_of_other_nodes_are_not(start, monkeypatch):
    monkeypatch.setattr(looks, "ahead_of_store_s", lambda url: 75.0)
    with pytest.raises(UserError, match=r"^node7: its clock is \+75 s from the store's") as found:
        try_clock("s3://runs/x", start)
    assert not isinstance(found.value, BadHost)
    fit(start)
    with pytest.raises(BadHost, match=r"^bad host node7: its clock is \+75 s from the store's"):
        try_clock("s3://runs/x", start)


def test_only_one_rank_of_a_node_looks_at_what_they_share(start, tmp_path):
    (tmp_path / "local").write_text("")
    preflight(start, f"file://{tmp_path}/store/run", config(local_dir=str(tmp_path / "local")), 1, 0)


def test_little_room_is_an_alarm_and_no_error(start, tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "ROOM_BYTES", 2**70)
    preflight(start, f"file://{tmp_path}/store/run", config(), 0, 0)
    (event,) = events(start.run_dir)
    assert event["event"] == "alarm"
    assert event["reason"].startswith("node7: only ")
    assert event["reason"].endswith(f"GB free in {start.run_dir}/checkpoints, for local saves")


def test_a_store_that_others_reach_is_the_hosts_fault(start, monkeypatch):
    fit(start)
    with pytest.raises(BadHost, match=r"bad host node7: s3://runs/x.* node1 can reach it"):
        preflight(start, away(monkeypatch), config(), 0, 0)


def test_a_store_that_is_away_for_all_is_nobodys_fault(start, monkeypatch):
    with pytest.raises(Unavailable) as found:
        preflight(start, away(monkeypatch), config(retry_seconds=0.5), 0, 0)
    assert not hasattr(found.value, "hosts")


def test_a_store_that_refuses_one_node_alone_is_the_hosts_fault(start, refusing, monkeypatch):
    monkeypatch.setattr(looks, "OTHERS_S", 30.0)
    threading.Timer(1.0, fit, (start,)).start()  # that node is slower
    with pytest.raises(BadHost, match=r"bad host node7: s3://runs/x.* \(RequestTimeTooSkewed\); node1 can reach it"):
        preflight(start, refusing, config(), 0, 0)


def test_a_store_that_refuses_all_nodes_is_said_as_it_is(start, refusing):
    with pytest.raises(Denied) as found:
        preflight(start, refusing, config(), 0, 0)
    start.fail(0, found.value)
    (failure,) = start.failures()
    assert (failure.suspects, failure.exit_code) == ([], 2)


def test_a_job_of_one_node_waits_for_no_other(start, refusing, monkeypatch):
    monkeypatch.setattr(looks, "OTHERS_S", 30.0)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    begun = time.monotonic()
    with pytest.raises(Denied):
        preflight(start, refusing, config(), 0, 0)
    assert time.monotonic() - begun < 29


def test_a_store_that_the_user_must_mend_is_said_as_it_is(start, monkeypatch):
    fit(start)
    with pytest.raises(UserError) as found:
        preflight(start, "ftp://runs/x", config(), 0, 0)
    assert not isinstance(found.value, BadHost)


def test_a_torch_that_knows_no_gpus_is_no_fault_of_the_host(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="is built without CUDA; install its CUDA build there") as found:
        try_gpu(0, 8)
    assert not isinstance(found.value, BadHost)


@pytest.mark.skipif(torch.cuda.device_count() > 90, reason="has them")
def test_gpus_that_are_not_there_are_counted(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BadHost, match=rf"{torch.cuda.device_count()} of 99 GPUs are there"):
        try_gpu(0, 99)


def test_a_gpu_that_fails_or_miscalculates_is_bad(monkeypatch):
    def fails(device: str) -> bool:
        raise RuntimeError(f"CUDA error: uncorrectable ECC error encountered on {device}\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(looks, "multiplies", fails)
    with pytest.raises(BadHost, match=r"GPU 0 does not work: CUDA error: .* on cuda:0$"):
        try_gpu(0, 1)
    monkeypatch.setattr(looks, "multiplies", lambda device: multiplies("cpu"))
    try_gpu(0, 1)
    right = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: right(a, b).index_put_((torch.tensor(3),), torch.tensor(1.0)))
    with pytest.raises(BadHost, match="GPU 0 gives wrong numbers"):
        try_gpu(0, 1)
