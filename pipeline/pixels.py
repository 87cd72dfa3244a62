"""From encoded images and draws to finished crops: decoding and cutting by DALI, colour by torch.

One graph serves CPU and GPU: each image is decoded once, each crop cut, resized and flipped out of it in one
antialiased step, and blurred where that was drawn. Colour and normalisation are one linear step on the finished crops,
clipped to the range of a pixel. SwAV has the blur after the colour; both are linear, so that only clipped pixels next
to an edge differ, and colour costs no pass of its own. DALI draws no random number. It has no limit on the size of an
image either: packing has, and the reader's checksums see to it that the bytes are those that were packed.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from math import ceil
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.augment import AugmentSettings, Draws, blur_kernels, colour, philox

# Colour runs over this many pixels at a time on a CPU, so that a piece stays in its cache
_PIECE_PIXELS = 300_000


class UndecodableError(Exception):
    """The run of a batch failed: an image does not decode, or not to the size that its boxes were drawn for."""


class Graph:
    """The DALI graph: encoded images and draws in, uint8 crops out.

    sizes: of each crop, pixels. batch: samples at most. depth: batches in work at a time. feed: gives the inputs of the
    next batch (StopIteration: there is none), called whenever one is scheduled; without it the graph takes single
    batches, by `run`. threads: DALI's. hardware_jpeg: the share of JPEGs that a GPU's decoding engine takes.
    """

    def __init__(
        self,
        sizes: list[int],
        batch: int,
        device: torch.device,
        *,
        threads: int = 1,
        hardware_jpeg: float = 0.0,
        depth: int = 1,
        feed: Callable[[], list[Any]] | None = None,
    ) -> None:
        self._device = device
        self._single: list[Any] = []
        self._pipeline: Any = _define(
            sizes,
            feed or (lambda: self._single),
            hardware_jpeg if device.type == "cuda" else None,
            batch_size=batch,
            num_threads=threads,
            device_id=device.index if device.type == "cuda" else None,
            prefetch_queue_depth=depth,
        )

    def schedule(self) -> None:
        self._pipeline.schedule_run()

    def collect(self, sizes: NDArray[np.int64]) -> list[Tensor]:
        """(n, s, s, 3) uint8 for each crop of the oldest batch scheduled. sizes: (n, 2) of its images as indexed."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            *crops, shapes = self._pipeline.share_outputs(stream)
        except RuntimeError as error:
            raise UndecodableError(_reason(error)) from error
        finally:
            self._pipeline.release_outputs()
        decoded = np.array(shapes.as_tensor())[:, :2]
        for i in np.flatnonzero((decoded != sizes).any(axis=1)):
            raise UndecodableError("decodes to {} x {} pixels, not {} x {}".format(*decoded[i], *sizes[i]))
        # no copy: DALI's default executor does not touch the memory of an output that someone holds
        return [from_dlpack(crop.as_tensor()) for crop in crops]

    def run(self, inputs: list[Any], sizes: NDArray[np.int64]) -> list[Tensor]:
        """The crops of this batch alone."""
        self._single = inputs
        self.schedule()
        return self.collect(sizes)


@pipeline_def(enable_conditionals=True)
def _define(sizes: list[int], feed: Callable[[], list[Any]], hardware_jpeg: float | None) -> Any:
    """Encoded images and five arguments a crop, in the order of `graph_inputs`. hardware_jpeg: None on the CPU."""
    encoded, *arguments = fn.external_source(source=feed, num_outputs=1 + 5 * len(sizes), batch=True)
    images = fn.decoders.image(
        encoded,
        device="cpu" if hardware_jpeg is None else "mixed",
        output_type=types.DALIImageType.RGB,
        jpeg_fancy_upsampling=True,  # as the decoder of the CPU always does
        hw_decoder_load=hardware_jpeg or 0.0,
    )
    crops = []
    for k, size in enumerate(sizes):
        start, end, blurred, across, down = arguments[5 * k : 5 * k + 5]
        crop = fn.resize(images, roi_start=start, roi_end=end, size=[size, size], antialias=True)
        if blurred:
            # gaussian_blur takes 6 to 8 times as long on a CPU
            crop = fn.filter(fn.filter(crop, across, border="clamp"), down, border="clamp")  # type: ignore[arg-type]
        crops.append(crop)
    return (*crops, images.shape())  # type: ignore[no-untyped-call]


def graph_inputs(images: Sequence[Any], draws: list[Draws], augment: AugmentSettings) -> list[Any]:
    """The graph's inputs. A box that is read from right to left comes out flipped."""
    radius = ceil(3 * augment.sigma[1])  # the same for all batches: a longer kernel may round otherwise
    inputs: list[Any] = [[np.frombuffer(image, np.uint8) for image in images]]
    for crop in draws:
        start, end = crop.box[:, :2].astype(np.float32), (crop.box[:, :2] + crop.box[:, 2:]).astype(np.float32)
        start[crop.flip, 1], end[crop.flip, 1] = end[crop.flip, 1], start[crop.flip, 1]
        kernels = blur_kernels(crop.sigma, radius)
        inputs += [start, end, crop.sigma > 0, kernels[:, None, :], kernels[:, :, None]]
    return inputs


