"""A rank of a run, from its start to its end: find the place, train, save, leave in good order.

Nothing about where to resume comes from the launcher: it is found in the store.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from data_shards.errors import UserError, one_line
from data_shards.reader import Reader
from data_shards.store import Store
from pipeline.callback import Watch
from pipeline.checkpoint import Checkpointer
from pipeline.commit import Manifest
from pipeline.config import SAVING, Config
from pipeline.loader import Loader
from pipeline.module import SwAV
from pipeline.ranks import Ranks, same_removed
from pipeline.run import Run, open_data, read_record
from pipeline.signals import StopRequest
from pipeline.trainer import build_trainer, quieten
from pipeline.watchdog import Watchdog

Outcome = Literal["finished", "preempted", "terminated", "cancelled"]
SAVE_S = 300.0  # a save that stops training for longer hangs


@dataclass(frozen=True)
class Launch:
    """What the launcher knows and the trainer does not. Plain values, but for what is called.

    requeue: on rank 0, after a preemption's save. hung: in a thread; must end the process. over: when no step will come
    any more; from then on nothing watches this process but its launcher.
    """

    run_dir: str  # on the shared disk
    store: str  # the run's folder in the object store
    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    master_addr: str
    master_port: int
    host: str = ""  # by which the launcher knows this machine, and can keep off it
    stop_budget_s: float = 60.0  # from the signal to the end: save, upload, commit
    requeue: Callable[[], None] | None = field(default=None, compare=False)
    hung: Callable[[Exception], None] | None = field(default=None, compare=False)
    over: Callable[[Outcome], None] = field(default=lambda _: None, compare=False)


class OutOfMemory(UserError):
    """The device is full, of this run or of what else is on it."""

    passing = True


def run_rank(config: Config, launch: Launch) -> Outcome:
    """Train on this rank until the end or until asked to stop; resumes from the newest checkpoint in the store.

    Raises UserError for what a user can mend, and leaves the process group as it is then: NCCL ends one only with all
    its ranks, which may not come. The caller's process is a rank of its own.
    """
    request = StopRequest()
    request.install()
    quieten()
    torch.set_num_threads(config.efficiency.torch_threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means it; of bf16 nothing is slower
    _join(config, launch)
    session = Session(config, launch, request)
    with closing(session.watchdog):
        outcome = session.train()
    launch.over(outcome)
    dist.destroy_process_group()
    return outcome


def _join(config: Config, launch: Launch) -> None:
    """Raises UserError when this machine does not let a process hold as many connections as there are ranks."""
    _allow_files(3 * launch.world_size + 512)  # gloo connects each rank with all others, for each group
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{launch.master_addr}:{launch.master_port}",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=config.efficiency.timeout,
    )


def _allow_files(needed: int) -> None:
    """Take all the open files that this process may have: what it gets by default, 1,024, is for 500 ranks."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < needed:
        raise UserError(
            f"a rank of so many needs {needed:,} open files, this machine allows it {hard:,} (ulimit -Hn); let its "
            f"administrator raise that (LimitNOFILE of slurmd), or train on fewer ranks"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Session:
    """One attempt of a run on this rank."""

    def __init__(self, config: Config, launch: Launch, request: StopRequest) -> None:
        self.launch, self.request = launch, request
        self.control = dist.new_group(backend="gloo", timeout=config.efficiency.timeout)
        self.ranks = Ranks(launch.rank, launch.world_size, self.control)
        self.hosts: list[str] = self.ranks.exchange(launch.host or os.uname().nodename)
        self.store = Store(launch.store, retry_seconds=config.reader.retry_seconds)
        self.run = self._claim(config)
        record = read_record(self.store)
        assert record is not None  # rank 0 has put it, or found it there
        self.record = record
        self.shards, self.order, self.config = open_data(config, record=record)
        self.steps = self.config.train.length(self.order)
        self.lanes = self.order.lanes_of(launch.rank, launch.world_size)
        self.removed = same_removed(self.shards, self.ranks)
        self.watchdog = self._watched()
        self.checkpoints = Checkpointer(
            self.store,
            self.config.checkpoint.folder(Path(launch.run_dir)),
            attempt=self.run.attempt,
            fingerprint=self.record.fingerprint,  # not the config's: FORCE=1 goes on under another one
            ranks=self.ranks,
            host=self.hosts[launch.rank],
            settings=self.config.checkpoint,
            fence=self.run.fence,
            event=self._event,
            before_commit=self.run.upload,
        )

    def train(self) -> Outcome:
        """Resume, train, leave."""
        found = self.checkpoints.newest()
        start = found.step if found else 0
        if found and start >= self.steps:
            self.checkpoints.forget(found)
            self._event("finished", step=start)
            if self.launch.rank == 0:
                self.run.upload()
            return "finished"
        begun, how = "resumed" if found else "started", self.config.efficiency.switched_on
        self._event(begun, step=start, steps=self.steps, ranks=self.launch.world_size, efficiency=how)
        module = SwAV(self.config, self.lanes, self.launch.rank, self.launch.world_size, self.steps)
        quarantine = {int(sample) for sample, *_ in found.extra["quarantine"]} if found else set()
        self._tell_of_removed(found)
        config, lanes = self.config, self.lanes
        with (
            Reader(self.shards, self.order, lanes, start, config.reader, quarantine, self.removed) as reader,
            closing(Loader(reader, config.augment, config.data.seed, start, self.steps, config.loader)) as loader,
            closing(Watch(self, module, loader, found)) as watch,
        ):
            with _memory_explained(config):
                build_trainer(config, self.launch, self.request, watch).fit(module, loader)
            return self._leave(module.step, watch)

    def _claim(self, config: Config) -> Run:
        """Rank 0 opens the run for all, and the data of a new one, which fixes its version; its error is everyone's."""
        local, opened = Path(self.launch.run_dir), []

        def attempt() -> int:
            shards, order, filled = open_data(config, record=read_record(self.store))
            order.lanes_of(0, self.launch.world_size)
            opened.append(Run.start(self.store, local, filled, shards))
            return opened[0].attempt

        number = self.ranks.first(attempt)
        return opened[0] if opened else Run(self.store, local, number)

    def _watched(self) -> Watchdog:
        """The patience that each thing has of itself: a store that is away is asked again, and is no hang."""
        launch, leave = self.launch, self.launch.hung or _leave_hung
        patience = dict.fromkeys(("save", "profile"), SAVE_S)
        patience |= {"data": self.config.reader.retry_seconds, "leave": launch.stop_budget_s}
        return Watchdog(
            self.run.local,
            launch.rank,
            launch.world_size,
            self.hosts[launch.rank],
            self.config.watchdog,
            patience,
            leave,
            stop_by=lambda: self.request.deadline(launch.stop_budget_s),
        )

    def _tell_of_removed(self, found: Manifest | None) -> None:
        """A start that replaces removed images says so, and one that does not go on with the list that it had."""
        removed, another = self.removed, found is not None and found.extra.get("removed", "") != self.removed.hash
        if removed.hash or another:
            note = {"note": "another list than before"} if another else {}
            step = found.step if found else 0
            self._event("removed", step=step, count=len(removed), hash=removed.hash, lists=removed.lists, **note)

    def _event(self, name: str, **fields: Any) -> None:
        if self.launch.rank == 0:
            self.run.event(name, **fields)

    def _leave(self, step: int, watch: Watch) -> Outcome:
        deadline = self.request.deadline(self.launch.stop_budget_s) or time.monotonic() + self.launch.stop_budget_s
        outcome = watch.outcome
        self.checkpoints.wait(deadline - time.monotonic())
        if self.request.asked_s is not None:
            self._event("stopped", step=step, seconds=round(self.request.asked_s, 1))
        if outcome == "finished":
            self.checkpoints.tidy(deadline - time.monotonic())
            self._event("finished", step=step)
        requeue = self.launch.requeue if outcome == "preempted" else None
        if requeue is not None:
            self._event("requeued", step=step)
        dist.barrier(group=self.control)
        watch.close(outcome)
        if requeue is not None and self.launch.rank == 0:
            requeue()
        return outcome


@contextmanager
def _memory_explained(config: Config) -> Iterator[None]:
    """Where a GPU is full, say what would make the step fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        names = [name for name in SAVING if not getattr(config.efficiency, name)]
        ways = ", ".join([*(f'SET="efficiency.{name}=true"' for name in names), "more ranks"])
        raise OutOfMemory(f"the GPU is full; each of these takes less of it: {ways}: {one_line(error)}") from error


def _leave_hung(why: Exception) -> None:
    sys.stderr.write(f"farseer: {why}\n")
    sys.stderr.flush()
    os._exit(1)
