"""A run's folder in the store, which README.md draws: its record, its attempts, its journals.

run.json is written once, by the first start; config.yaml is the newest start's. The highest of attempts/ owns the run,
all others must stop. The lines of metrics/ and events/ stand on the shared disk, too, in <run>/a01/metrics.jsonl and
events.jsonl, where they are followed at once.
"""

import json
import platform
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from data_shards.errors import UserError
from data_shards.index import ShardSet, manifest_path
from data_shards.mixture import mixed, parts_of
from data_shards.order import ORDER_VERSION, Order, make_order
from data_shards.store import AlreadyExists, NotFound, Store
from pipeline.augment import AUGMENT_VERSION
from pipeline.config import Config, differences, parse
from pipeline.journal import Journal, attempt_folders


class Superseded(UserError):
    """A newer attempt owns the run; this one must not write any more."""

    exit_code = 3


@dataclass(frozen=True)
class Record:
    """What a run is, fixed by its first start. Its checkpoints bear the fingerprint, whatever was forced later.

    layouts: of the sets that it reads, one each; layout_id is that of the whole, the same when there is one set.
    """

    fingerprint: str
    layout_id: str
    samples: int
    order_version: int
    wandb_id: str
    created: float
    config: dict[str, Any]
    layouts: tuple[str, ...] = ()
    augment_version: int = 1


def record_of(config: Config, shards: ShardSet) -> Record:
    """The record that a first start with that config and data writes."""
    return Record(
        fingerprint=config.fingerprint(),
        layout_id=shards.manifest.layout_id,
        samples=shards.manifest.samples,
        order_version=ORDER_VERSION,
        augment_version=AUGMENT_VERSION,
        wandb_id=uuid.uuid4().hex[:12],
        created=time.time(),
        config=config.dump(),
        layouts=tuple(one.manifest.layout_id for one in shards.sets),
    )


def read_record(store: Store) -> Record | None:
    """The record of the run whose folder `store` is, None when the run has never started."""
    try:
        record = Record(**json.loads(store.get("run.json")))
        return replace(record, layouts=tuple(record.layouts) or (record.layout_id,))
    except NotFound:
        return None
    except (ValueError, TypeError):
        raise UserError(
            f"{store.url}: run.json is damaged, or of another version of this program; go on with the one that "
            f"started the run, or start a new RUN"
        ) from None


def read_config(store: Store) -> Config:
    """The resolved config of a run's newest start. Raises UserError when it has never started."""
    try:
        return parse(yaml.safe_load(store.get("config.yaml")), f"{store.url}/config.yaml")
    except NotFound:
        raise UserError(f"{store.url}: no such run; make status lists those that there are") from None


def check_same(store: Store, config: Config, shards: ShardSet, force: bool = False) -> None:
    """Refuse to go on with a run under another config, on other data, by another order or with crops made otherwise.

    Raises UserError with the differences. `force` lets another config and other crops pass; other data or another order
    never.
    """
    record = read_record(store)
    if record is None:
        return
    if record.order_version != ORDER_VERSION:
        raise UserError(
            f"{store.url}: its order of the data has version {record.order_version}, this program draws version "
            f"{ORDER_VERSION}; go on with the program that started the run, or start a new RUN"
        )
    if record.augment_version != AUGMENT_VERSION and not force:
        raise UserError(
            f"{store.url}: its crops are made as by version {record.augment_version}, this program's by version "
            f"{AUGMENT_VERSION}; go on with the program that started the run, start a new RUN, or FORCE=1 to go on"
        )
    began_with = parse(record.config, f"{store.url}/run.json")  # fills in what the program has learnt since
    changed = "; ".join(differences(began_with.results(), config.results()))
    if changed and not force:
        raise UserError(f"{store.url}: began with another config ({changed}); start a new RUN, or FORCE=1 to go on")
    manifest, urls = shards.manifest, " + ".join(source.url for source in config.data.sets)
    if (record.layout_id, record.samples) != (manifest.layout_id, manifest.samples):
        raise UserError(
            f"{store.url}: began on shards with layout {record.layout_id} ({record.samples} samples), "
            f"{urls} has {manifest.layout_id} ({manifest.samples}); point data.url at the first ones, "
            f"or start a new RUN"
        )


