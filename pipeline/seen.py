"""Whether a run has learnt from an image, and at which steps: the order is pure, so it can be asked backwards.

What the run was given is known from the order, its removal lists (of each attempt) and its quarantine: an image is
shown at its own places, unless it was removed or bad by then, and in the place of others that were. Counts to the step
of the newest checkpoint, along the attempts that led to it; what was thrown away in between does not count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

from data_shards.errors import UserError
from data_shards.index import ShardSet, sample_key
from data_shards.lookup import find
from data_shards.order import REPLACEMENTS, Order, places_to_try
from data_shards.progress import Progress, quiet
from data_shards.removed import Removed, read_removed
from data_shards.store import Store
from pipeline import commit
from pipeline.config import differences, parse
from pipeline.journal import read_events
from pipeline.run import Record, open_data, read_config, read_record


@dataclass(frozen=True)
class Sighting:
    """An image and the steps, as the rows of metrics count them, that showed it.

    shown: at its own places; in_place: the step and whose place it took; left_out: where another took its own.
    """

    url: str
    key: str
    id: int
    shown: tuple[int, ...]
    in_place: tuple[tuple[int, str], ...]
    left_out: tuple[int, ...]

    @property
    def times(self) -> int:
        return len(self.shown) + len(self.in_place)


@dataclass(frozen=True)
class Seen:
    """The answer: of each image that was meant, up to `step`. notes: what it cannot know."""

    run: str
    asked: str
    step: int
    images: tuple[Sighting, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a terminal."""
        return [line for image in self.images for line in self._told(image)] + [f"note: {note}" for note in self.notes]

    def _told(self, image: Sighting) -> Iterator[str]:
        times = f"{image.times:,} times" if image.times != 1 else "once"
        was = f"was shown {times}" if image.times else "was not shown"
        yield f"{image.url} {image.key}: {was} up to step {self.step:,}, of the newest checkpoint"
        if image.shown:
            yield f"  at step {', '.join(f'{step:,}' for step in image.shown)}"
        for step, key in image.in_place:
            yield f"  at step {step:,} in the place of {key}, which was removed or bad"
        if image.left_out:
            yield f"  left out, being removed or bad, at step {', '.join(f'{step:,}' for step in image.left_out)}"


def seen(store: Store, asked: str, progress: Progress = quiet) -> Seen:
    """Find an image by key, source or sha256 in the sets of a run, whose folder `store` is, and where it was shown.

    Raises UserError when the run has no checkpoint, or no image is known by that.
    """
    config, record = read_config(store), read_record(store)
    assert record is not None  # it is put before the config
    shards, order, _ = open_data(config, record=record)
    newest = commit.existing(store)[0]
    history = History(shards, order, newest.step, quarantine(store, newest), _attempts(store, newest))
    ids = _ids(shards, asked, progress)
    images = tuple(_sighting(history, sample) for sample in ids)
    return Seen(store.url, asked, newest.step, images, tuple(_notes(history, record, config.results(), ids)))


def quarantine(store: Store, place: commit.Place) -> dict[int, int]:
    """The samples that a run had found bad by a checkpoint: of each, the order's first step that knew it.

    Each rank that meets one lists it, at its own step.
    """
    entries = sorted(commit.read_manifest(store, place).extra["quarantine"], reverse=True)
    return {int(sample): int(step) for sample, step, _ in entries}


@dataclass(frozen=True)
class Attempt:
    """A start of a run: its steps begin at `start`, the order's step of that number; `lists` of each set were read."""

    start: int
    lists: tuple[int, ...]


@dataclass
class History:
    """What a run was given, up to `last` steps. quarantine: of each bad sample, the first step that knew it."""

    shards: ShardSet
    order: Order
    last: int
    quarantine: dict[int, int]
    attempts: Sequence[Attempt]
    _lists: dict[tuple[int, ...], Removed] = field(default_factory=dict)

    def left_out(self, sample: int, step: int) -> bool:
        """Whether the run replaced the sample at that step of the order."""
        if self.quarantine.get(sample, self.last) <= step:
            return True
        attempt = next(one for one in reversed(self.attempts) if one.start <= step)
        return sample in self.removed(attempt.lists)

    def removed(self, lists: tuple[int, ...]) -> Removed:
        if not any(lists):
            return Removed()
        if lists not in self._lists:
            self._lists[lists] = read_removed(self.shards, lists)
        return self._lists[lists]

    @cached_property
    def removed_now(self) -> Removed:
        return read_removed(self.shards)

    def places(self, sample: int) -> list[tuple[int, int, int]]:
        """(step, lane, index) of the sample, also in windows that the run has only begun."""
        window = self.order.window_samples // self.order.lane_batch + 1
        return self.order.seen(sample, self.last - 1 + window)


