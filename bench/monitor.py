"""What rows, events, hashes, agreement and W&B take of a step, in a real run of one rank.

    python -m bench.monitor [--steps 60]

A RegNetY-400MF on 8 images in crops of 2 x 224 + 6 x 96 from shards in a folder, W&B offline, usage measured at each
tenth step. Counted is, by the clock, what the callback between the steps takes, saves left out; on a GPU it is the same
work beside shorter steps, so the milliseconds stand beside the share. Writes monitor_share (of a step, the median) and
monitor_ms into var/bench.json.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.figures import keep, options
from bench.images import photographs
from bench.step import LANES, config_with
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from pipeline.callback import Watch
from pipeline.config import Config
from pipeline.journal import read_metrics
from pipeline.train import Launch, run_rank

PHOTOGRAPHS = 200


def main() -> None:
    figures = measure(options(__doc__, steps=60).steps)
    keep(figures)
    sys.stdout.write(
        f"watching takes {figures['monitor_ms']} ms of a step, {figures['monitor_share']:.2%} of it on this machine\n"
    )
    sys.stdout.flush()
    os._exit(0)  # DALI's module complains of what Python leaves at a normal end


def measure(steps: int) -> dict[str, float]:
    """The figures of a run of so many steps; the first five do not count."""
    taken = watched()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), steps)
        launch = Launch(f"{folder}/run", f"file://{folder}/runs/run", 0, 0, 1, 1, "127.0.0.1", 29_400)
        run_rank(config, launch)
        rows = read_metrics(Store(launch.store))
    per_step = [sum(taken[place : place + 2]) for place in range(0, 2 * steps, 2)]  # before and after each step
    shares = [spent / row["run"]["step_s"] for spent, row in zip(per_step, rows, strict=True)]
    return {
        "monitor_share": round(statistics.median(shares[5:]), 5),
        "monitor_ms": round(1000 * statistics.median(per_step[5:]), 2),
    }


def config_of(folder: Path, steps: int) -> Config:
    (folder / "photographs").mkdir()
    for number, data in enumerate(photographs(PHOTOGRAPHS)):
        (folder / "photographs" / f"{number:04d}.jpg").write_bytes(data)
    store = Store(f"file://{folder}/shards")
    pack(folder / "photographs", store, PackSettings())
    values = config_with(False).dump()
    values["data"] |= {"url": store.url, "lanes": LANES, "chunk_samples": 4, "window_chunks": 4}
    values |= {"store": f"file://{folder}/runs", "train": {"steps": steps}, "monitor": {"wandb": "offline"}}
    return Config.model_validate(values)


def watched() -> list[float]:
    """Where the seconds of each call of the callback will be, two a step."""
    taken: list[float] = []

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any, **named: Any) -> None:
            begun = time.perf_counter()
            method(*given, **named)
            taken.append(time.perf_counter() - begun)

        return call

    Watch.on_train_batch_start = timed(Watch.on_train_batch_start)  # type: ignore[method-assign]
    Watch.on_train_batch_end = timed(Watch.on_train_batch_end)  # type: ignore[method-assign]
    return taken


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
