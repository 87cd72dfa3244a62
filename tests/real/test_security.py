"""No secret of the one who submits, and none that the job itself uses, is left anywhere: a real run, searched whole."""

import configparser
import gzip
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.store import Store
from jobs import runs as jobs_of
from jobs.daemons import wait_until
from jobs.local_slurm import Record
from jobs.runs import Job
from jobs.site import ROOT, Site
from jobs.submit import submit
from pipeline.config import load
from pipeline.journal import read_events
from tests.real.ranks import DEADLINE_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
PLANTED = {"MY_TOKEN": "planted-in-the-environment", "WANDB_API_KEY": "0123456789abcdef" * 2 + "planted1"}
NETRC = "machine api.wandb.ai login user password fedcba98765432100123456789abcdefplanted2\n"


@pytest.fixture
def secrets(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Those of the environment, of netrc, and the key with which the job reaches the store."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir(mode=0o755)
    (tmp_path / "home" / ".netrc").write_text(NETRC)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keys = configparser.ConfigParser()
    keys.read(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
    (profile,) = keys.sections()
    used = keys[profile]["aws_secret_access_key"]
    return [secret.encode() for secret in (*PLANTED.values(), NETRC.split()[-1], used)]


def contents(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for path in (path for folder in folders for path in folder.rglob("*")):
        try:
            if path.is_file():
                yield str(path), path.read_bytes()
        except FileNotFoundError:
            continue  # a job's spool goes with it


def stored(store: Store) -> Iterator[tuple[str, bytes]]:
    for entry in store.list():
        data = store.get(entry.path)
        yield entry.path, gzip.decompress(data) if entry.path.endswith(".gz") else data


def holding(found: Iterator[tuple[str, bytes]], *texts: bytes) -> list[str]:
    return [name for name, data in found if any(text in data for text in texts)]


def test_no_secret_is_in_store_run_folder_logs_wandb_files_or_slurms_spool_and_the_history_is_whole(
    secrets: list[bytes], slurm: Any, s3: Any, tiny_set: str, runs: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    environment = {**s3.environment, **slurm.environment}
    site = Site(name="here", shared_dir=str(tmp_path / "shared"), nodes=2, time_limit_min=10, environment=environment)
    overrides = [f"store={runs}", f"data.url={tiny_set}", "train.steps=20", "monitor.wandb=offline"]
    job = submit(load(ROOT / "conf" / "chaos.yaml", overrides), site, "searched")
    store, cluster = Store(job.store), Path(slurm.environment["SLURM_CONF"]).parents[1]
    record = Record.load(cluster)
    assert record is not None
    places = (job.run_dir, cluster, record.sockets)
    try:
        assert [event["event"] for event in read_events(store)] == ["submitted"]
        assert wait_until(lambda: (job.run_dir / "a01" / "metrics.jsonl").exists() or over(job), DEADLINE_S)
        assert holding(contents(*places), *secrets) == []
        assert any("slurm_script" in name for name in holding(contents(record.sockets), job.store.encode()))
        assert wait_until(lambda: over(job), DEADLINE_S, 0.2)
    finally:
        if not over(job):
            jobs_of.end(job)
    happened = [event["event"] for event in read_events(store)]
    assert (happened[0], happened[-1]) == ("submitted", "finished"), logs(job)
    assert holding(contents(*places), *secrets) == []
    assert holding(stored(store), *secrets) == []
    searched = holding(stored(store), b"def submit(")
    assert [f"code/{job.id}.tar.gz"] == searched, "the search must see inside the archive"
    rows = holding(contents(job.run_dir / "wandb"), b"grad_norm")
    assert any(name.endswith(".wandb") for name in rows), (happened, logs(job))


def over(job: Job) -> bool:
    return jobs_of.state(job) is None


def logs(job: Job) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted((job.run_dir / "logs").glob("*.out")))


def test_the_local_s3_and_slurm_listen_on_the_loopback_alone(s3: Any, slurm: Any) -> None:
    conf = Path(slurm.environment["SLURM_CONF"])
    record = Record.load(conf.parents[1])
    assert record is not None
    server = json.loads((s3.server.directory / "server.json").read_text())
    heard = {"s3": listening(server["pid"]), **{name: listening(one.pid) for name, one in record.running.items()}}
    assert f"{server['ports']['s3.port']}" in {address.rpartition(":")[2] for address in heard["s3"]}
    assert len(set().union(*heard.values())) > len(server["ports"]) + record.settings.nodes
    if "NoInAddrAny" not in conf.read_text():
        heard = {"s3": heard["s3"]}  # this machine's name leads elsewhere, and SLURM goes by it
    assert {address.rpartition(":")[0] for addresses in heard.values() for address in addresses} == {"127.0.0.1"}


def listening(pid: int) -> set[str]:
    """The addresses at which a process waits for others, as the kernel tells."""
    links = [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    own = {str(link).removeprefix("socket:[").removesuffix("]") for link in links if str(link).startswith("socket:")}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    places = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in own]
    return {f"{host_of(number)}:{int(port, 16)}" for number, port in places}


def host_of(number: str) -> str:
    return socket.inet_ntoa(bytes.fromhex(number)[::-1]) if len(number) == 8 else number
