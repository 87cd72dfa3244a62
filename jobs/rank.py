"""What each rank runs: the training, between the words that it leaves for the supervisor (jobs.start).

submitit pickles `run` by its name, so it is imported from the run's snapshot, never from the code as it is by then.
"""

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import submitit

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import blame, slurm
from jobs.preflight import preflight
from jobs.stamps import stamp_output
from jobs.start import Start, this_host
from jobs.supervise import TOO_EARLY, publish

LEAVE_S = 15  # of the time between signal and end, for what follows the last save
EARLY_S = 90.0  # SLURM may send the signal of the time limit up to a minute early, and has begun before us
WITNESS_S = 3.0  # whom another rank left lets it be the first to be gone: it is the one to blame
TELL_S = 10.0  # for the last words, on a disk that may not answer
END_S = 60.0  # from the end of the training to that of the process: W&B's, which it waits for, may stand still


class OutOfTime(UserError):
    """The job's time is over before it has begun to learn; with luck the next start is quicker."""

    passing = True


def run(config: dict[str, Any], store: str, signal_delay_s: int, gpus: int, time_limit_min: int) -> str:
    """Train as one rank of the job; returns pipeline.train's outcome.

    config: a resolved config, as `Config.dump` gives it. store: the run's folder in the store. gpus: of a node.
    An error ends the process at once: threads that still wait for other ranks must not keep a dead rank in its place.
    """
    gc.disable()  # until the first step: of what is imported nothing is garbage, and looking for it takes a sixth more
    stamp_output()
    start, here = Start.here(), submitit.JobEnvironment()
    rank = here.global_rank
    leave_early = _handle_early_signals(start, rank, 60 * time_limit_min - signal_delay_s)
    try:
        start.begin(rank, str(here.paths.stdout))
        if start.cancelled:  # since the job's script has looked: there was no rank yet that a signal would reach
            _leave_early(start, rank)
        from pipeline.config import parse

        settings = parse(config, f"{store}/config.yaml")
        preflight(start, store, settings, here.local_rank, gpus)
        if rank == 0:
            publish(start.run_dir, start.job, Store(store))
        from pipeline.train import Launch, run_rank

        launch = Launch(
            run_dir=str(start.run_dir),
            store=store,
            rank=rank,
            local_rank=here.local_rank,
            local_world_size=here.num_tasks // here.num_nodes,
            world_size=here.num_tasks,
            master_addr=os.environ["MASTER_ADDR"],
            master_port=int(os.environ["MASTER_PORT"]),
            host=this_host(),
            stop_budget_s=max(1.0, signal_delay_s - LEAVE_S),
            requeue=(lambda: requeue(start)) if rank == 0 else None,
            hung=lambda why: _hung(start, rank, why, leave_early),
            over=lambda outcome: _over(start, rank, outcome),
        )
        return run_rank(settings, launch)
    except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor has to know
        _fail(start, rank, error)


def requeue(start: Start) -> None:
    """Have the job started again, after a preemption's save; called on rank 0.

    SLURM ends the job at once, so this may not return. Outside SLURM, or in an image without its commands, the
    supervisor sees to it.
    """
    start.end("preempted")
    if start.job.startswith("local-"):
        return
    try:
        slurm.requeue(start.job)
    except slurm.NotInstalled:
        return
    start.end("preempted", requeued=True)


def _handle_early_signals(start: Start, rank: int, time_s: float) -> Callable[[], NoReturn]:
    """Until the trainer takes the signals over there is nothing to save: leave, and start again if it was a preemption.

    time_s: from the job's start to the signal that its time limit sends. A start that needs more is a failure, of which
    there may be so many in a row. submitit's own handlers would count time-outs and give up; they are replaced here.
    Returns what is done then.
    """
    begun = time.monotonic()

    def leave() -> NoReturn:
        if not start.cancelled and time.monotonic() - begun > time_s - EARLY_S:
            took = f"{time.monotonic() - begun:.0f} s"
            _fail(start, rank, OutOfTime(f"the time limit came {took} after the start, before the first step; "
                                         "set the site's time_limit_min higher, or signal_delay_s lower"))  # fmt: skip
        _leave_early(start, rank)

    signal.signal(signal.SIGUSR2, lambda *_: leave())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    return leave


def _leave_early(start: Start, rank: int) -> NoReturn:
    """Before there is anything to save. Rank 0 speaks for all, unless it is among those that wait."""
    try:
        if rank != 0:
            time.sleep(WITNESS_S)
            if start.outcome() is None:
                start.end("cancelled" if start.cancelled else "preempted")
        elif start.cancelled:
            start.end("cancelled")
        else:
            start.note("requeued", reason=TOO_EARLY)
            requeue(start)
    finally:
        os._exit(1)  # not 0: SLURM ends those with it that wait for this one already, and hear no signal there


def _hung(start: Start, rank: int, why: Exception, leave_early: Callable[[], NoReturn]) -> NoReturn:
    """The training stands still, or was asked to stop and does not come to it: before the first step that is early."""
    from pipeline.watchdog import Overdue

    if isinstance(why, Overdue) and why.early:
        leave_early()
    _fail(start, rank, why)


def _over(start: Start, rank: int, outcome: str) -> None:
    """The training has ended, and its watchdog: leave word, and see to it that the process ends."""
    if rank == 0 and start.outcome() is None:
        start.end(outcome)
    timer = threading.Timer(END_S, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _fail(start: Start, rank: int, error: Exception) -> NoReturn:
    """Leave word where there is room for it, and the process, whatever its other threads wait for."""
    try:
        telling = threading.Thread(target=_tell, args=(start, rank, error), daemon=True)
        telling.start()
        telling.join(TELL_S)
        if blame.kind(str(error)) == "collective":
            time.sleep(WITNESS_S)
    finally:
        os._exit(error.exit_code if isinstance(error, UserError) else 1)


def _tell(start: Start, rank: int, error: Exception) -> None:
    """On the shared disk and in the log, each of which may be full. submitit has Python buffer nothing."""
    with suppress(OSError):
        start.fail(rank, error)
    said = f"farseer: {error}\n" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    with suppress(OSError):
        os.write(sys.stderr.fileno(), said.encode())
