"""The parts of an evaluation beside what one would take or write instead, on one core.

    python -m bench.evaluate [--rounds 5]

Images: the way from an encoded image (500x375 JPEGs) to what a trunk is shown, the middle of it in 224 pixels; beside
PIL in the manner of torchvision's Resize, CenterCrop, ToTensor and Normalize. The probe: a logistic regression on the
features of a made-up trunk, a decay and all; beside scikit-learn's, ended at the same gradient. Neighbours: of a bank
in blocks; beside one matrix of all similarities, from which the best are taken. Counted is processor time, by turns.

Writes evaluate_images_vs_pil, probe_vs_sklearn and neighbours_vs_whole (how many times as fast) into var/bench.json.
"""

import io
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from bench.figures import keep, options
from bench.images import HEIGHT, WIDTH, photographs
from pipeline.augment import AugmentSettings
from pipeline.evaluate.extract import SHARE
from pipeline.evaluate.knn import nearest
from pipeline.evaluate.probe import solve
from pipeline.evaluate.views import plain
from pipeline.pixels import Encoded, Graph

SIZE, AUGMENT = 224, AugmentSettings()
BANK, ASKED, CHANNELS, CLASSES, DECAY = 20_000, 1_000, 256, 100, 0.01


def main() -> None:
    rounds = options(__doc__, rounds=5).rounds
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    (bank, labels), (asked, _) = features(BANK, 1), features(ASKED, 2)
    figures = {
        "evaluate_images_vs_pil": ratio(rounds, *lookers(photographs(64))),
        "probe_vs_sklearn": ratio(1, lambda: solve(bank, labels, CLASSES, DECAY), lambda: by_sklearn(bank, labels)),
        "neighbours_vs_whole": ratio(rounds, lambda: nearest(bank, asked, 200), lambda: in_one_matrix(bank, asked)),
    }
    keep(figures)
    sys.stdout.write("".join(f"{name}: {figure} times as fast\n" for name, figure in figures.items()))


def ratio(rounds: int, ours: Callable[[], object], peer: Callable[[], object]) -> float:
    """The median of the rounds' ratios, after a round that counts for nothing when there are several."""
    ratios = []
    for _ in range(rounds + (rounds > 1)):
        times = [time.process_time()]
        for run in (peer, ours):
            run()
            times.append(time.process_time())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return round(statistics.median(ratios[rounds > 1 :]), 2)


def lookers(images: list[bytes]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Ours and PIL's way from encoded images to one batch."""
    graph = Graph(AUGMENT, [SIZE], len(images), torch.device("cpu"))
    sizes = np.array([(HEIGHT, WIDTH)] * len(images))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (AUGMENT.mean, AUGMENT.std))

    def pil(data: bytes) -> Tensor:
        image: Image.Image = Image.open(io.BytesIO(data)).convert("RGB")
        resized = round(SIZE / SHARE)
        short = min(image.size)
        image = image.resize(
            (image.width * resized // short, image.height * resized // short), Image.Resampling.BILINEAR
        )
        left, top = ((side - SIZE) // 2 for side in image.size)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIZE, top + SIZE)))).permute(2, 0, 1)
        return (pixels.float() / 255 - mean) / std

    return (
        lambda: graph.run(Encoded(images, sizes, [plain(sizes, SIZE, SHARE)]))[0],
        lambda: torch.stack([pil(data) for data in images]),
    )


def features(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of classes that overlap, in half precision, and the labels. Correlated as a trunk's are: axes fall as 1 / n."""
    drawn, same = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    centres, mixed = torch.randn(CLASSES, CHANNELS, generator=same), torch.randn(CHANNELS, CHANNELS, generator=same)
    labels = torch.randint(CLASSES, (count,), generator=drawn)
    clouds = centres[labels] + 5 * torch.randn(count, CHANNELS, generator=drawn)
    axes = torch.linalg.qr(mixed).Q / torch.arange(1, CHANNELS + 1)[:, None]
    return (clouds @ axes).half(), labels


def by_sklearn(bank: Tensor, labels: Tensor) -> object:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    standard = bank.double()
    standard = ((standard - standard.mean(0)) / standard.std(0, correction=0)).numpy()
    with threadpool_limits(1):  # more of them on one core wait for each other
        return LogisticRegression(C=1 / (DECAY * len(bank)), tol=1e-5, max_iter=5000).fit(standard, labels.numpy())


def in_one_matrix(bank: Tensor, asked: Tensor) -> Tensor:
    similar = functional.normalize(asked.float(), dim=1) @ functional.normalize(bank.float(), dim=1).T
    return similar.topk(200, dim=1).indices


if __name__ == "__main__":
    main()
