"""What doctor's job does on a node: look at the store, the clock, the GPUs and the network, then wait for a signal."""

import datetime
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import submitit

from data_shards.errors import UserError, one_line
from data_shards.store import Store
from jobs.doctor_store import ahead_of_store_s, put_and_get
from jobs.start import this_host, write_json

SMI_S = 15.0  # for nvidia-smi to answer
REDUCE_S = 60.0  # for torch to be there on all nodes, and for their sums
REDUCED_BYTES = 64 * 2**20
REDUCES = 4  # the best of them counts


@dataclass(frozen=True)
class Seen:
    """store: what is wrong with it, None when nothing is. ahead_s: of the store's clock."""

    host: str
    store: str | None
    ahead_s: float | None
    gpus: int


@dataclass(frozen=True)
class Reduced:
    """An all-reduce over one rank of each node. gb_s: bytes that each sends, as NCCL's tests count; error: why not."""

    host: str
    backend: str
    gb_s: float | None
    error: str | None


def probe(folder: str, url: str, wait_s: float) -> None:
    """Leave `seen-<host>.json` in the folder, then `reduced-`, and `signalled-` when USR2 comes within `wait_s`."""
    signalled: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: signalled.append(number))
    host = this_host()
    seen = Seen(host, _store(url), ahead_of_store_s(url), _gpus())
    write_json(Path(folder) / f"seen-{host}.json", asdict(seen))
    here = submitit.JobEnvironment()
    reduced = reduce(host, here.global_rank, here.num_tasks, seen.gpus > 0)
    write_json(Path(folder) / f"reduced-{host}.json", asdict(reduced))
    deadline = time.monotonic() + wait_s
    while not signalled and time.monotonic() < deadline:
        time.sleep(0.1)
    if signalled:
        write_json(Path(folder) / f"signalled-{host}.json", asdict(seen))


def reduce(host: str, rank: int, nodes: int, gpu: bool) -> Reduced:
    """Measure it; what hangs is left behind in its thread, which the end of the process takes along."""
    backend = "nccl" if gpu else "gloo"
    said: list[float | str] = []
    thread = threading.Thread(target=_reduce, args=(rank, nodes, backend, said), name="all-reduce", daemon=True)
    thread.start()
    thread.join(REDUCE_S)
    found = said[0] if said else f"no answer within {REDUCE_S:.0f} s"
    return Reduced(host, backend, *((None, found) if isinstance(found, str) else (found, None)))


def _reduce(rank: int, nodes: int, backend: str, said: list[float | str]) -> None:
    import torch
    import torch.distributed as dist

    try:
        address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        limit = datetime.timedelta(seconds=REDUCE_S)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=nodes, timeout=limit)
        tensor = torch.ones(REDUCED_BYTES // 4, device="cuda" if backend == "nccl" else "cpu")
        seconds = []
        for _ in range(REDUCES):
            begun = time.monotonic()
            dist.all_reduce(tensor)
            tensor[0].item()  # on a GPU, waits
            seconds.append(time.monotonic() - begun)
        said.append(2 * (nodes - 1) / nodes * REDUCED_BYTES / min(seconds) / 1e9)
    except Exception as error:  # noqa: BLE001 - whatever it is, doctor tells it
        said.append(one_line(error)[:200])


def _store(url: str) -> str | None:
    """Tried as this node, with the job's keys."""
    try:
        put_and_get(Store(url, retry_seconds=5.0))
    except UserError as error:
        return str(error)
    return None


def _gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SMI_S, check=False)
    except subprocess.TimeoutExpired:  # a sick driver; doctor says that GPUs are missing
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
