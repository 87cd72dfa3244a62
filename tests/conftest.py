"""What tests share: one S3 server and one SLURM for the whole run, also when pytest-xdist splits it among processes."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several tests share two cores

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest

from jobs import local_s3, local_slurm, slurm_conf
from jobs.daemons import Process, exclusively

unhurried = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]
hypothesis.settings.register_profile(  # a busy machine fails no test
    "farseer", deadline=None, derandomize=True, suppress_health_check=unhurried
)
hypothesis.settings.load_profile("farseer")

RUN = "PYTEST_XDIST_TESTRUNUID"
T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: what begins last is what the other processes wait for."""

    def minutes(item: pytest.Item) -> float:
        return max((float(mark.kwargs.get("minutes", 0)) for mark in item.iter_markers("slow")), default=0.0)

    items.sort(key=minutes, reverse=True)


@dataclass(frozen=True)
class SharedS3:
    """The S3 server of this test run. `environment` leads the AWS chain to it and is already set in this process."""

    server: local_s3.S3
    environment: dict[str, str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def bucket(self, name: str = "runs") -> str:
        """A place of its own at each call, in the bucket `shards` or `runs`: `s3://<name>/<test>-<process>-<number>`."""
        if name not in self.server.buckets:
            raise ValueError(f"no bucket {name!r}; there are {', '.join(self.server.buckets)}")
        test = os.environ.get("PYTEST_CURRENT_TEST", "session").split("::")[-1].split(" ")[0]
        short = re.sub(r"[^A-Za-z0-9]+", "-", test)[:40].strip("-")
        return f"s3://{name}/{short}-{os.getpid()}-{next(self.numbers)}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedS3]:
    """A real S3 server. A test that needs it gets it running; the last process of the run stops it."""
    folder = run_folder(tmp_path_factory) / "s3"
    service = shared(folder, lambda: local_s3.start_s3(folder), lambda: local_s3.stop_s3(folder))
    with service as server, kept_environment():
        local_s3.activate(server.environment())
        yield SharedS3(server, server.environment())


@pytest.fixture(autouse=True)
def _environment_of_its_own() -> Iterator[None]:
    """What a test makes known to its process, such as the keys of a site, ends with it."""
    with kept_environment():
        yield


@dataclass(frozen=True)
class SharedSlurm:
    """The SLURM of this test run: nodes `node1` to `node4`, partitions `main` and `low` (preempted by `main`)."""

    cluster: local_slurm.Slurm
    environment: dict[str, str]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedSlurm]:
    """A real SLURM of four nodes; its variables are already set in this process."""
    skip_without_slurm()
    folder, settings = run_folder(tmp_path_factory) / "slurm", slurm_conf.Settings(nodes=4)
    service = shared(folder, lambda: local_slurm.start_slurm(folder, settings), lambda: local_slurm.stop_slurm(folder))
    with service as running, kept_environment():
        os.environ.update(running.environment())
        yield SharedSlurm(running, running.environment())


def skip_without_slurm() -> None:
    if (why := local_slurm.why_not()) is not None:
        pytest.skip(why)


def pytest_unconfigure(config: pytest.Config) -> None:
    """After all processes of the run: end what one of them left running because it was killed."""
    base = getattr(getattr(config, "_tmp_path_factory", None), "_basetemp", None)
    if base is None or hasattr(config, "workerinput"):
        return
    for folder in base.glob("shared*"):
        if (folder / "s3").is_dir():
            local_s3.stop_s3(folder / "s3")
        if (folder / "slurm").is_dir():
            local_slurm.stop_slurm(folder / "slurm")


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share, and no other run."""
    base = factory.getbasetemp()
    return base.parent / f"shared-{os.environ[RUN]}" if RUN in os.environ else base / "shared"


@contextlib.contextmanager
def shared(folder: Path, start: Callable[[], T], stop: Callable[[], None]) -> Iterator[T]:
    """Use a service together with the other processes of the run.

    `start` must go on with what runs. A process that died counts as a user no longer, so nobody waits for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusively(folder / "users.lock"):
            write_users(folder, {*users(folder), os.getpid()})
            service = start()
        yield service
    finally:
        with exclusively(folder / "users.lock"):
            others = users(folder) - {os.getpid()}
            write_users(folder, others)
            if not others:
                stop()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[], T]) -> T:
    """What `make` gives, as JSON keeps it: made by the first process of the run that needs it, the others wait."""
    folder = run_folder(factory)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusively(folder / f"{name}.lock"):
        kept = folder / f"{name}.json"
        if not kept.exists():
            made = json.dumps(make())
            kept.write_text(made)
        found: T = json.loads(kept.read_text())
    return found


def users(folder: Path) -> set[int]:
    listed = folder / "users.json"
    return {pid for pid in (json.loads(listed.read_text()) if listed.exists() else []) if Process.of(pid)}


def write_users(folder: Path, pids: set[int]) -> None:
    (folder / "users.json").write_text(json.dumps(sorted(pids)))


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
