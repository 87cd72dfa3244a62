"""A window of a lane as a reader holds it: which sample is at which place, and the chunks on their way or here.

Knows of no store and of no other lane; what reads the chunks, and how much memory there is, is the reader's.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_shards.cutter import Fetched, Payload
from data_shards.order import Order, Window


@dataclass
class Chunk:
    """A chunk of a window: being waited for, or here. Samples leave it as they are served.

    held_bytes: what it takes, or will take; by the mean size of samples as long as its index was not read.
    """

    first_id: int
    ready: "asyncio.Future[list[Fetched | None]]"
    held_bytes: int
    sized: bool = False
    fetched: bool = False  # it counts as held
    passed: bool = False  # its window is over

    def arrive(self, samples: Sequence[Fetched]) -> None:
        """It is here, unless its reader has failed meanwhile."""
        self.held_bytes = sum(len(sample.data) for sample in samples if isinstance(sample, Payload))
        if not self.ready.done():
            self.ready.set_result(list(samples))

    def fail(self, error: BaseException) -> None:
        """It will not come: nobody waits for it any longer."""
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # seen: asyncio need not warn of it

    def take(self, offset: int) -> Payload | None:
        """A good sample out of a chunk that is here. Only a replacement would need it again."""
        samples = self.ready.result()
        found = samples[offset]
        if not isinstance(found, Payload):
            return None
        samples[offset] = None
        self.held_bytes -= len(found.data)
        return found


@dataclass
class LaneWindow:
    """Of each place, which chunk (its slot) and which sample of it; and the chunks that are wanted of the window."""

    window: Window
    slots: list[int]
    offsets: list[int]
    chunks: dict[int, Chunk] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.window.first_index + self.window.size

    def needs(self, index: int) -> Iterator[tuple[int, int]]:
        """The slots of which something is needed from an index on, each with the index that needs it first."""
        used, first = np.unique(self.slots[index - self.window.first_index :], return_index=True)
        return zip(used.tolist(), (first + index).tolist(), strict=True)


def lay_out(order: Order, lane: int, index: int) -> LaneWindow:
    """The window of an index, with no chunk in it."""
    number, _, size = (int(value) for value in order.place(lane, index))
    slots, offsets = order.slots(lane, number, np.arange(size))
    return LaneWindow(order.window(lane, number), slots.tolist(), offsets.tolist())
