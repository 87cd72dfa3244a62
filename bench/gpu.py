"""Images a second from bytes in memory to crops on a GPU, and of its parts, with and without the JPEG engine.

    python -m bench.gpu

The images and crops are those of bench.loader. "Bytes to crops" is the loader's own graph with what follows it;
"decoding" the same graph without crops; "crops" cuts, blurs and colours images that lie decoded on the device. Each is
timed by the clock over 60 batches after as many to warm up. Processor time is the host's, all threads; memory is what
the device has less of than before. A share of JPEGs above 0 goes to the decoding engine of chips that have one (A100,
H100, H200, B200); others decode all on their cores.

Prints a table in Markdown and writes it, with date and hardware, into var/bench-gpu.json. Without a GPU: exit code 2.
"""

import datetime
import io
import json
import sys
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import fn
from nvidia.dali.backend import ReleaseUnusedMemory
from nvidia.dali.pipeline import pipeline_def
from PIL import Image
from torch.utils.dlpack import from_dlpack

from bench.figures import FIGURES
from bench.images import HEIGHT, WIDTH, photographs
from bench.loader import AUGMENT
from pipeline.augment import draw
from pipeline.crops import from_crops
from pipeline.pixels import Encoded, Graph, crop_arguments, crops_of, define

SIZES = [crop.size for crop in AUGMENT.crops for _ in range(crop.count)]
SHARES = (0.0, 0.65, 1.0)  # of JPEGs, to the decoding engine; 0.65 is DALI's own
BATCH, BATCHES, QUEUE, THREADS = 256, 60, 3, 8
COLUMNS = ("what", "share of the JPEG engine", "images/s", "processor ms an image", "memory MiB")


def main() -> None:
    if not torch.cuda.is_available():
        sys.stderr.write("bench.gpu: torch finds no GPU here; run it where nvidia-smi shows one\n")
        sys.exit(2)
    rows = measure(torch.device("cuda", 0))
    versions = f"torch {torch.__version__}, DALI {nvidia.dali.__version__}, {THREADS} threads"
    head = f"{datetime.date.today()}, {torch.cuda.get_device_name(0)}, {versions}, batches of {BATCH}"
    FIGURES.parent.mkdir(exist_ok=True)
    found = {"measured": head, "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows]}
    FIGURES.with_name("bench-gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{head}\n\n{table(rows)}\n")


def measure(device: torch.device) -> list[tuple[Any, ...]]:
    """A row of COLUMNS for each part. On a CPU, which has no JPEG engine and one kind of memory, to try this out."""
    images = (photographs(64) * -(-BATCH // 64))[:BATCH]
    sizes, lanes, index = np.full((BATCH, 2), (HEIGHT, WIDTH)), np.zeros(BATCH, np.int64), np.arange(BATCH)
    work = [Encoded(images, sizes, draw(AUGMENT, 0, lanes, index + k * BATCH, *sizes.T)) for k in range(4)]
    parts = [(part, share) for part in (whole, decoding) for share in (SHARES if device.type == "cuda" else (0.0,))]
    rows = []
    for part, share in [*parts, (cutting, None)]:
        before = used_bytes(device)
        run = part(work, device, share)
        timed(run, device)
        wall, worked = timed(run, device)
        made, memory = BATCH * BATCHES, used_bytes(device) - before
        rows.append((part.__doc__, share, round(made / wall), round(1e3 * worked / made, 2), round(memory / 2**20)))
        del run
        torch.cuda.empty_cache()
        ReleaseUnusedMemory()  # DALI's, which it would keep for the next part
    return rows


def whole(work: list[Encoded], device: torch.device, share: float | None) -> Callable[[], object]:
    """Bytes to crops"""
    fed, asked = cycle(work), cycle(work)
    settings: dict[str, Any] = {"threads": THREADS, "hardware_jpeg": share, "depth": QUEUE, "dali_cuts": True}
    graph = Graph(AUGMENT, SIZES, BATCH, device, feed=lambda: next(fed), **settings)
    graph.schedule()

    def run() -> None:
        graph.collect(next(asked))
        graph.schedule()

    return run


def decoding(work: list[Encoded], device: torch.device, share: float | None) -> Callable[[], object]:
    """Decoding"""
    images = [[np.frombuffer(image, np.uint8) for image in work[0].images]]
    decoder = "mixed" if device.type == "cuda" else "cpu"
    graph = define([], lambda: images, decoder, share or 0.0, **options(device))
    return lambda: graph.run(stream(device))


def cutting(work: list[Encoded], device: torch.device, _: float | None) -> Callable[[], object]:
    """Crops"""
    decoded: Any = np.stack([Image.open(io.BytesIO(image)) for image in work[0].images])
    if device.type == "cuda":
        decoded = torch.from_numpy(decoded).to(device)  # as one: a list would be copied image by image
    fed, asked = cycle(work), cycle(work)
    graph = cut_graph(decoded, lambda: crop_arguments(next(fed).draws, AUGMENT), **options(device))

    def run() -> None:
        pixels = [from_dlpack(crop.as_tensor()) for crop in graph.run(stream(device))]
        from_crops(pixels, next(asked).draws, AUGMENT)

    return run


@pipeline_def
def cut_graph(decoded: Any, arguments: Callable[[], list[Any]]) -> Any:
    place = "cpu" if isinstance(decoded, np.ndarray) else "gpu"
    images = fn.external_source(source=lambda: decoded, batch=True, device=place)
    nodes = fn.external_source(source=arguments, num_outputs=4 * len(SIZES), batch=True)
    return tuple(crops_of(images, nodes, SIZES))


def options(device: torch.device) -> dict[str, Any]:
    place = device.index if device.type == "cuda" else None
    return {"batch_size": BATCH, "num_threads": THREADS, "device_id": place, "prefetch_queue_depth": QUEUE}


def stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock and of the processor until BATCHES are done on the device."""
    since, worked = time.monotonic(), time.process_time()
    for _ in range(BATCHES):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - since, time.process_time() - worked


def used_bytes(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return total - free


def table(rows: list[tuple[Any, ...]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
