"""Images for benchmarks: photographs, and bytes in their sizes."""

import io
import random
from collections.abc import Iterator

from PIL import Image

WIDTH, HEIGHT = 500, 375  # of the photographs, in pixels


def photographs(count: int) -> list[bytes]:
    """500 x 375 JPEGs of about 45 KB, cut from the photographs that scikit-image and scikit-learn ship."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    rng = random.Random(0)
    images = []
    for k in range(count):
        photo = Image.fromarray(arrays[k % len(arrays)])
        scale = rng.uniform(0.75, 1) * min(photo.width / WIDTH, photo.height / HEIGHT)
        width, height = int(WIDTH * scale), int(HEIGHT * scale)
        left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
        cut = photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        file = io.BytesIO()
        cut.save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    return images


def random_images() -> Iterator[bytes]:
    """Bytes that nothing makes smaller, in the sizes of photographs."""
    rng = random.Random(0)
    while True:
        yield rng.randbytes(rng.randint(20_000, 70_000))
