"""What was recorded offline is found and handed to W&B's own command; whatever keeps it here is told in one line."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from data_shards.errors import UserError
from jobs.cli import main
from jobs.daemons import Process
from jobs.runs import Job
from jobs.wandb_sync import send

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
    job = Job("run", tmp_path / "run", "s3://runs/run", "local-7", Process(2**30, 0))
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
    assert send(job) == []
    assert list(here.iterdir()) == []  # that command writes a log into the folder where it is called


def test_nothing_recorded_no_key_and_no_server_are_a_line_each(
    job: Job, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="nothing was recorded offline"):
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
