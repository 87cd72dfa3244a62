"""What W&B has not got of a run is found and goes out; whatever keeps it here is told in one line."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from data_shards.errors import UserError
from data_shards.store import Store
from jobs.cli import main
from jobs.daemons import Process
from jobs.runs import Job
from jobs.site import ROOT
from jobs.wandb_sync import send
from pipeline.config import load
from pipeline.run import Record
from tests.pipeline.wandb_server import serve

RECORD = """
import sys, wandb
run = wandb.init(mode="offline", id="run-id", dir=sys.argv[1], project="farseer", settings=wandb.Settings(silent=True))
run.log({"step": 1, "loss": 0.5})
run.finish()
"""


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that is there and knows no such key."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.asked.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """The last job of a run that is over."""
    (tmp_path / "run").mkdir()
    job = Job("run", tmp_path / "run", f"file://{tmp_path}/runs/run", "local-7", Process(2**30, 0))
    job.save()
    return job


def recorded(job: Job) -> Path:
    subprocess.run([sys.executable, "-c", RECORD, str(job.run_dir)], check=True)
    (folder,) = (job.run_dir / "wandb").glob("offline-run-*")
    return folder


@pytest.mark.slow
def test_what_the_server_refuses_is_named_and_stays_to_be_sent(
    job: Job, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = recorded(job), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=rf"not sent: {folder.name}; the same command tries again"):
        send(job)
    assert "/graphql" in Refusing.asked  # W&B's own command has asked, though it leaves with 0
    (file,) = folder.glob("*.wandb")
    file.with_name(f"{file.name}.synced").touch()  # as that command does when all has gone out
    assert send(job) == (0, 0)
    assert list(here.iterdir()) == []  # that command writes a log into the folder where it is called


@pytest.mark.slow
def test_what_was_recorded_offline_goes_out_and_then_what_a_start_online_has_lost(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(job)
    (job.run_dir / "wandb" / "run-20260101_000000-run-id").mkdir()  # of a start online, which has lost step 2
    (job.run_dir / "a01").mkdir()
    rows = [{"result": {"step": step, "loss": 0.5}, "run": {"attempt": 1}} for step in (1, 2)]
    (job.run_dir / "a01" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(job.store)
    store.put("run.json", json.dumps(asdict(Record("f", "layout", 10, 1, "run-id", 0.0, {}))).encode())
    store.put("config.yaml", yaml.safe_dump(load(ROOT / "conf" / "demo.yaml").dump()).encode())
    site = tmp_path / "site.yaml"
    site.write_text(f"executor: local\nshared_dir: {tmp_path}\n")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for _ in range(2):
            assert main(["sync", "--run", "run", "--site", str(site)]) == 0
        assert [(row["step"], row.get("loss"), row.get("result/loss")) for row in server.runs["run-id"].rows] == [
            (1, 0.5, None),
            (2, None, 0.5),
        ]
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("wandb:")]
    assert told == ["1 start recorded offline and 1 missed row sent", "W&B has all of it"]


def test_nothing_recorded_no_key_and_no_server_are_a_line_each(
    job: Job, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="W&B has recorded nothing of this run"):
        send(job)
    (job.run_dir / "wandb" / "offline-run-20260101_000000-run-id").mkdir(parents=True)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9: W&B does not answer"):
        send(job)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"no key for http://127.0.0.1:9; `wandb login`"):
        send(job)


def test_a_run_that_goes_on_is_not_sent(job: Job, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (job.run_dir / "wandb" / "offline-run-20260101_000000-run-id").mkdir(parents=True)
    monkeypatch.setattr("jobs.runs.state", lambda job: "RUNNING")
    with pytest.raises(UserError, match="job local-7, running, still writes"):
        send(job)


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"executor: local\nshared_dir: {tmp_path}\n")
    assert main(["sync", "--run", "gone", "--site", str(site)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "RUN=gone: no such run" in line
