"""Runs a function on a few processes that talk through gloo, and gives back what each returned."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import forking


def run(world_size: int, function: Callable[..., Any], *arguments: object, deadline_s: float = 240.0) -> list[Any]:
    """function(rank, *arguments) on each rank, a function of a module; results in the order of ranks.

    Raises AssertionError with a rank's traceback when it fails, TimeoutError after the deadline; leaves no process.
    """
    context = forking.context()
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank, args=(rank, world_size, folder, pipes[rank][1], function, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()
            end = time.monotonic() + deadline_s
            return [_result(rank, receiver, end) for rank, (receiver, _) in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _result(rank: int, receiver: Connection, end: float) -> Any:
    if not receiver.poll(max(0.0, end - time.monotonic())):
        raise TimeoutError(f"rank {rank} gave no result before the deadline")
    succeeded, result = pickle.loads(receiver.recv_bytes())  # noqa: S301 - from our own child
    assert succeeded, f"rank {rank} failed:\n{result}"
    return result


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo's ranks are on the host, also where there is a GPU
    rendezvous = f"file://{Path(folder) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        answer = (True, function(rank, *arguments))
    except Exception:  # noqa: BLE001 - whatever it is, the parent shows it
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    if answer[0]:
        dist.barrier()  # nobody leaves while another still needs it
    dist.destroy_process_group()
