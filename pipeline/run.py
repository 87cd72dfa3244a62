"""A run's folder in the store: its record, its attempts, its journals.

runs/<name>/
  run.json                     fingerprint, layout of the data, W&B id; written once, by the first start
  config.yaml                  the resolved config
  attempts/0001.json           one for each start; the highest number owns the run, all others must stop
  environment/a01.json         packages and hardware of each start
  metrics/a01-000001.jsonl     a row a step; segments, since object stores cannot append
  events/a01-000001.jsonl      started, resumed, preempted, saved, ... with time, attempt and step
  checkpoints/step-000001000-a01/
  eval/
"""

import json
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from data_shards.errors import UserError
from data_shards.index import Manifest
from data_shards.order import ORDER_VERSION
from data_shards.store import AlreadyExists, NotFound, Store
from pipeline.config import Config, differences, parse

PACKAGES = ("torch", "pytorch-lightning", "nvidia-dali-cuda130", "numpy", "s3fs", "submitit", "webdataset", "wandb")


class Superseded(UserError):
    """A newer attempt owns the run; this one must not write any more."""

    exit_code = 3


@dataclass(frozen=True)
class Record:
    """What a run is, fixed by its first start."""

    fingerprint: str
    layout_id: str
    samples: int
    order_version: int
    wandb_id: str
    created: float


def record_of(config: Config, manifest: Manifest) -> Record:
    """The record that a first start with that config and data writes."""
    return Record(
        fingerprint=config.fingerprint(),
        layout_id=manifest.layout_id,
        samples=manifest.samples,
        order_version=ORDER_VERSION,
        wandb_id=uuid.uuid4().hex[:12],
        created=time.time(),
    )


def read_record(store: Store) -> Record | None:
    """The record of the run whose folder `store` is, None when the run has never started."""
    try:
        return Record(**json.loads(store.get("run.json")))
    except NotFound:
        return None


def read_config(store: Store) -> Config:
    """The resolved config of a run that has started. Raises UserError when it has not."""
    try:
        return parse(yaml.safe_load(store.get("config.yaml")), f"{store.url}/config.yaml")
    except NotFound:
        raise UserError(f"{store.url}: no such run; farseer status lists those that there are") from None


def check_same(store: Store, config: Config, manifest: Manifest, force: bool = False) -> None:
    """Refuse to go on with a run under another config, on other data or by another order.

    Raises UserError with the differences. `force` lets another config pass; other data or another order never.
    """
    record = read_record(store)
    if record is None:
        return
    if record.order_version != ORDER_VERSION:
        raise UserError(
            f"{store.url}: its order of the data has version {record.order_version}, this program draws version "
            f"{ORDER_VERSION}; go on with the program that started the run, or start a new RUN"
        )
    if (record.layout_id, record.samples) != (manifest.layout_id, manifest.samples):
        raise UserError(
            f"{store.url}: began on shards with layout {record.layout_id} ({record.samples} samples), {config.data.url} "
            f"has {manifest.layout_id} ({manifest.samples}); point data.url at the first ones, or start a new RUN"
        )
    if record.fingerprint != config.fingerprint() and not force:
        changed = "; ".join(differences(read_config(store).results(), config.results()))
        raise UserError(f"{store.url}: began with another config ({changed}); start a new RUN, or FORCE=1 to go on")


class Run:
    """The run as one attempt of it sees it. Only rank 0 writes through it."""

    def __init__(self, store: Store, local: Path, attempt: int) -> None:
        self.store = store
        self.attempt = attempt
        self.local = local / f"a{attempt:02d}"
        self.local.mkdir(parents=True, exist_ok=True)
        self.metrics = Journal(self.local / "metrics.jsonl", store, f"metrics/a{attempt:02d}")
        self.events = Journal(self.local / "events.jsonl", store, f"events/a{attempt:02d}")

    @classmethod
    def start(cls, store: Store, local: Path, config: Config, manifest: Manifest) -> "Run":
        """Write the record if this is the first start, then claim the next attempt; any older attempt is fenced off."""
        check_same(store, config, manifest, force=config.checkpoint.force)
        try:
            record = json.dumps(asdict(record_of(config, manifest))).encode()
            store.put("run.json", record, create_only=True)
        except AlreadyExists:
            pass
        store.put("config.yaml", yaml.safe_dump(config.dump(), sort_keys=False).encode())
        run = cls(store, local, _claim(store))
        store.put(f"environment/a{run.attempt:02d}.json", json.dumps(environment()).encode())
        return run

    def fence(self) -> None:
        """Raise Superseded when a newer attempt has claimed the run."""
        if self.store.exists(_attempt_path(self.attempt + 1)):
            raise Superseded(
                f"{self.store.url}: attempt {self.attempt + 1} owns the run now; attempt {self.attempt} stops"
            )

    def event(self, name: str, **fields: Any) -> None:
        """Note what happened; it reaches the store with the next upload."""
        self.events.append({"time": time.time(), "attempt": self.attempt, "event": name, **fields})

    def upload(self) -> None:
        """Put the lines that the store does not have yet."""
        self.fence()
        self.metrics.upload()
        self.events.upload()


class Journal:
    """JSON lines: appended to a local file at once, to the store in numbered segments."""

    def __init__(self, local: Path, store: Store, prefix: str) -> None:
        self.local, self.store, self.prefix = local, store, prefix
        self._segment = 0
        self._pending: list[str] = []
        self._lock = threading.Lock()

    def append(self, line: dict[str, Any]) -> None:
        """One object a line, flushed so that another process can follow the file."""
        text = json.dumps(line) + "\n"
        with self._lock:
            self._pending.append(text)
            with self.local.open("a") as file:
                file.write(text)

    def upload(self) -> None:
        """Put the pending lines as the next segment; kept for the next call when the store refuses them."""
        with self._lock:
            if not self._pending:
                return
            self.store.put(f"{self.prefix}-{self._segment + 1:06d}.jsonl", "".join(self._pending).encode())
            self._segment += 1
            self._pending.clear()


def read_events(store: Store) -> list[dict[str, Any]]:
    """All events of a run, oldest first."""
    return sorted(_lines(store, "events"), key=lambda event: float(event["time"]))


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """The rows of a run, one a step: where an attempt began again, the rows of those before it end."""
    rows: dict[int, dict[str, Any]] = {}
    attempts: dict[int, list[dict[str, Any]]] = {}
    for row in _lines(store, "metrics"):
        attempts.setdefault(row["run"]["attempt"], []).append(row)
    for _, own in sorted(attempts.items()):
        first = min(row["result"]["step"] for row in own)
        rows = {step: row for step, row in rows.items() if step < first} | {row["result"]["step"]: row for row in own}
    return [rows[step] for step in sorted(rows)]


def environment() -> dict[str, Any]:
    """Packages and hardware, without anything secret."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "gpus": gpus,
    }


def _lines(store: Store, folder: str) -> Iterator[dict[str, Any]]:
    for entry in store.list(folder):
        yield from map(json.loads, store.get(entry.path).decode().splitlines())


def _claim(store: Store) -> int:
    taken = [int(Path(entry.path).stem) for entry in store.list("attempts")]
    number = max(taken, default=0) + 1
    while True:
        try:
            store.put(
                _attempt_path(number),
                json.dumps({"host": platform.node(), "time": time.time()}).encode(),
                create_only=True,
            )
            return number
        except AlreadyExists:
            number += 1


def _attempt_path(number: int) -> str:
    return f"attempts/{number:04d}.json"
