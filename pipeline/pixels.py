"""From encoded images and draws to finished crops.

DALI decodes, on a CPU or a GPU. On a GPU its graph also cuts, resizes and flips each crop in one antialiased step, and
blurs; on a CPU pipeline.crops does, faster. DALI draws no random number. It has no limit on the size of an image
either: packing has, the reader's checksums see to it that the bytes are those that were packed, and none is decoded
whose header says another size than the index.
"""

import re
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import ceil
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from nvidia.nvimgcodec import CodeStream
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from data_shards.exif import orientation, turned_by
from data_shards.kinds import kind_of
from pipeline.augment import AugmentSettings, Draws, blur_kernels, philox
from pipeline.crops import from_crops, from_images

NEEDLESS = "nvidia-dali-cuda120 is no longer shipped"  # with cuFFT and NPP, of which no node here asks anything
warnings.filterwarnings("ignore", NEEDLESS)


class UndecodableError(Exception):
    """The run of a batch failed: an image does not decode, or not to the size that its boxes were drawn for."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """n images before they are decoded, and what becomes of them.

    images: bytes. sizes: (n, 2), heights and widths as they should be. draws: one a crop, equal sizes side by side.
    """

    images: Sequence[bytes]
    sizes: NDArray[np.int64]
    draws: list[Draws]


class Graph:
    """DALI's graph and what follows it: encoded images and draws in, finished crops out.

    augment: gives mean, std and the largest sigma. sizes: of each crop, pixels. batch: samples at most. depth: batches
    in work at a time. feed: gives the next batch (StopIteration: there is none), called whenever one is scheduled;
    without it the graph takes single batches, by `run`. threads: for decoding, on a CPU also for cutting.
    hardware_jpeg: the share of JPEGs that a GPU's decoding engine takes. dali_cuts: whether DALI makes the crops on a
    CPU as it does on a GPU.
    """

    def __init__(
        self,
        augment: AugmentSettings,
        sizes: list[int],
        batch: int,
        device: torch.device,
        *,
        threads: int = 1,
        hardware_jpeg: float = 0.0,
        depth: int = 1,
        feed: Callable[[], Encoded] | None = None,
        dali_cuts: bool = False,
    ) -> None:
        self._augment, self._device = augment, device
        self._dali_cuts = dali_cuts or device.type == "cuda"
        self._single: list[Encoded] = []
        self._faults: deque[str | None] = deque()  # of each batch in work: what is wrong with a header
        self._pool = ThreadPoolExecutor(threads) if threads > 1 and not self._dali_cuts else None
        self._pipeline: Any = define(
            sizes if self._dali_cuts else [],
            lambda: self._inputs(feed() if feed else self._single[0]),
            "mixed" if device.type == "cuda" else "cpu",
            hardware_jpeg,
            batch_size=batch,
            num_threads=threads,
            device_id=device.index if device.type == "cuda" else None,
            prefetch_queue_depth=depth,
        )

    def schedule(self) -> None:
        self._pipeline.schedule_run()

    def collect(self, batch: Encoded) -> list[Tensor]:
        """(n, count, 3, s, s) float32 for each size, of the oldest batch scheduled, which is this one."""
        fault = self._faults.popleft()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            *pixels, shapes = self._pipeline.share_outputs(stream)
        except RuntimeError as error:
            raise failure(error, self._device) from error
        finally:
            self._pipeline.release_outputs()
        if fault is not None:
            raise UndecodableError(fault)
        decoded = np.array(shapes.as_tensor())[:, :2]
        for i in np.flatnonzero((decoded != batch.sizes).any(axis=1)):
            raise UndecodableError(_of_another_size(decoded[i], batch.sizes[i]))
        # no copy: DALI's default executor does not touch the memory of an output that someone holds
        if self._dali_cuts:
            return from_crops([from_dlpack(crop.as_tensor()) for crop in pixels], batch.draws, self._augment)
        return from_images([from_dlpack(image) for image in pixels[0]], batch.draws, self._augment, self._pool)

    def run(self, batch: Encoded) -> list[Tensor]:
        """The crops of this batch alone."""
        self._single = [batch]
        self.schedule()
        return self.collect(batch)

    def _inputs(self, batch: Encoded) -> list[Any]:
        """What DALI is fed: n encoded images, and four arguments a crop where it cuts."""
        faults = list(map(_fault, batch.images, batch.sizes))
        self._faults.append(next(filter(None, faults), None))
        shown = [_blank(batch.sizes[i]) if fault else batch.images[i] for i, fault in enumerate(faults)]
        encoded = [np.frombuffer(image, np.uint8) for image in shown]
        return [encoded, *(crop_arguments(batch.draws, self._augment) if self._dali_cuts else [])]


_SAMPLES = {np.dtype(np.uint8), np.dtype(np.uint16)}


def _fault(image: bytes, size: NDArray[np.int64]) -> str | None:
    """What is wrong with an image by its header, as the parser reads it that DALI asks too; 10 us.

    DALI must not meet such a one. In a batch of 32 images or more, whose headers it reads in several threads, one that
    it cannot read ends the process (2.4: the error leaves the frame that the other threads still work on), and so does
    a box beyond the image.
    """
    kind = kind_of(image)
    if kind is None:
        return "does not decode: no whole file of a kind that is packed"
    try:
        stream = CodeStream(image)
        found, channels, samples = (stream.height, stream.width), stream.num_channels, stream.dtype
    except (RuntimeError, TypeError) as error:  # the latter: of samples of no known type
        return f"does not decode: {error}"
    if not channels or samples not in _SAMPLES:
        return f"does not decode: {channels} channels of {samples}"
    if found == (wanted := tuple(size.tolist())) or (found[::-1] == wanted and _is_turned(image, kind)):
        return None
    return _of_another_size(found, wanted)


def _is_turned(image: bytes, kind: str) -> bool:
    """Whether DALI shows the picture with its sides exchanged."""
    turned, agreed = (turned_by(image)[0], True) if kind == "TIFF" else orientation(image, kind)
    return turned >= 5 and agreed


def _of_another_size(found: Sequence[int], size: Sequence[int]) -> str:
    return "decodes to {} x {} pixels, not {} x {}".format(*found, *size)


def _blank(size: NDArray[np.int64]) -> bytes:
    """A black image of that size, a PPM."""
    height, width = size.tolist()
    return b"P6 %d %d 255\n" % (width, height) + bytes(3 * height * width)


@pipeline_def
def define(sizes: list[int], feed: Callable[[], list[Any]], device: str, hardware_jpeg: float) -> Any:
    """The images as they are when there are no sizes, else the crops; and the images' shapes.

    device: that decodes, cpu or mixed.
    """
    encoded, *arguments = fn.external_source(source=feed, num_outputs=1 + 4 * len(sizes), batch=True)
    images = fn.decoders.image(
        encoded,
        device=device,
        output_type=types.DALIImageType.RGB,
        jpeg_fancy_upsampling=True,  # as the decoder of the CPU always does
        hw_decoder_load=hardware_jpeg,
    )
    pixels = crops_of(images, arguments, sizes)
    return (*(pixels or [images]), images.shape())  # type: ignore[no-untyped-call]


def crops_of(images: Any, arguments: Sequence[Any], sizes: list[int]) -> list[Any]:
    """The part of the graph that cuts, flips and blurs: nodes of uint8 crops. arguments: `crop_arguments` as nodes.

    Where no blur was drawn the kernel changes nothing. To pass such crops by would cost a GPU more: its host waits
    for each filter of a batch that was split by a condition, and copies crop by crop to join it again.
    """
    pixels = []
    for k, size in enumerate(sizes):
        start, end, across, down = arguments[4 * k : 4 * k + 4]
        crop = fn.resize(images, roi_start=start, roi_end=end, size=[size, size], antialias=True)
        for kernel in (across, down):
            crop = fn.filter(crop, kernel, border="clamp")  # type: ignore[arg-type]
        pixels.append(crop)
    return pixels


def crop_arguments(draws: list[Draws], augment: AugmentSettings) -> list[Any]:
    """Four of each crop, for `crops_of`. A box that is read from right to left comes out flipped."""
    radius = ceil(3 * augment.sigma[1])  # the same for all batches: a longer kernel may round otherwise
    arguments: list[Any] = []
    for crop in draws:
        start, end = crop.box[:, :2].astype(np.float32), (crop.box[:, :2] + crop.box[:, 2:]).astype(np.float32)
        start[crop.flip, 1], end[crop.flip, 1] = end[crop.flip, 1], start[crop.flip, 1]
        kernels = blur_kernels(crop.sigma, radius)
        arguments += [start, end, kernels[:, None, :], kernels[:, :, None]]
    return arguments


def digests(crops: list[Tensor]) -> Tensor:
    """(n,) int64 on the crops' device: 32 bits that change with any bit of a sample's crops.

    CRC32C on a CPU, which reads memory as fast as it comes; on a GPU a weighted sum, so that nothing waits.
    """
    memory = [crop.permute(0, 1, 3, 4, 2) for crop in crops]
    if memory[0].device.type == "cpu":
        arrays = [crop.numpy() for crop in memory]
        for array in arrays:
            array.flags.writeable = False  # of the view; the CRC takes nothing else
        crcs = [reduce(google_crc32c.extend, sample, 0) for sample in zip(*arrays, strict=True)]
        return torch.tensor(crcs, dtype=torch.int64)
    total = torch.zeros(len(memory[0]), dtype=torch.int64, device=memory[0].device)
    for crop in memory:
        words = crop.flatten(1).view(torch.int32)
        sums = (words * _weights(words.shape[1], words.device)).sum(1, dtype=torch.int64)
        total = (total * 0x85EBCA77 + sums) & 0xFFFFFFFF
    return total


@lru_cache(maxsize=8)
def _weights(length: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, int32: a change of one word always changes the sum."""
    places = np.zeros((4, length), np.uint64)
    places[0] = np.arange(length)
    return torch.from_numpy((philox(places, (0, 0))[0] | np.uint64(1)).astype(np.uint32).view(np.int32)).to(device)


_FULL = re.compile(
    r"out of memory|Can't allocate \d+ bytes on device|CUDA allocation failed|cudaErrorMemoryAllocation|"
    "CUDA_ERROR_OUT_OF_MEMORY|bad_alloc"
)
_BROKEN = re.compile(r"CUDA (runtime |driver )?API error|cudaError|CUDA_ERROR")


def failure(error: RuntimeError, device: torch.device) -> Exception:
    """What a failed run of the graph was. A GPU that is full or broken is no fault of an image, and replaces none."""
    text = str(error)
    if device.type == "cuda" and _FULL.search(text):
        return torch.OutOfMemoryError(f"DALI: {_reason(error)}")
    if device.type == "cuda" and _BROKEN.search(text):
        return error
    return UndecodableError(f"does not decode: {_reason(error)}")


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what was wrong."""
    lines = [line.strip(" :") for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Current pipeline")]
    return said[-1] if said else str(error)
