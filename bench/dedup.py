"""Time and memory of finding near duplicates among synthetic hashes, and what the hash finds on photographs.

    python -m bench.dedup growth [--images 1e6 1e7] [--memory-mib 1024] [--folder FOLDER]
    python -m bench.dedup photos [--folder FOLDER]

growth: each size in a process of its own, whose peak of resident memory is told. Of the images, 5 % are copies of the
same bytes and 10 % have a hash of 1 to 4 bits from another; all of these must be found, others come near by chance. One
bit of the hashes is constant and eight are mostly clear, so that as many fall into a bucket as photographs' do.
photos: hashes of encoded, resized and cropped photographs beside the originals', and of different ones beside each
other. FOLDER: JPEGs; by default those that `make demo` left in var/photos.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_shards.dedup import DedupSettings
from data_shards.duplicates import PLAIN, connect, count_rows, decide
from data_shards.phash import perceptual_hash

PHOTOS = Path(__file__).resolve().parent.parent / "var" / "photos"
DISTANCES = (0, 2, 4, 6, 8, 10)

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("growth", "one", "photos"))
    parser.add_argument("--images", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.what == "photos":
        print(*photo_table(photos(options.folder or PHOTOS)), sep="\n")
    elif options.what == "one":
        print(json.dumps(one(int(options.images[0]), options.memory_mib, options.folder)))
    else:
        for images in options.images:
            more = ["--folder", str(options.folder)] if options.folder else []
            command = [sys.executable, "-m", "bench.dedup", "one", "--images", str(images)]
            print(
                subprocess.check_output([*command, "--memory-mib", str(options.memory_mib), *more], text=True), end=""
            )


def one(images: int, memory_mib: int, folder: Path | None) -> dict[str, float]:
    """Make `images` synthetic ones, find the duplicates among them, and check that all and only those are found."""
    with tempfile.TemporaryDirectory(dir=folder) as name, connect(Path(name), memory_mib * 2**20) as db:
        work, settings = Path(name), DedupSettings()
        most_clear = sum(1 << bit for bit in range(5, 61, 7))
        db.execute(f"""
            INSERT INTO images
            SELECT 0, i, 100000, md5(i::VARCHAR)::UUID, ((hash(i) & (~{most_clear}::UBIGINT | hash(i + 1e12::BIGINT)))
                | (1::UBIGINT << 63)) AS hash
            FROM range({images * 85 // 100}) r(i);
            INSERT INTO images
            SELECT 0, 1e12::UBIGINT + rank, bytes, sha, hash FROM images WHERE rank < {images * 5 // 100};
            INSERT INTO images
            SELECT 0, 2e12::UBIGINT + rank, bytes, md5('near' || rank)::UUID,
                xor(hash, (1::UBIGINT << hash % 61) | (1::UBIGINT << hash // 61 % 61)
                    | (1::UBIGINT << hash // 3721 % 61) | (1::UBIGINT << hash // 226981 % 61))
            FROM images WHERE rank >= {images * 5 // 100} AND rank < {images * 15 // 100};
        """)
        made_mib = _peak_mib()
        expected = count_rows(
            db,
            f"""images i LEFT JOIN images o ON i.rank = 2e12::UBIGINT + o.rank
            WHERE i.rank >= 1e12 AND (o.rank IS NULL OR least(bit_count(i.hash), bit_count(o.hash)) >= {PLAIN})""",
        )
        start, busy, passes = time.monotonic(), time.process_time(), 0

        def show(_: str, done: int, total: int) -> None:
            nonlocal passes
            passes = total
            used = f"{time.process_time() - busy:.1f} s of a core, {_peak_mib()} MiB"
            sys.stderr.write(f"{done}/{total}: {time.monotonic() - start:.1f} s, {used}\n")

        crowded = decide(db, work, settings.distance, settings.crowd, show)
        seconds, busy = time.monotonic() - start, time.process_time() - busy
        found = count_rows(db, "gone")
        right = count_rows(db, "gone WHERE kept = rank % 1e12::UBIGINT AND rank >= 1e12")
        return {
            "images": images,
            "passes": passes,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(busy, 1),
            "peak_mib": _peak_mib(),
            "made_peak_mib": made_mib,
            "disk_mib": round(sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) / 2**20),
            "planted": expected,
            "found": found,
            "right": right,
            "crowded": crowded,
        }


def _peak_mib() -> int:
    """Of this program alone: `getrusage` counts the process that started it, too."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) // 1024


def photos(folder: Path) -> list[Image.Image]:
    """Those of a folder that can be opened, different pictures."""
    found = []
    for path in sorted([*folder.glob("train/*/*.jpg"), *folder.glob("test/*/*.jpg")] or folder.rglob("*.jpg")):
        if not path.name.startswith("planted-"):
            with Image.open(path) as image:
                found.append(image.convert("RGB"))
    return found


def changes() -> dict[str, Change]:
    """What happens to a copy of a photograph."""
    made: dict[str, Change] = {}
    for kind, quality in (("JPEG", 30), ("JPEG", 50), ("JPEG", 70), ("JPEG", 90), ("WEBP", 30), ("WEBP", 80)):
        made[f"{kind} of quality {quality}"] = lambda image, _, k=kind, q=quality: _encoded(image, k, q)
    for scale in (0.25, 0.5, 0.75, 1.5, 2.0):
        made[f"resized to {scale:g}"] = lambda image, _, s=scale: image.resize(
            (max(1, round(image.width * s)), max(1, round(image.height * s))), Image.Resampling.BICUBIC
        )
    for share in (0.02, 0.05, 0.1):
        made[f"cropped by {share:.0%} a side"] = lambda image, rng, s=share: _cropped(image, s, rng)
    return made


def distances(images: Sequence[Image.Image], change: Change) -> np.ndarray:
    """Bits between each image's hash and its changed copy's."""
    rng = np.random.default_rng(0)
    return np.array([(perceptual_hash(one) ^ perceptual_hash(change(one, rng))).bit_count() for one in images])


def apart(images: Sequence[Image.Image]) -> np.ndarray:
    """Bits between the hashes of each two images."""
    hashes = np.array([perceptual_hash(one) for one in images], np.uint64)
    first, second = np.triu_indices(len(hashes), 1)
    return np.bitwise_count(hashes[first] ^ hashes[second])


def photo_table(images: Sequence[Image.Image]) -> list[str]:
    """Per cent of changed copies found, by distance, and different pictures taken for copies."""
    large = [image.resize((500, 375)) for image in images[:100]]
    start = time.process_time()
    for image in large:
        perceptual_hash(image)
    cost = (time.process_time() - start) / len(large)
    lines = [
        f"{len(images)} photographs; {cost * 1e3:.2f} ms of a core for the hash of 500 x 375 pixels",
        f"| found within | {' | '.join(map(str, DISTANCES))} |",
        "|---" * (len(DISTANCES) + 1) + "|",
    ]
    for name, change in changes().items():
        bits = distances(images, change)
        lines.append(f"| {name} | {' | '.join(f'{(bits <= most).mean():.1%}' for most in DISTANCES)} |")
    bits = apart(images)
    lines.append(
        f"| of {len(bits):,} different pairs | {' | '.join(str((bits <= most).sum()) for most in DISTANCES)} |"
    )
    return lines


def _encoded(image: Image.Image, kind: str, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, kind, quality=quality)
    return Image.open(out)


def _cropped(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Less by a share of each side, from a place by chance."""
    width, height = (round(side * (1 - share)) for side in image.size)
    left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


if __name__ == "__main__":
    main()
