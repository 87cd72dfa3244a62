"""A look at this node before the first step: a bad host is named, so that the supervisor can keep off it.

Each rank tries its own GPU; the first one of a node also the disk, the store and the clock. A good node leaves word in
the start's folder, `preflight-<host>.json`: a node that is not fit learns from it whether that is its own fault, or so
everywhere.
"""

import contextlib
import errno
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.errors import BadHost, UserError
from data_shards.store import Store, StoreError
from jobs.daemons import wait_until
from jobs.doctor_store import ahead_of_store_s, put_and_get
from jobs.start import Start, this_host, write_json

if TYPE_CHECKING:
    from pipeline.config import Config

WRITE_BYTES = 4 * 2**20  # to the disk for local saves
ROOM_BYTES = 2**30  # less there is an alarm and no error: a save that finds no room is left out, and told
CLOCK_S = 60.0  # from the store's; whole events would be told in another order
ANSWER_S = 90.0  # a store that others reach answers within; one may be away for a minute just after they asked
OTHERS_S = 20.0  # other nodes, which have begun when this one did, have looked by then
SIDE = 256  # of the matrices: exact in every format that multiplies


class Unfit(UserError):
    """This host cannot do its part, and it may be so everywhere: nobody is to blame."""

    passing = True


def preflight(start: Start, store: str, config: "Config", local_rank: int, gpus: int) -> None:
    """Raise BadHost when this node is not fit. Unfit, Unavailable, Denied and the like when it may be so for all.

    store: the run's folder in the store. gpus: how many a node of the site has.
    """
    begun = time.monotonic()
    if gpus:
        try_gpu(local_rank, gpus)
    if local_rank:
        return
    local = config.checkpoint.folder(start.run_dir)
    try_disk(local, start)
    try_store(store, start, config.reader.retry_seconds)
    ahead = try_clock(store, start)
    took = time.monotonic() - begun
    write_json(start.folder / f"preflight-{this_host()}.json", {"seconds": took, "ahead_s": ahead})
    clock = "" if ahead is None else f", clock {ahead:+.1f} s from the store's"
    sys.stdout.write(f"farseer: {this_host()} is fit: {gpus} GPUs, {local}, {store}{clock} ({took:.1f} s)\n")


def try_gpu(number: int, wanted: int) -> None:
    """All GPUs are there, and the rank's own one multiplies rightly."""
    import torch

    if torch.version.cuda is None:
        raise UserError(
            f"the site asks for {wanted} GPUs a node, and torch {torch.__version__} of {sys.executable} is built "
            "without CUDA; install its CUDA build there, or set gpus_per_node: 0"
        )
    there = torch.cuda.device_count()
    if there < wanted:
        raise BadHost(this_host(), f"{there} of {wanted} GPUs are there; nvidia-smi on it says more")
    try:
        right = multiplies(f"cuda:{number}")
    except RuntimeError as error:
        raise BadHost(this_host(), f"GPU {number} does not work: {str(error).splitlines()[0]}") from None
    if not right:
        raise BadHost(this_host(), f"GPU {number} gives wrong numbers")


def multiplies(device: str) -> bool:
    """Whether a product of small whole numbers is right there, bit for bit."""
    import torch

    left = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 7
    right = left.flip(0) % 5
    product = torch.mm(left.to(device, torch.float32), right.to(device, torch.float32))
    return torch.equal(product.cpu().long(), left @ right)


def try_disk(local: Path, start: Start) -> None:
    """The folder for local saves takes bytes that stay. A disk without room is an alarm."""
    try:
        local.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=local) as file:
            file.write(secrets.token_bytes(WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(local).free
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise unfit(f"{local} (local saves) cannot be written: {error.strerror or error}", start) from None
        free = 0
    if free < ROOM_BYTES:
        start.note("alarm", reason=f"{this_host()}: only {free / 1e9:.1f} GB free in {local}, for local saves")


def try_store(url: str, start: Start, patience_s: float) -> None:
    """The store answers from here. One that is away for all is asked again for `patience_s`, and nobody is to blame.

    What it refuses may be refused to this node alone: its clock may be off, or a file with keys not be there.
    """
    store, deadline = Store(url, retry_seconds=min(ANSWER_S, patience_s)), time.monotonic() + patience_s
    with contextlib.closing(store):
        while True:
            try:
                return put_and_get(store)
            except StoreError as error:
                if fit := fit_nodes(start, 0.0 if error.passing else OTHERS_S):
                    raise BadHost(this_host(), f"{error}; {', '.join(fit[:3])} can reach it") from None
                if not error.passing or time.monotonic() >= deadline:
                    raise


def try_clock(url: str, start: Start) -> float | None:
    """Seconds that this clock is ahead of the store's; None when the store does not say."""
    ahead = ahead_of_store_s(url) if url.startswith("s3://") else None
    if ahead is not None and abs(ahead) > CLOCK_S:
        raise unfit(f"its clock is {ahead:+.0f} s from the store's; start chrony or ntpd on it", start)
    return ahead


def unfit(what: str, start: Start) -> UserError:
    """BadHost where another node is fit; else the same words, and no host is named as bad."""
    return BadHost(this_host(), what) if fit_nodes(start, OTHERS_S) else Unfit(f"{this_host()}: {what}")


def fit_nodes(start: Start, patience_s: float) -> list[str]:
    """Nodes that have found themselves fit in this start; the first one is waited for, where there are others."""

    def found() -> list[str]:
        return [path.stem.removeprefix("preflight-") for path in sorted(start.folder.glob("preflight-*.json"))]

    if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        wait_until(lambda: bool(found()), patience_s, 0.2)
    return found()
