"""Batches of crops for the training step, made ahead of it.

Bytes come from the reader, numbers from pipeline.augment, pixels from pipeline.pixels. An image that does not decode
takes its whole batch's run with it, not those before and behind. That batch alone is run again in a second instance of
the graph, after its bad samples have been found one by one and replaced by the reader; the others keep their place.

A GPU's JPEG engine may write out of order with the work around it, and no error tells of it. So one sample in
COMPARED_ONE_IN is made again on the host while training, and crops that differ are counted and warned of.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.profiler import record_function

from data_shards.errors import UserError
from data_shards.reader import BadSample, Reader, Sample
from data_shards.section import Section
from pipeline.augment import AugmentSettings, Draws, draw, philox
from pipeline.pixels import Encoded, Graph, UndecodableError, digests

COMPARED_ONE_IN = 10_000
# Mean difference of a crop in levels of 255, before colour widened it. Decoders and resizers differ by one or two,
# other images by 30 and more.
LARGEST_DIFFERENCE = 4.0


class LoaderSettings(Section):
    """How the loader runs; nothing here changes a crop on the same kind of device."""

    affects_results: ClassVar[bool] = False

    threads: PositiveInt = 1  # DALI's; on a CPU, as many others cut and colour
    queue: PositiveInt = 2  # batches that DALI works on ahead of the training step
    device: Literal["cpu", "cuda", "auto"] = "auto"
    # Share of JPEGs that the GPU's decoding engine takes. It writes out of stream order, which has corrupted images in
    # other projects: measure hashes of crops against 0 before raising it.
    hardware_jpeg: float = Field(default=0.0, ge=0, le=1)


@dataclass(slots=True)
class Batch:
    """The crops of one step on this rank.

    crops: one tensor a crop size, (B, count, 3, s, s) float32, normalised; in memory HWC, so that flatten(0, 1) is
    channels_last without a copy. ids, lanes, indices: (B,), the samples and their places, in lane order.
    digests: (B,) int64 on the host, 32 bits on each sample's crops, once `hashed` has come. replaced: how many of its
    samples stand in for others.
    """

    step: int
    crops: list[Tensor]
    ids: NDArray[np.int64]
    lanes: NDArray[np.int64]
    indices: NDArray[np.int64]
    digests: Tensor
    replaced: int
    hashed: torch.cuda.Event | None = None

    @property
    def crop_hash(self) -> int:
        """Sum over samples of a hash of (lane, index, crops), as a signed 64-bit number; waits for the digests alone.

        The sums of all ranks add up, modulo 2^64, to the same however lanes are dealt to them.
        """
        if self.hashed is not None:
            self.hashed.synchronize()
        digest, lane, index = (np.asarray(x).astype(np.uint64) for x in (self.digests, self.lanes, self.indices))
        words = philox(np.stack([digest, index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), lane]), (0, 0))
        return int((words[0] << np.uint64(32) | words[1]).sum(dtype=np.uint64).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Work:
    """A batch on its way: its samples, their places, and what the graph takes of them."""

    step: int
    samples: Sequence[Sample]
    lanes: NDArray[np.int64]
    indices: NDArray[np.int64]
    encoded: Encoded

    @classmethod
    def of(cls, step: int, samples: Sequence[Sample], augment: AugmentSettings, seed: int) -> "Work":
        lanes, indices, height, width = np.array([(s.lane, s.index, s.height, s.width) for s in samples], np.int64).T
        draws = draw(augment, seed, lanes, indices, height, width)
        encoded = Encoded([sample.data for sample in samples], np.stack([height, width], axis=1), draws)
        return cls(step, samples, lanes, indices, encoded)

    def batch(self, crops: list[Tensor], digests: Tensor, hashed: torch.cuda.Event | None = None) -> Batch:
        """With the crops that were made of it."""
        ids = np.array([sample.id for sample in self.samples], np.int64)
        replaced = sum(bool(sample.replaced) for sample in self.samples)
        return Batch(self.step, crops, ids, self.lanes, self.indices, digests, replaced, hashed)


class Loader:
    """Iterates over the batches of steps `start_step` to `end_step` - 1, made ahead of time.

    Errors of the reader (a store that does not answer, too many bad samples) end the iteration as they are.
    graph: what decodes and cuts. Tests put a faulty one in; what it makes is compared with `Graph` on the host.
    """

    def __init__(
        self,
        reader: Reader,
        augment: AugmentSettings,
        seed: int,
        start_step: int,
        end_step: int,
        settings: LoaderSettings,
        graph: type[Graph] = Graph,
    ) -> None:
        self._reader, self._augment, self._seed, self._settings = reader, augment, seed, settings
        self._graph_type = graph
        self._next_step, self._end_step = start_step, end_step
        self._length = end_step - start_step
        self._prepared: Batch | None = None
        self._sizes = [crop.size for crop in augment.crops for _ in range(crop.count)]
        self._device = device_of(settings.device)
        self._pending: deque[Work] = deque()  # scheduled, not yet asked for
        self._replay: deque[Work] = deque()  # of these, what the graph is yet to be handed
        self._failures = 0  # in a row
        self._batch = 0  # samples, known when the first batch is
        self._graph: Graph | None = None
        self._spare: Graph | None = None
        self._host: Graph | None = None
        names = ("batches_repaired", "samples_undecodable", "decode_compared", "decode_mismatch")
        self._counters: dict[str, float] = {**dict.fromkeys(names, 0), "batch_wait_s": 0.0}

    @property
    def bad(self) -> list[BadSample]:
        """The bad samples that the reader found or was told of, those of batches still ahead included."""
        return list(self._reader.bad)

    @property
    def counters(self) -> dict[str, float]:
        """The reader's, how often a decode failed, was compared with the host's and did not agree.

        batch_wait_s: how long batches have been waited for.
        """
        return {**self._reader.counters, **self._counters}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """How many batches there are in all. Lightning, which is told, asks for none before its turn."""
        return self._length

    def __next__(self) -> Batch:
        self.prepare()
        batch, self._prepared = self._prepared, None
        if batch is None:
            raise StopIteration
        return batch

    @record_function("next batch")
    def prepare(self) -> None:
        """Make the next batch, if there is one, before it is asked for: while a GPU is busy with a step."""
        if self._prepared is None and (self._pending or self._next_step < self._end_step):
            self._prepared = self._make()

    def _make(self) -> Batch:
        started, given = time.perf_counter(), _recorded() if self._device.type == "cuda" else None
        graph = self._graph or self._open()
        work = self._pending.popleft()
        crops = self._collect(graph, work)
        if crops is None:
            work, crops = self._repair(work)
        if (i := compared(work.step, len(work.samples))) is not None:
            self._compare(work.samples[i], [crop[i] for crop in crops])
        batch = work.batch(crops, *_to_host(digests(crops)))
        # else a GPU had other work all the while
        if given is None or given.query():  # type: ignore[no-untyped-call]
            self._counters["batch_wait_s"] += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Let go of DALI's threads and buffers; the reader is its owner's to close."""
        self._graph = self._spare = self._host = self._prepared = None
        self._pending.clear()
        self._replay.clear()

    def _open(self) -> Graph:
        """Start the graph on the first batch, or again on all that are pending."""
        if not self._pending:
            self._pending.append(self._fetch())
        self._batch = len(self._pending[0].samples)
        self._replay = deque(self._pending)
        self._graph = self._build(self._settings.queue, self._feed)
        self._graph.schedule()
        return self._graph

    def _build(self, depth: int, feed: Callable[[], Encoded] | None = None) -> Graph:
        threads, hardware_jpeg = self._settings.threads, self._settings.hardware_jpeg
        return self._graph_type(
            self._augment,
            self._sizes,
            self._batch,
            self._device,
            threads=threads,
            hardware_jpeg=hardware_jpeg,
            depth=depth,
            feed=feed,
        )

    def _feed(self) -> Encoded:
        """The graph's next batch. DALI calls it whenever a batch is scheduled."""
        if self._replay:
            return self._replay.popleft().encoded
        if self._next_step == self._end_step:
            raise StopIteration
        self._pending.append(self._fetch())
        return self._pending[-1].encoded

    def _fetch(self) -> Work:
        work = self._work(self._next_step, self._reader.batch(self._next_step))
        self._next_step += 1
        return work

    def _work(self, step: int, samples: Sequence[Sample]) -> Work:
        return Work.of(step, samples, self._augment, self._seed)

    def _collect(self, graph: Graph, work: Work) -> list[Tensor] | None:
        """The crops of the oldest batch in the graph, or None when its run failed; schedules another."""
        crops: list[Tensor] | None = None
        try:
            crops = graph.collect(work.encoded)
            self._failures = 0
        except UndecodableError:
            self._failures += 1
        if self._failures > 1 and self._device.type == "cuda":
            self._graph = None  # to be opened again: it is not known whether a graph on a GPU outlives failed runs
            self._failures = 0
        else:
            graph.schedule()
        return crops

    def _repair(self, work: Work) -> tuple[Work, list[Tensor]]:
        """Replace what does not decode and run the batch again; raises RuntimeError when that fails as well."""
        samples = list(work.samples)
        for i in range(len(samples)):
            while (reason := self._fault(samples[i])) is not None:
                samples[i] = self._reader.replace(samples[i], reason)
                self._counters["samples_undecodable"] += 1
        self._counters["batches_repaired"] += 1
        mended = self._work(work.step, samples)
        return mended, self._alone(mended)

    def _fault(self, sample: Sample) -> str | None:
        """Why this sample cannot be used, or None."""
        work = self._work(0, [sample])
        reason = None
        for _ in range(2 if self._device.type == "cuda" else 1):
            try:
                self._alone(work)
            except UndecodableError as error:
                reason = str(error)
                self._spare = self._spare if self._device.type == "cpu" else None  # that may be what broke
            else:
                return None
        return reason

    def _alone(self, work: Work) -> list[Tensor]:
        """Run a batch, or a part of one, with nothing ahead of it or behind."""
        if self._spare is None:
            self._spare = self._build(1)
        return self._spare.run(work.encoded)

    def _compare(self, sample: Sample, crops: list[Tensor]) -> None:
        """Make the sample again on the host."""
        work = self._work(0, [sample])
        if self._host is None:
            self._host = Graph(self._augment, self._sizes, 1, torch.device("cpu"))
        self._counters["decode_compared"] += 1
        try:
            differs = difference(crops, self._host.run(work.encoded), work.encoded.draws, self._augment)
        except UndecodableError:
            differs = float("inf")
        if differs > LARGEST_DIFFERENCE:
            self._counters["decode_mismatch"] += 1
            warnings.warn(
                f"sample {sample.id}: its crops on {self._device} differ from the host's by {differs:.0f} levels of 255"
                "; if it goes on, stop and set loader.hardware_jpeg=0",
                stacklevel=2,
            )


