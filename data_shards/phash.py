"""A 64-bit hash of what an image shows: few bits change when it is encoded anew, resized or cropped a little.

ImageHash's `phash`: the signs, about their median, of the 8 x 8 lowest frequencies of the grey image at 32 x 32 pixels.
So 32 of the 64 bits are set; fewer mean that frequencies are equal, which they are in an image without any detail.
"""

import imagehash
import numpy as np
from PIL import Image, ImageOps

_SIDE = 32  # what phash would bring an image to, slower
_ORIENTATION = 0x0112


def perceptual_hash(image: Image.Image) -> int:
    """The hash of a decoded image of any mode, as seen (after its EXIF orientation); 64 bits, unsigned.

    Bit 63 stands for the mean, bit 0 for the highest frequency; of two hashes, `(a ^ b).bit_count()` is the distance.
    Two distances between photographs are even numbers. The same versions of Pillow and scipy give the same hash.
    """
    # 2: what is left for the filter after whole pixels were averaged; a third of the time, and the bits stay
    small = eight_bits(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=2)
    small.info = {}  # what else the file says need not be whole
    small.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    bits = imagehash.phash(ImageOps.exif_transpose(small)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits, which Pillow would cut off at 255, by its upper ones; others as they are."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I") else image
