"""Signals set a flag and nothing else, also while Lightning trains."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from jobs.daemons import wait_until
from pipeline.signals import RankEnvironment, StopRequest, own_signals
from pipeline.train import Launch
from tests.pipeline.distributed import run

STEPS = 6
SIGNALLED = 2  # the batch at whose end a signal comes


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT, signal.SIGWINCH)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Tiny(pl.LightningModule):
    """Sends a signal to its own process in the middle of its batches."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.number = number
        self.steps = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(3 * STEPS, 2), batch_size=3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        if batch_idx == SIGNALLED and self.number is not None:
            os.kill(os.getpid(), self.number)
        return self.layer(batch).square().mean()


def trainer(**options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", max_epochs=1, **quiet, **options)


@pytest.mark.parametrize(
    ("number", "preempted", "terminated"), [(signal.SIGUSR2, True, False), (signal.SIGTERM, False, True)]
)
def test_a_signal_is_noted_and_the_handlers_that_were_there_before_are_not_called(
    number: int, preempted: bool, terminated: bool
) -> None:
    called: list[int] = []
    for earlier in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        signal.signal(earlier, lambda number, frame: called.append(number))
    request = StopRequest()
    request.install()
    assert (request.preempted, request.terminated) == (False, False)
    os.kill(os.getpid(), signal.SIGCONT)
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert (request.preempted, request.terminated) == (preempted, terminated)
    assert called == []


def test_a_signal_is_known_to_other_threads_while_the_main_thread_does_not_come_back_from_c() -> None:
    request, mutex, c = StopRequest(), ctypes.create_string_buffer(64), ctypes.CDLL(None)
    request.install()
    signal.signal(signal.SIGWINCH, lambda number, frame: None)
    c.pthread_mutex_lock(mutex)
    known: list[bool] = []

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGWINCH)  # none of ours
        before = request.deadline(0.0)
        os.kill(os.getpid(), signal.SIGUSR2)
        known.append(before is None and wait_until(lambda: request.deadline(0.0) is not None, 20))
        known.append((request.preempted, request.terminated) == (True, False))
        c.pthread_mutex_unlock(mutex)

    asking = threading.Thread(target=ask)
    asking.start()
    c.pthread_mutex_lock(mutex)  # as a collective that hangs
    asking.join()
    assert known == [True, True]


def test_a_request_is_kept_when_the_handlers_are_installed_again() -> None:
    request = StopRequest()
    request.install()
    os.kill(os.getpid(), signal.SIGUSR2)
    request.install()
    assert request.preempted


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_lightning_trains_on_to_the_end_after_a_signal_and_leaves_the_handlers_in_place(number: int) -> None:
    module, request, ours = Tiny(number), StopRequest(), trainer()
    own_signals(ours, request)
    ours.fit(module)
    assert module.steps == STEPS
    assert ours.state.finished
    assert (request.preempted, request.terminated) == (number == signal.SIGUSR2, number == signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert (request.preempted, request.terminated) == (True, True)


def test_lightning_by_itself_leaves_at_a_sigterm() -> None:
    """When this fails, Lightning has changed, and what pipeline.signals replaces may no longer need it."""
    module = Tiny(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        trainer().fit(module)
    assert module.steps == SIGNALLED + 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_SignalConnector, "register_signal_handlers"),
        (_SignalConnector, "teardown"),
        (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
    ],
)
def test_a_lightning_that_has_moved_what_is_replaced_is_refused_by_name(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = trainer()
    monkeypatch.delattr(owner, name)
    with pytest.raises(AttributeError, match=rf"{owner.__name__}\.{name} is gone"):
        own_signals(moved, StopRequest())


def train_with_a_sigterm_on_rank_0(rank: int) -> tuple[int, bool, int]:
    """Steps done, whether a TERM was noted, and how often Lightning talked to the other rank between the batches."""
    talks = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal talks
            talks += module.steps > 0
            return function(*arguments, **named)

        return call

    for name in ("broadcast", "barrier", "all_reduce", "all_gather"):
        setattr(dist, name, counted(getattr(dist, name)))
    environment = RankEnvironment(Launch("", "", rank, rank, 2, 2, "127.0.0.1", 0))
    ours = trainer(strategy=DDPStrategy(cluster_environment=environment), devices=2, use_distributed_sampler=False)
    module, request = Tiny(signal.SIGTERM if rank == 0 else None), StopRequest()
    own_signals(ours, request)
    ending = Ending(lambda: talks)
    ours.callbacks.append(ending)
    ours.fit(module)
    return module.steps, request.terminated, ending.talks


class Ending(pl.Callback):
    """Notes what was counted up to the end of the last batch."""

    def __init__(self, count: Callable[[], int]) -> None:
        self.count, self.talks = count, -1

    def on_train_batch_end(self, *_: Any) -> None:
        self.talks = self.count()


@pytest.mark.slow
def test_a_sigterm_on_one_of_two_ranks_neither_stops_them_nor_makes_lightning_talk_between_batches() -> None:
    assert run(2, train_with_a_sigterm_on_rank_0) == [(STEPS, True, 0), (STEPS, False, 0)]


def test_ranks_are_those_that_the_launch_gave() -> None:
    environment = RankEnvironment(Launch("", "", 5, 1, 4, 8, "node-a", 1234))
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (5, 1, 1)
    assert (environment.world_size(), environment.main_address, environment.main_port) == (8, "node-a", 1234)
    environment.set_global_rank(0)
    environment.set_world_size(1)
    assert (environment.global_rank(), environment.world_size()) == (5, 8)
    assert environment.creates_processes_externally
    assert not RankEnvironment.detect()
