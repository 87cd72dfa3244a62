"""What the colours do to crops, beside torchvision's chain as PIL does it: how many come out black, or clipped.

    python -m bench.colour

Both make 96 x 96 crops of the same photographs, each with its own draws. Writes colour_<ours|pil>_<what> into
var/bench.json, in percent: of the crops, those of which most pixels are black (black) and those of which most values
are at an end of their range (half_clipped); of all values, those that are (clipped_values).
"""

import io
import random
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.figures import keep, options
from bench.images import HEIGHT, WIDTH, photographs
from bench.loader import AUGMENT, augmented
from pipeline.augment import draw
from pipeline.loader import render

PHOTOGRAPHS = 100
SMALL = AUGMENT.crops[1]


def main() -> None:
    rounds, images = options(__doc__, rounds=48).rounds, photographs(PHOTOGRAPHS)
    for name, make in (("ours", ours), ("pil", pil)):
        found = shares([levels(make(images, part)) for part in range(rounds)])
        keep({f"colour_{name}_{key}": value for key, value in found.items()})
        sys.stdout.write(f"{name}: {', '.join(f'{key} {value} %' for key, value in found.items())}\n")


def shares(parts: list[Tensor]) -> dict[str, float]:
    """parts: (n, 3, s, s) each, levels of 255."""
    black = torch.cat([(part.amax(dim=1) == 0).float().mean(dim=(1, 2)) for part in parts])
    clipped = torch.cat([((part == 0) | (part == 255)).float().mean(dim=(1, 2, 3)) for part in parts])
    found = {"black": black > 0.5, "half_clipped": clipped > 0.5, "clipped_values": clipped}
    return {key: round(100 * float(of.float().mean()), 2) for key, of in found.items()}


def levels(crops: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (AUGMENT.mean, AUGMENT.std))
    return (255 * (crops * std + mean)).round()


def ours(images: list[bytes], part: int) -> Tensor:
    n, one = len(images), AUGMENT.model_copy(update={"crops": (SMALL,)})
    sizes = np.tile([HEIGHT, WIDTH], (n, 1))
    drawn = draw(one, part, np.zeros(n, np.int64), np.arange(n), sizes[:, 0], sizes[:, 1])[:1]
    return render(images, sizes, one, drawn)[0][:, 0]


def pil(images: list[bytes], part: int) -> Tensor:
    rng = random.Random(part)
    opened = (Image.open(io.BytesIO(image)).convert("RGB") for image in images)
    return torch.stack([augmented(rng, image, SMALL.size, SMALL.scale) for image in opened])


if __name__ == "__main__":
    main()