def open_data(
    config: Config, retry_seconds: float | None = None, record: Record | None = None
) -> tuple[ShardSet, Order, Config]:
    """The shard set, the order over it, and the config with what depended on the data filled in. Raises UserError.

    retry_seconds: how long a store that does not answer is asked again; by default as the config's reader does.
    record: of a run that exists, which reads the versions of its sets that it began with, whatever was appended since.
    """
    patience = config.reader.retry_seconds if retry_seconds is None else retry_seconds
    urls = [source.url for source in config.data.sets]
    first = Store(urls[0], retry_seconds=patience, connections=config.reader.connections)
    began_on = record.layouts if record is not None and len(record.layouts) == len(urls) else [None] * len(urls)
    stores = [first, *map(first.beside, urls[1:])]
    sets = [_open(store, layout) for store, layout in zip(stores, began_on, strict=True)]
    shards = mixed(sets, config.data.shares)
    parts = parts_of(sets, config.data.shares) if len(sets) > 1 else ()
    order = make_order(config.data, shards.manifest.samples, shards.mean_bytes, shards.manifest.layout_id, parts)
    return shards, order, filled_in(config, order)


def filled_in(config: Config, order: Order) -> Config:
    """The config with what depended on the data."""
    data = config.data.model_copy(update={"chunk_samples": order.chunk_samples})
    return config.model_copy(update={"data": data})


def _open(store: Store, layout_id: str | None) -> ShardSet:
    """The version of a set with that layout; the newest when there is none, of which check_same will tell."""
    known = layout_id is not None and store.exists(manifest_path(layout_id))
    return ShardSet.open(store, layout_id if known else None)


class Run:
    """The run as one attempt of it sees it. Only rank 0 writes through it.

    local: the run's folder on the shared disk.
    """

    def __init__(self, store: Store, local: Path, attempt: int) -> None:
        self.store = store
        self.attempt = attempt
        self.local = local / f"a{attempt:02d}"
        self.local.mkdir(parents=True, exist_ok=True)
        self.metrics = Journal(self.local / "metrics.jsonl", store, f"metrics/a{attempt:02d}")
        self.events = Journal(self.local / "events.jsonl", store, f"events/a{attempt:02d}")

    @classmethod
    def start(cls, store: Store, local: Path, config: Config, shards: ShardSet) -> "Run":
        """Write the record if this is the first start, then claim the next attempt; any older attempt is fenced off."""
        record = json.dumps(asdict(record_of(config, shards))).encode()
        with suppress(AlreadyExists):
            store.put("run.json", record, create_only=True)
        check_same(store, config, shards, force=config.checkpoint.force)
        run = cls(store, local, _claim(store))
        store.put("config.yaml", yaml.safe_dump(config.dump(), sort_keys=False).encode())
        store.put(f"environment/a{run.attempt:02d}.json", json.dumps(environment()).encode())
        run._take_over()
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
        """Put the lines that the store does not have yet. Raises Superseded, StoreError; they are kept then."""
        self.fence()
        self.metrics.upload()
        self.events.upload()

    def _take_over(self) -> None:
        """Send what older attempts left on the shared disk: a checkpoint of theirs may yet be completed.

        Folders of this number or above are of another run that had the same name; their lines are put aside.
        """
        for number, folder in attempt_folders(self.local.parent).items():
            for name in ("metrics", "events"):
                path = folder / f"{name}.jsonl"
                if number >= self.attempt:
                    _put_aside(path)
                else:
                    left = Journal(path, self.store, f"{name}/a{self.attempt:02d}-left-by-{folder.name}")
                    left.take_up()
                    left.upload()


def environment() -> dict[str, Any]:
    """Code, packages and hardware, without anything secret: no variable of the environment is in it."""
    version, driver = Path(__file__).parents[1] / "VERSION", Path("/proc/driver/nvidia/version")
    usable = torch.cuda.is_available()  # the driver may be too old for GPUs that are counted all the same
    return {
        "code": version.read_text().strip() if version.exists() else None,  # the job's snapshot has one
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {found.name: found.version for found in metadata.distributions()},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if usable else None,  # type: ignore[no-untyped-call]
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if usable else [],
    }


def _put_aside(path: Path) -> None:
    path.with_suffix(".sent").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        path.rename(path.with_suffix(".old"))


def _claim(store: Store) -> int:
    taken = [int(Path(entry.path).stem) for entry in store.list("attempts")]
    number = max(taken, default=0) + 1
    owner = json.dumps({"host": platform.node(), "time": time.time()}).encode()
    while True:
        with suppress(AlreadyExists):
            store.put(_attempt_path(number), owner, create_only=True)
            return number
        number += 1


def _attempt_path(number: int) -> str:
    return f"attempts/{number:04d}.json"