def compared(step: int, count: int) -> int | None:
    """Which of a rank's samples of a step is made again on the host, one in COMPARED_ONE_IN of all; None at most steps.

    All ranks have their turn at the same steps: they wait for each other at every one.
    """
    if step % max(1, COMPARED_ONE_IN // count):
        return None
    words = np.array([[step & 0xFFFFFFFF], [step >> 32], [0], [0]], np.uint64)
    return int(philox(words, (0, 1))[0, 0]) % count


def difference(crops: list[Tensor], host: list[Tensor], draws: list[Draws], augment: AugmentSettings) -> float:
    """The mean difference of the crop of one sample that differs most, in levels of 255 before its colour was changed.

    crops: (count, 3, s, s) for each size; host: the same of a batch of one; draws: of that batch.
    """
    pairs = [pair for a, b in zip(crops, host, strict=True) for pair in zip(a.cpu(), b[0], strict=True)]
    std = torch.tensor(augment.std)[:, None, None]
    gains = [max(1.0, float(crop.brightness[0] * crop.contrast[0])) for crop in draws]
    return max(255 * float(((a - b).abs() * std).mean()) / gain for (a, b), gain in zip(pairs, gains, strict=True))


def device_of(name: str) -> torch.device:
    """What cpu, cuda or auto means here. Raises UserError for a GPU that is not there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("loader.device: cuda, and torch finds no GPU on this machine; auto takes what there is")
    return torch.device("cuda", torch.cuda.current_device())


def render(
    images: Sequence[Any],
    sizes: NDArray[np.integer],
    augment: AugmentSettings,
    draws: list[Draws],
    threads: int = 1,
    device: str = "cpu",
) -> list[Tensor]:
    """Crops of n images by given draws, in one go through the same graph.

    images: encoded bytes. sizes: (n, 2), heights and widths. draws: one for each crop, equal sizes side by side; of
    `augment` only mean, std and the largest sigma count. Returns one (n, count, 3, s, s) tensor a size, as in Batch.
    Raises ValueError when an image does not decode or is of another size than said.
    """
    graph = Graph(augment, [d.size for d in draws], len(images), device_of(device), threads=threads)
    try:
        return graph.run(Encoded(images, np.asarray(sizes, np.int64), draws))
    except UndecodableError as error:
        raise ValueError(str(error)) from error


def _to_host(digested: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The digests on their way to the host, ahead of the training step's kernels, and the event of their arrival."""
    if not digested.is_cuda:
        return digested, None
    return digested.to("cpu", non_blocking=True), _recorded()


def _recorded() -> torch.cuda.Event:
    """It comes when a GPU has done all that it has been given so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