def _sighting(history: History, sample: int) -> Sighting:
    places = history.places(sample)
    own = [step for step, _, _ in places if step < history.last]
    url, key = name_of(history.shards, sample)
    others = sorted({stood for place in places for stood in _stood_in(history, sample, *place[1:])})
    return Sighting(
        url=url,
        key=key,
        id=sample,
        shown=tuple(step + 1 for step in own if not history.left_out(sample, step)),
        in_place=tuple((step + 1, name_of(history.shards, other)[1]) for step, other in others),
        left_out=tuple(step + 1 for step in own if history.left_out(sample, step)),
    )


def _stood_in(history: History, sample: int, lane: int, index: int) -> Iterator[tuple[int, int]]:
    """Steps at which a sample, that has this place of the order, took the place of another; and of which."""
    order = history.order
    number, place, size = (int(value) for value in order.place(lane, index))

    def left_out(there: int, step: int) -> bool:
        return history.left_out(int(order.sample(lane, number, there)), step)

    for there in _may_have_led_to(place, size, lambda there: left_out(there, history.last - 1)):
        step = (index - place + there) // order.lane_batch
        if step < history.last and not history.left_out(sample, step):
            before = takewhile(lambda tried: tried != place, places_to_try(there, size))
            if all(left_out(tried, step) for tried in before):
                yield step, int(order.sample(lane, number, there))


def _may_have_led_to(place: int, size: int, ever_left_out: Callable[[int], bool]) -> set[int]:
    """The other places of a window that are replaced by this one, or come to it when all between are left out."""
    found = {(place - k * size // 2 - k * k) % size for k in range(1, REPLACEMENTS + 1)}
    back = ((place - n) % size for n in range(1, size))
    return (found | set(takewhile(ever_left_out, back))) - {place}


def _attempts(store: Store, newest: commit.Place) -> list[Attempt]:
    """Those that led to a checkpoint, oldest first; at least one."""
    starts: dict[int, int] = {}
    lists: dict[int, tuple[int, ...]] = {}
    for event in read_events(store):
        if event["event"] in ("started", "resumed") and event["attempt"] <= newest.attempt:
            starts[event["attempt"]] = event["step"]
        elif event["event"] == "removed":
            lists[event["attempt"]] = tuple(event["lists"])
    found = [Attempt(start, lists.get(number, ())) for number, start in sorted(starts.items())] or [Attempt(0, ())]
    return [one for n, one in enumerate(found) if not any(later.start <= one.start for later in found[n + 1 :])]


def _ids(shards: ShardSet, asked: str, progress: Progress) -> list[int]:
    found, first = [], 0
    for one in shards.sets:
        found += [first + sample for sample in find(one, [asked], progress).ids.tolist()]
        first += one.manifest.samples
    if not found:
        urls = ", ".join(one.store.url for one in shards.sets)
        raise UserError(
            f"{asked!r} names no image of {urls}; give a key (000012-000345), the name of its source or its sha256; "
            f"an image whose bytes were erased is known by its key alone"
        )
    return found


def name_of(shards: ShardSet, sample: int) -> tuple[str, str]:
    """The url of a sample's set, and its key there."""
    for one in shards.sets:
        if sample < one.manifest.samples:
            return one.store.url, sample_key(*one.locate(sample))
        sample -= one.manifest.samples
    raise AssertionError


def _notes(history: History, record: Record, results: dict[str, Any], ids: list[int]) -> Iterator[str]:
    began = parse(record.config, "run.json").results()["data"]
    if changed := differences(began, results["data"]):
        yield f"the run was forced to go on with other data ({'; '.join(changed)}): this holds for the steps since then"
    known = history.removed(history.attempts[-1].lists)
    if any(sample in history.removed_now and sample not in known for sample in ids):
        yield (
            "it was removed after the run's last start: that start still shows it, unless its bytes were erased "
            "meanwhile, which no record of the run tells"
        )
