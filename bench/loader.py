"""Images a second of Farseer's loader on one core, beside a loader in the manner of SwAV's official one.

    python -m bench.loader [--rounds 12]

Both make 2 x 224 + 6 x 96 crops, normalised float32 batches of 32, of the same 500 x 375 JPEGs (quality 90, about
45 KB) that lie in memory. Each runs in a process of its own, both tied to the same core, and they take turns, a batch
each, so that whatever else the machine does meets both. Counted is processor time of all threads of the process; the
ratio is the median over rounds. Writes loader_vs_pil, loader_images_s and pil_images_s into var/bench.json.

The peer is written out here with PIL, because torchvision's transforms v1 are that under other names: each crop is cut
and resized (bilinear), flipped, jittered in random order, made grey, blurred and turned into a normalised tensor;
stacking makes the batch.
"""

import io
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from bench.figures import keep, options
from bench.images import HEIGHT, WIDTH, photographs
from data_shards.reader import Sample
from pipeline.augment import AugmentSettings

BATCH = 32
AUGMENT = AugmentSettings()


def main() -> None:
    figures = compare(options(__doc__, rounds=12).rounds)
    keep(figures)
    sys.stdout.write(
        f"on one core: Farseer's loader {figures['loader_images_s']} images/s, the PIL loader "
        f"{figures['pil_images_s']}, ratio {figures['loader_vs_pil']}\n"
    )


def compare(rounds: int) -> dict[str, float]:
    """The figures, from `rounds` batches of each loader by turns."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {}
    ends: dict[str, Connection] = {}
    for name, batches in (("ours", ours), ("pil", pil)):
        ends[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, batches), daemon=True).start()
        seconds[name] = []
    for k in range(rounds + 1):
        for name, end in ends.items():
            end.send(k < rounds)
            seconds[name].append(end.recv())
    ours_s, pil_s = seconds["ours"][1:], seconds["pil"][1:]  # without the first, which builds the graph
    return {
        "loader_vs_pil": round(statistics.median(p / o for p, o in zip(pil_s, ours_s, strict=True)), 2),
        "loader_images_s": round(BATCH / statistics.median(ours_s), 1),
        "pil_images_s": round(BATCH / statistics.median(pil_s), 1),
    }


def serve(end: Connection, batches: Callable[[list[bytes]], Iterator[list[Tensor]]]) -> None:
    """A process of one loader: makes a batch when asked and answers with the processor's seconds since the last.

    It is asked by True as long as another is wanted after this one.

    What DALI prepares ahead while the other loader is timed is thus counted, with the next batch.
    """
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    made = batches(photographs(64))
    since = time.process_time()
    more = True
    while more:
        more = end.recv()
        next(made)
        now = time.process_time()
        end.send(now - since)
        since = now


class MemoryReader:
    """Gives the images by turns, as a reader of one lane."""

    def __init__(self, images: list[bytes]) -> None:
        self._images = images
        self.bad: list[object] = []
        self.counters: dict[str, float] = {}

    def batch(self, step: int) -> list[Sample]:
        indices = range(step * BATCH, (step + 1) * BATCH)
        images = self._images
        return [Sample(i % len(images), 0, i, images[i % len(images)], WIDTH, HEIGHT, ()) for i in indices]


def ours(images: list[bytes]) -> Iterator[list[Tensor]]:
    from pipeline.loader import Loader, LoaderSettings

    settings = LoaderSettings(device="cpu", threads=1)
    for batch in Loader(MemoryReader(images), AUGMENT, 0, 0, 10**9, settings):  # type: ignore[arg-type]
        yield batch.crops


def pil(images: list[bytes]) -> Iterator[list[Tensor]]:
    rng = random.Random(0)
    crops = [crop for crop in AUGMENT.crops for _ in range(crop.count)]
    step = 0
    while True:
        samples = []
        for i in range(step * BATCH, (step + 1) * BATCH):
            image = Image.open(io.BytesIO(images[i % len(images)])).convert("RGB")
            samples.append([augmented(rng, image, crop.size, crop.scale) for crop in crops])
        yield [torch.stack(crop) for crop in zip(*samples, strict=True)]
        step += 1


def augmented(rng: random.Random, image: Image.Image, size: int, scale: tuple[float, float]) -> Tensor:
    """One crop, (3, size, size), normalised."""
    left, top, width, height = cut(rng, image, scale)
    crop = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < AUGMENT.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < AUGMENT.jitter:
        crop = jittered(rng, crop)
    if rng.random() < AUGMENT.grey:
        crop = Image.merge("RGB", [crop.convert("L")] * 3)
    if rng.random() < AUGMENT.blur:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(*AUGMENT.sigma)))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (AUGMENT.mean, AUGMENT.std))
    return pixels.sub_(mean).div_(std)


def cut(rng: random.Random, image: Image.Image, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, width and height; for images of 4 to 3, which never need the fallback of ten failures."""
    while True:
        area = image.width * image.height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*(math.log(bound) for bound in AUGMENT.aspect)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            return rng.randint(0, image.width - width), rng.randint(0, image.height - height), width, height


def jittered(rng: random.Random, crop: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order, each on 8-bit pixels."""

    def factor(strength: float) -> float:
        return rng.uniform(max(0.0, 1 - strength), 1 + strength)

    def hue(image: Image.Image) -> Image.Image:
        h, s, v = image.convert("HSV").split()
        turned = np.asarray(h) + np.uint8(round(255 * rng.uniform(-AUGMENT.hue, AUGMENT.hue)) % 256)
        return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")

    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: ImageEnhance.Brightness(image).enhance(factor(AUGMENT.brightness)),
        lambda image: ImageEnhance.Contrast(image).enhance(factor(AUGMENT.contrast)),
        lambda image: ImageEnhance.Color(image).enhance(factor(AUGMENT.saturation)),
        hue,
    ]
    for step in rng.sample(steps, 4):
        crop = step(crop)
    return crop


if __name__ == "__main__":
    main()
