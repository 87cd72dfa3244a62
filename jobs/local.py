"""Jobs without SLURM: the ranks are processes of this machine, started by submitit's local executor.

`serve` is what the batch script is under SLURM, and outlives the terminal that started it: it starts the ranks, waits,
asks jobs.supervise what their end means, and starts them again when that is the answer. submitit's own controller would
start them again six times at most, and never after a crash.
"""

import os
import signal
import sys
import time
from pathlib import Path

import submitit
import yaml

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import daemons, rank, supervise
from jobs.daemons import Process
from jobs.start import Start

LEAVE_S = 5.0  # a rank is gone and has no result: the others have so long to say what they saw


def serve(store: str, ranks: int, gpus: int, time_limit_min: int, signal_delay_s: int, max_cycles: int) -> int:
    """Run the job that the environment describes (FARSEER_*) to its end; returns the exit code.

    SIGTERM ends it at once, and its ranks.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start = Start.here()
    try:
        visible = visible_gpus(gpus)
    except UserError as error:
        start.note("failed", reason=str(error))
        raise
    executor = submitit.LocalExecutor(start.run_dir / "logs")
    executor.update_parameters(
        tasks_per_node=ranks,
        gpus_per_node=gpus,
        visible_gpus=visible,
        timeout_min=time_limit_min,
        signal_delay_s=signal_delay_s,
        stderr_to_stdout=True,
    )
    config = yaml.safe_load((start.run_dir / "config.yaml").read_text())
    while True:
        os.environ["FARSEER_START"] = str(start.number)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(supervise.before(start))
        _watch(executor.submit(rank.run, config, store, signal_delay_s, gpus, time_limit_min), start)
        decision = supervise.after(start, 1, Store(store, retry_seconds=supervise.STORE_S), max_cycles)
        if decision.action != "requeue":
            sys.stderr.write(f"farseer: {decision.reason}\n")
            return 0 if decision.action == "end" else 2
        start = Start(start.run_dir, start.job, start.number + 1)


def visible_gpus(wanted: int) -> tuple[int, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to the ranks, by number; () means the first ones: it names none.

    submitit sets that variable anew for each rank. Raises UserError where it leaves fewer than are wanted.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None or not wanted:
        return ()
    numbers = tuple(int(name) for name in given.split(",") if name.strip().isdecimal())
    if len(numbers) < wanted:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={given}: names {len(numbers)} GPUs by their numbers, and the site has "
            f"gpus_per_node: {wanted}; name as many, or change the site"
        )
    return numbers


def send(start: Start, number: signal.Signals) -> None:
    """Signal every rank of a start."""
    for record in start.ranks():
        record.process.send(number)


def _watch(job: submitit.Job[str], start: Start) -> None:
    """Wait for the ranks; when one dies, the others are ended too, as --kill-on-bad-exit does under SLURM."""
    died_at: float | None = None
    try:
        while not job.done():
            time.sleep(0.2)
            if died_at is None and _one_has_died(job, start):
                died_at = time.monotonic()
            if died_at is not None and time.monotonic() - died_at > LEAVE_S:
                send(start, signal.SIGKILL)
    finally:
        send(start, signal.SIGKILL)
        if (controller := Process.of(int(job.job_id))) is not None:
            daemons.stop(controller)


def _one_has_died(job: submitit.Job[str], start: Start) -> bool:
    gone = [record for record in start.ranks() if not record.process.running()]
    return any(not Path(job.task(record.rank).paths.result_pickle).exists() for record in gone)
