"""What happens on a rank between two steps: it agrees with the others, rows are written, and all save or stop together.

All of it belongs to one attempt, whose Session (pipeline/train.py) is given.
"""

import gc
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from data_shards.errors import UserError
from pipeline.agreement import Agreed, Agreement, StepSums, batch_hash, fixed_point
from pipeline.commit import Manifest
from pipeline.loader import Batch, Loader
from pipeline.module import StepResult, SwAV
from pipeline.monitor import Monitor, Recovery, close_s
from pipeline.pace import Pace, SlowRank
from pipeline.profile import Profiler
from pipeline.weights import begin

if TYPE_CHECKING:
    from pipeline.train import Outcome, Session

# Counters of reader and loader, of a step, and what the reader is doing.
READ = ("bytes_read", "requests", "retries", "hedged", "cache_hits", "cache_misses", "cache_bytes", "decode_mismatch")
READING = ("in_flight", "held_bytes")
SKIPS_ALLOWED = 3  # steps in a row whose gradients are not finite


class Watch(pl.Callback):
    """Between the steps: agrees with the other ranks, writes the rows, saves when it is time."""

    def __init__(self, session: "Session", module: SwAV, loader: Loader, found: Manifest | None) -> None:
        self.session, self.module, self.loader = session, module, loader
        self.agreement = Agreement(session.control)
        self._watchdog = session.watchdog
        self.stopping: Outcome | None = None
        self._found = found
        self._quarantine = found.extra["quarantine"] if found else []
        self._told = 0  # of the loader's bad samples, how many are in it
        self._skipped = 0
        self._started = time.perf_counter()
        self._last: tuple[StepResult, dict[str, Any]] | None = None
        self._counters: dict[str, float] = {}
        self._monitor = self._open_monitor() if session.launch.rank == 0 else None
        self._pace = Pace(module.net.trunk)
        self._slow = SlowRank(session.config.monitor.slow_factor, session.hosts)
        self._profiler = Profiler(session.run.local, session._event) if session.launch.rank == 0 else None
        start = found.step if found else 0
        self._recovery = Recovery(Path(session.launch.run_dir), session.run.attempt, start) if self._monitor else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        session, origin = self.session, self.session.config.train.start_from
        if self._found is not None:
            session.checkpoints.load(self._found, self.module.state())
            self.module.step = self._found.step
        elif origin is not None:
            taken = begin(session.config, self.module.weights(), session.ranks, session.run.local)
            session._event("forked", step=0, origin=origin, weights=taken)
        gc.freeze()  # a full collection would look at 400,000 objects of libraries: 0.2 s, for which all ranks wait
        gc.enable()  # off since the rank's start (jobs.rank)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None:
            self._watchdog.now("profile")
            self._profiler.between(self.module.step)
        self._watchdog.now("step")
        self._finish_step()
        self.module.stop = self.stopping is not None

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The host's part of the next batch, while a GPU works on this one."""
        self._watchdog.now("data")
        self.loader.prepare()
        self._watchdog.now("step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        result = self.module.result
        assert result is not None
        self._watchdog.step(result.step)
        self._begin(result, batch)
        self._check_finite(result)
        if result.step % self.session.config.checkpoint.every_steps == 0:
            self._watchdog.now("save")
            self._save()
        self._watchdog.now("data")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why training ends, and save what no checkpoint has.

        This is the last moment: then Lightning takes the weights to the host, where NCCL reaches none of them.
        """
        self._finish_step()
        session, step = self.session, self.module.step
        self._watchdog.now("leave")
        if self.outcome != "finished":
            session._event(self.outcome, step=step)
        if session.checkpoints.pending_step != step:
            self._save()

    @property
    def outcome(self) -> "Outcome":
        """How training ends: the last step is the end, whatever was asked for during it."""
        return self.stopping or "finished" if self.module.step < self.session.steps else "finished"

    def close(self, outcome: "Outcome | None" = None) -> None:
        """Send the last rows. outcome: None when an error has ended it. May be called twice."""
        if self._profiler is not None:
            self._profiler.close()
        if self._monitor is not None:
            self._monitor.close(close_s(outcome == "finished", self.session.launch.stop_budget_s), outcome)
            self._monitor = None

    def _save(self) -> None:
        """Start a checkpoint, with the rows up to its step written before; training goes on once the state is copied.

        Its quarantine: the bad samples that this attempt began with, and those that any rank has found since.
        """
        self._finish_step()
        session, new = self.session, [[b.id, b.step, b.reason] for b in self.loader.bad[self._told :]]
        self._told += len(new)
        found = [entry for of_rank in session.ranks.exchange(new) for entry in of_rank]
        self._quarantine = sorted({tuple(entry) for entry in (*self._quarantine, *found)})
        extra = {"quarantine": self._quarantine, "removed": session.removed.hash}
        session.checkpoints.save(self.module.step, self.module.state(), extra)

    def _begin(self, result: StepResult, batch: Batch) -> None:
        session, counters = self.session, self.loader.counters
        grown = {key: value - self._counters.get(key, 0.0) for key, value in counters.items()}
        self._counters = dict(counters)
        now = time.perf_counter()
        run_part = {
            "time": time.time(),
            "step_s": now - self._started,
            "reader_wait_s": grown.get("wait_s", 0.0),
        }
        self._started = now
        self._last = (result, run_part)
        self.agreement.begin(
            StepSums(
                batch_hash=batch_hash(batch.ids, session.lanes, result.step - 1),
                crop_hash=batch.crop_hash,
                loss=fixed_point(result.loss),
                not_finite=int(not result.finite),
                replaced=batch.replaced,
                **{name: int(grown.get(name, 0)) for name in READ},
                **{name: int(counters.get(name, 0)) for name in READING},
                block_us=self._pace.microseconds(),
                preempted=int(session.request.preempted),
                terminated=int(session.request.terminated),
            ),
            wait_s=grown["batch_wait_s"],  # in this time, for the batch of the next step
        )

    def _finish_step(self) -> None:
        """Read the sums of the last step: its row, and whether all stop here."""
        agreed = self.agreement.finish()
        if agreed is None or self._last is None:
            return
        (result, run_part), sums = self._last, agreed.sums
        if sums.preempted:
            self.stopping = "cancelled" if self._cancelled() else "preempted"
        elif sums.terminated:
            self.stopping = "terminated"
        if self._monitor is not None:
            self._monitor.row(*self._row(result, run_part, agreed))
            if (slow := self._slow.step(agreed)) is not None:
                self._monitor.alarm(result.step, "a rank is slow", slow)
            if self._recovery and (recovered := self._recovery.step(result.step, run_part["time"])) is not None:
                self.session._event("recovered", **recovered)

    def _row(
        self, result: StepResult, run_part: dict[str, Any], agreed: Agreed
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        batch, sums = self.session.config.data.batch, agreed.sums
        row = {
            "step": result.step,
            "loss": sums.mean_loss(self.session.launch.world_size),
            "lr": result.lr,
            "grad_norm": result.grad_norm if result.finite else None,
            "prototypes_used": result.prototypes_used,
            "code_entropy": result.code_entropy,
            "batch_hash": f"{sums.batch_hash % 2**64:016x}",
            "crop_hash": f"{sums.crop_hash % 2**64:016x}",
        }
        run = {
            **run_part,
            "wait_s": min(agreed.wait_s, run_part["step_s"]),  # the other rank's step may be longer
            "wait_rank": agreed.wait_rank,
            "slow_factor": agreed.slow_factor,
            "slow_rank": agreed.slow_rank,
            "images_s": batch / run_part["step_s"],
            "replaced": sums.replaced,
            "read_mb_s": sums.bytes_read / 1e6 / run_part["step_s"],
            **{name: getattr(sums, name) for name in (*READ, *READING)},
            **_memory(),
        }
        return row, run

    def _check_finite(self, result: StepResult) -> None:
        self._skipped = 0 if result.finite else self._skipped + 1
        if not result.finite:
            self.session._event("step skipped", step=result.step, reason="gradients are not finite")
        if self._skipped >= SKIPS_ALLOWED:
            raise UserError(
                f"{self.session.store.url}: gradients were not finite for {self._skipped} steps up to {result.step}, "
                f"weights are of step {result.step - self._skipped}; lower optim.lr or raise swav.epsilon, in a new RUN"
            )

    def _cancelled(self) -> bool:
        """Whether the stop was asked for by `make cancel`; rank 0's view of the marker counts."""
        return self.session.ranks.first((Path(self.session.launch.run_dir) / "cancel").exists)

    def _open_monitor(self) -> Monitor:
        session, config = self.session, self.session.config
        quiet = max(config.swav.freeze_prototypes_steps, config.optim.warmup_steps)
        wandb_id, prototypes = session.record.wandb_id, config.swav.prototypes
        return Monitor(session.run, config.monitor, config.dump(), wandb_id, prototypes, quiet)


def _memory() -> dict[str, int]:
    """Peaks of this process so far, in bytes. gpu_bytes: as torch handed them out, what `make plan` foretells."""
    peaks = {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        peaks["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
