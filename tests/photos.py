"""Real photographs for tests, from packages that ship them, cut into small tiles; and what is no photograph."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def photographs() -> list[Image.Image]:
    """Six colour photographs, 300 to 640 pixels high."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    return [Image.fromarray(array) for array in arrays]


def write_tiles(folder: Path, count: int, side: int = 72) -> Path:
    """`count` JPEG tiles in folder/<photograph>/; the same files each time."""
    cut = [(n, box, photo) for n, photo in enumerate(photographs()) for box in _boxes(photo, side)]
    if count > len(cut):
        raise ValueError(f"only {len(cut)} tiles of {side} pixels are to be had")
    for i in range(count):
        n, box, photo = cut[i * len(cut) // count]
        path = folder / f"photo-{n}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop(box).save(path, quality=90)
    return folder


def bmp_of_16_bits(width: int, height: int) -> bytes:
    """Noise with five bits a channel, as `BI_RGB` has them, which nvimgcodec takes for an image of no channel."""
    pixels = np.random.default_rng(0).integers(0, 2**15, (height, width)).astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


def _boxes(photo: Image.Image, side: int) -> list[tuple[int, int, int, int]]:
    width, height = photo.size
    return [
        (x, y, x + side, y + side) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)
    ]