def finish(pixels: list[Tensor], draws: list[Draws], augment: AugmentSettings) -> list[Tensor]:
    """Colour and normalise: (n, s, s, 3) uint8 for each crop to (n, count, 3, s, s) float32 for each size."""
    finished = []
    for size, group in groupby(zip(draws, pixels, strict=True), key=lambda pair: pair[0].size):
        members = list(group)
        n, device = len(members[0][1]), members[0][1].device
        crops = torch.empty(n, len(members), size, 3 * size, device=device)
        low, high = (torch.from_numpy(bound).to(device).repeat(size) for bound in _range(augment))
        for k, (crop, image) in enumerate(members):
            taps, offset = (torch.from_numpy(x).to(device).repeat(1, 1, size) for x in _taps(crop, augment))
            piece = n if device.type == "cuda" else max(1, _PIECE_PIXELS // size**2)
            for i in range(0, n, piece):
                rows = slice(i, i + piece)
                _colour(image[rows].view(-1, size, 3 * size), taps[rows], offset[rows], low, high, crops[rows, k])
        finished.append(crops.view(n, len(members), size, size, 3).permute(0, 1, 4, 2, 3))
    return finished


def _colour(pixels: Tensor, taps: Tensor, offset: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:
    """out = pixels times a 3 x 3 matrix each, plus offset, clipped; rows of interleaved channels, (n, s, 3 s).

    A channel's neighbours in memory are the other two of its pixel, so the matrix is a filter of five taps along the
    row whose weights repeat every three values: no transposition, and the same sums wherever a crop lies in a batch.
    """
    x = pixels.float()
    torch.addcmul(offset, x, taps[:, 2:3], out=out)
    for shift in (1, 2):
        out[..., shift:].addcmul_(x[..., :-shift], taps[:, 2 - shift : 3 - shift, shift:])
        out[..., :-shift].addcmul_(x[..., shift:], taps[:, 2 + shift : 3 + shift, :-shift])
    torch.clamp(out, low, high, out=out)


def _taps(crop: Draws, augment: AugmentSettings) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colour and normalisation in one, for `_colour`: taps (n, 5, 3) and offset (n, 1, 3).

    taps[:, 2 + d, c] is the weight in channel c of channel c + d.
    """
    matrix, offset = colour(crop)
    scale = 1 / (255 * np.array(augment.std))
    taps = np.zeros((len(matrix), 5, 3))
    for to in range(3):
        for source in range(3):
            taps[:, 2 + source - to, to] = matrix[:, to, source] * scale[to]
    black = -np.array(augment.mean) / np.array(augment.std)
    return taps.astype(np.float32), (offset * scale + black)[:, None, :].astype(np.float32)


def _range(augment: AugmentSettings) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Normalised black and white, (3,) each."""
    mean, std = np.array(augment.mean), np.array(augment.std)
    return (-mean / std).astype(np.float32), ((1 - mean) / std).astype(np.float32)


def digests(crops: list[Tensor]) -> Tensor:
    """(n,) int64 on the crops' device: 32 bits that change with any bit of a sample's crops.

    CRC32C on a CPU, which reads memory as fast as it comes; on a GPU a weighted sum, so that nothing waits.
    """
    memory = [crop.permute(0, 1, 3, 4, 2) for crop in crops]
    if memory[0].device.type == "cpu":
        arrays = [crop.numpy() for crop in memory]
        for array in arrays:
            array.flags.writeable = False  # of the view; the CRC takes nothing else
        return torch.tensor([_crc(sample) for sample in zip(*arrays, strict=True)], dtype=torch.int64)
    total = torch.zeros(len(memory[0]), dtype=torch.int64, device=memory[0].device)
    for crop in memory:
        words = crop.flatten(1).view(torch.int32)
        sums = (words * _weights(words.shape[1], words.device)).sum(1, dtype=torch.int64)
        total = (total * 0x85EBCA77 + sums) & 0xFFFFFFFF
    return total


def _crc(arrays: Sequence[NDArray[np.float32]]) -> int:
    value = 0
    for array in arrays:
        value = google_crc32c.extend(value, array)
    return value


@lru_cache(maxsize=8)
def _weights(length: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, int32: a change of one word always changes the sum."""
    places = np.zeros((4, length), np.uint64)
    places[0] = np.arange(length)
    return torch.from_numpy((philox(places, (0, 0))[0] | np.uint64(1)).astype(np.uint32).view(np.int32)).to(device)


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what was wrong."""
    lines = [line.strip(" :") for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Current pipeline")]
    return f"does not decode: {said[-1] if said else error}"
