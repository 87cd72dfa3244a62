"""What a run saw at one of its steps, made again: which images, with which crops, and whether these are the very ones.

The order and the crops are pure functions, so nothing of this was ever written down but two hashes in the step's row.
Lane by lane, so that it takes no more memory than a lane of the run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.order import Order
from data_shards.progress import Progress, quiet
from data_shards.reader import Reader, Sample
from data_shards.removed import Removed, read_removed
from data_shards.store import Store
from pipeline import commit
from pipeline.agreement import batch_hash
from pipeline.augment import AUGMENT_VERSION, AugmentSettings
from pipeline.config import Config
from pipeline.journal import read_events, read_metrics
from pipeline.loader import Batch, Work, device_of, render
from pipeline.pixels import digests
from pipeline.run import open_data, read_config, read_record
from pipeline.seen import name_of, quarantine

SHOWN = 32  # images, from all lanes alike
THREADS = 4


@dataclass(frozen=True)
class Shown:
    """An image of the step: its key (with its set, where there are several), its encoded bytes, its crops as in Batch.

    replaced: the samples that it stood in for.
    """

    name: str
    lane: int
    replaced: tuple[int, ...]
    image: bytes
    crops: list[Tensor]


@dataclass(frozen=True)
class Replayed:
    """same_batch, same_crops: whether the hashes are those of the step's row; None when the run has no such row.

    The crops of a run on GPUs are not those of a CPU to the bit: `device` is that of the crops made here.
    """

    run: str
    step: int
    row: dict[str, Any]
    images: int
    replaced: int
    same_batch: bool | None
    same_crops: bool | None
    device: str
    augment: AugmentSettings  # of the run
    shown: tuple[Shown, ...]

    def lines(self) -> list[str]:
        """For a terminal."""
        words = {None: "not known, the run has no row of that step", True: "the same", False: "OTHERS"}
        loss = f", loss {self.row['loss']:.4f}" if self.row.get("loss") is not None else ""
        stood_in = f", {self.replaced:,} of them in the place of others" if self.replaced else ""
        return [
            f"{self.run}, step {self.step:,}{loss}: {self.images:,} images{stood_in}",
            f"samples and places: {words[self.same_batch]}; crops, made on {self.device}: {words[self.same_crops]}",
        ]


def replay(store: Store, step: int, device: str = "auto", progress: Progress = quiet) -> Replayed:
    """Make the global batch of a step again, as the rows of metrics count them (from 1).

    store: the run's folder. device: cpu, cuda or auto. Raises UserError when the run has never started or would not get
    to that step, or an image is there no more.
    """
    record = read_record(store)
    if record is not None and record.augment_version != AUGMENT_VERSION:
        raise UserError(
            f"{store.url}: its crops are of version {record.augment_version}; the program that made them replays them"
        )
    shards, order, config = open_data(read_config(store), record=record)
    last = config.train.length(order)
    if not 1 <= step <= last:
        raise UserError(f"STEP={step}: the steps of {store.url} are 1 to {last:,}")
    row = next((row for row in read_metrics(store) if row["result"]["step"] == step), None)
    known = _Known(shards, order, config, _bad(store, step), _removed(store, shards, row))
    made, shown = _lanes(known, step - 1, device, progress)
    result = row["result"] if row is not None else {}
    in_lanes = (batch_hash(one.ids, range(lane, lane + 1), step - 1) for lane, one in enumerate(made))
    return Replayed(
        run=store.url,
        step=step,
        row=result,
        images=sum(len(one.ids) for one in made),
        replaced=sum(one.replaced for one in made),
        same_batch=_same(sum(in_lanes), result.get("batch_hash")),
        same_crops=_same(sum(one.crop_hash for one in made), result.get("crop_hash")),
        device=str(device_of(device)),
        augment=config.augment,
        shown=tuple(shown),
    )


@dataclass(frozen=True)
class _Known:
    """What a reader of the run is told."""

    shards: ShardSet
    order: Order
    config: Config
    bad: set[int]
    removed: Removed


def _lanes(known: _Known, step: int, device: str, progress: Progress) -> tuple[list[Batch], list[Shown]]:
    lanes = known.order.lanes
    made, shown = list[Batch](), list[Shown]()
    for lane in range(lanes):
        progress("lanes", lane, lanes)
        one, own = _lane(known, lane, step, device, min(-(-SHOWN // lanes), SHOWN - len(shown)))
        made.append(one)
        shown += own
    return made, shown


def _lane(known: _Known, lane: int, step: int, device: str, show: int) -> tuple[Batch, list[Shown]]:
    """What the lane gave to the step, without its crops but for those to show."""
    augment, lanes = known.config.augment, range(lane, lane + 1)
    reader = Reader(known.shards, known.order, lanes, step, known.config.reader, known.bad, known.removed)
    with reader:
        samples = reader.batch(step)
    work = Work.of(step, samples, augment, known.config.data.seed)
    images, sizes, draws = work.encoded.images, work.encoded.sizes, work.encoded.draws
    try:
        crops = render(images, sizes, augment, draws, THREADS, device)
    except ValueError as error:
        raise UserError(f"step {step + 1}, lane {lane}: an image does not decode any more: {error}") from None
    return work.batch([], digests(crops).cpu()), list(_shown(known.shards, samples[:show], crops))


def _shown(shards: ShardSet, samples: list[Sample], crops: list[Tensor]) -> Iterator[Shown]:
    for n, sample in enumerate(samples):
        own = [of_size[n : n + 1].cpu().clone() for of_size in crops]  # a view would keep all of the lane's
        url, key = name_of(shards, sample.id)
        name = key if len(shards.sets) == 1 else f"{url} {key}"
        yield Shown(name, sample.lane, sample.replaced, sample.data, own)


def _bad(store: Store, step: int) -> set[int]:
    """The samples that the run had found bad by then, as far as a checkpoint tells."""
    newest = next(iter(commit.committed(commit.survey(store))), None)
    known = quarantine(store, newest) if newest is not None else {}
    return {sample for sample, found in known.items() if found < step}


def _removed(store: Store, shards: ShardSet, row: dict[str, Any] | None) -> Removed:
    """What the attempt that did the step had been told to leave out; without its row, the last attempt."""
    told = [event for event in read_events(store) if event["event"] == "removed"]
    own = [event for event in told if row is None or event["attempt"] == row["run"]["attempt"]]
    return read_removed(shards, own[-1]["lists"]) if own else Removed()


def _same(made: int, recorded: str | None) -> bool | None:
    return None if recorded is None else f"{made % 2**64:016x}" == recorded
