"""How long a save stops training, beside a bare copy of the same tensors in host memory.

    python -m bench.save [--mib 512] [--rounds 9]

One rank; the state of a network in tensors of many sizes, to a folder of this machine. Between two saves the one before
arrives, as it does while training. Writes save_stall_vs_copy (the median of the rounds' ratios), save_stall_s and
save_copy_s into var/bench.json.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.figures import keep, options
from data_shards.store import Store
from pipeline.checkpoint import Checkpointer, CheckpointSettings
from pipeline.ranks import Ranks

LARGEST_MIB = 32  # of a tensor, halved again and again for the others


def main() -> None:
    given = options(__doc__, mib=512, rounds=9)
    state = state_of(given.mib)
    with tempfile.TemporaryDirectory() as folder:
        saves, copies = measure(state, Path(folder), given.rounds)
    ratios = [save / copy for save, copy in zip(saves, copies, strict=True)]
    figures = {
        "save_stall_vs_copy": round(statistics.median(ratios), 2),
        "save_stall_s": round(statistics.median(saves), 3),
        "save_copy_s": round(statistics.median(copies), 3),
    }
    keep(figures)
    sys.stdout.write(
        f"a save of {given.mib} MiB stops training for {figures['save_stall_s']} s, a bare copy takes "
        f"{figures['save_copy_s']} s, ratio {figures['save_stall_vs_copy']}\n"
    )


def state_of(mib: int) -> dict[str, Tensor]:
    """Tensors of 32 MiB down to 4 KiB, as many of each size as it takes."""
    state: dict[str, Tensor] = {}
    left, size = mib * 2**20, LARGEST_MIB * 2**20
    while left >= 4096:
        for _ in range(max(1, left // 2 // size)):
            state[f"tensor-{len(state):04d}"] = torch.randn(size // 4)
            left -= size
        size = min(max(size // 2, 4096), max(left, 4096))
    return state


def measure(state: dict[str, Tensor], folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a save and of a bare copy, by turns, after one of each that warms up."""
    checkpoints = Checkpointer(
        Store(f"file://{folder}/store"), folder / "local", attempt=1, fingerprint="bench", host="node1",
        ranks=Ranks(0, 1, None), settings=CheckpointSettings(), fence=lambda: None, event=lambda name, **fields: None,
    )  # fmt: skip
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    saves, copies = list[float](), list[float]()
    for step in range(1, rounds + 2):
        begun = time.perf_counter()
        checkpoints.save(step, state, {})
        saves.append(time.perf_counter() - begun)
        checkpoints.wait(600)
        begun = time.perf_counter()
        for name, tensor in state.items():
            into[name].copy_(tensor)
        copies.append(time.perf_counter() - begun)
    return saves[1:], copies[1:]


if __name__ == "__main__":
    main()
