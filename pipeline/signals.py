"""Signals set a flag and nothing else; and the one place that touches Lightning's private parts.

Lightning 2.6 broadcasts SIGTERM with a host sync at every batch and does a collective inside its signal handler. Here a
handler only notes the signal; ranks agree at a batch boundary through the sums that each step exchanges anyway
(pipeline.agreement).

Python calls a handler when the main thread is back from C, which it may never be where a collective hangs. What the
interpreter does at once is to write the signal's number to a pipe; the watchdog's thread reads it there.
"""

import os
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

if TYPE_CHECKING:
    from pipeline.train import Launch


class StopRequest:
    """What this process was asked for: USR2 means preempted or out of time, TERM means leave now."""

    def __init__(self) -> None:
        self.preempted = False
        self.terminated = False
        self._asked_at: float | None = None
        self._heard, self._told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def install(self) -> None:
        """Take over USR2 and TERM of this process; submitit's and Lightning's handlers are replaced."""
        signal.signal(signal.SIGUSR2, self._note)
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)

    def deadline(self, budget_s: float) -> float | None:
        """The time (monotonic) by which what was asked for must be done; None before anything was.

        Of any thread, also while the main thread is in C.
        """
        with suppress(BlockingIOError):  # there was none
            for number in os.read(self._heard, 1000):
                self._note(number)
        return None if self._asked_at is None else self._asked_at + budget_s

    @property
    def asked_s(self) -> float | None:
        """Seconds since the first signal; None before it."""
        return None if self._asked_at is None else time.monotonic() - self._asked_at

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        if number in (signal.SIGUSR2, signal.SIGTERM):
            self._asked_at = self._asked_at or time.monotonic()
        self.preempted |= number == signal.SIGUSR2
        self.terminated |= number == signal.SIGTERM


def own_signals(trainer: pl.Trainer, request: StopRequest) -> None:
    """Put `request` in the place of Lightning's handlers, and take its broadcast out of the batch loop.

    Raises AttributeError when Lightning has moved what is replaced, so that an upgrade cannot bring it back unseen.
    """
    _replace(trainer._signal_connector, "register_signal_handlers", request.install)
    _replace(trainer._signal_connector, "teardown", lambda: None)
    _replace(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)


def _replace(owner: object, name: str, function: object) -> None:
    if not callable(getattr(owner, name, None)):
        raise AttributeError(f"{type(owner).__name__}.{name} is gone from this Lightning; pipeline.signals replaces it")
    setattr(owner, name, function)


class RankEnvironment(ClusterEnvironment):
    """Ranks as the launch gave them, whoever launched."""

    def __init__(self, launch: "Launch") -> None:
        super().__init__()
        self._launch = launch

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._launch.master_addr

    @property
    def main_port(self) -> int:
        return self._launch.master_port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._launch.world_size

    def set_world_size(self, size: int) -> None:
        """Fixed by the launch."""

    def global_rank(self) -> int:
        return self._launch.rank

    def set_global_rank(self, rank: int) -> None:
        """Fixed by the launch."""

    def local_rank(self) -> int:
        return self._launch.local_rank

    def node_rank(self) -> int:
        return self._launch.rank // self._launch.local_world_size
