"""What a run tells of itself: a metrics row a step, W&B fed the same rows, alarms.

A row has a `result` part, equal bit for bit between runs where exactness is claimed, and a `run` part (times, bytes,
memory), never compared. Neither the store nor W&B can hold up or stop the training: both are served by threads, and
what they do not take is said by an event. The local lines are the truth; W&B gets from them what it has missed.
"""

import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from data_shards.section import Section
from pipeline.journal import attempt_folders, last_line
from pipeline.wandb_client import Mode
from pipeline.wandb_rows import WandbRows, WandbRun

if TYPE_CHECKING:  # pipeline.run reads a config, of which the settings below are a section
    from pipeline.run import Run

CLOSE_S = 10.0  # for the last upload and for W&B's end, together; the requeue of a preempted job waits for it
LAST_S = 60.0  # the same for a run that has finished: no later start sends what W&B has not got


def close_s(finished: bool, stop_budget_s: float) -> float:
    """How long the end of a run's start may wait for the monitor's."""
    return max(CLOSE_S, min(LAST_S, stop_budget_s)) if finished else CLOSE_S


class MonitorSettings(Section):
    """What is watched and where it is shown."""

    affects_results: ClassVar[bool] = False
    log_every: PositiveInt = 10  # steps between measurements of prototype usage
    upload_seconds: PositiveFloat = 30.0  # between uploads of rows that no checkpoint took along
    wandb: Mode = "auto"  # auto: online with a key, else offline
    project: str = "farseer"  # W&B's, as is the entity
    entity: str | None = None
    collapse_band: PositiveFloat = 0.005  # a mean loss no further below ln K (relative) is a collapse
    collapse_window: PositiveInt = 100  # steps
    slow_factor: float = Field(1.3, gt=1)  # a rank is named that takes so many times the others' time for a block


class Monitor:
    """Rank 0's ear: takes rows, keeps them, sends them on.

    run: where rows and events go; config: what W&B shows of it; wandb_id: the run's own, for all its attempts;
    prototypes: K; quiet_until: the step up to which a loss near ln K alarms nobody (freezing and warm-up).
    """

    def __init__(
        self,
        run: "Run",
        settings: MonitorSettings,
        config: dict[str, Any],
        wandb_id: str,
        prototypes: int,
        quiet_until: int,
    ) -> None:
        self.run, self.settings = run, settings
        self._ln_k = math.log(prototypes)
        self._quiet_until = quiet_until
        self._losses: deque[float] = deque(maxlen=settings.collapse_window)
        self._alarmed = False
        self._upload_fails = False
        self._closing = threading.Event()
        self._uploader = threading.Thread(target=self._upload_now_and_then, name="metrics-upload", daemon=True)
        self._uploader.start()
        of_run = WandbRun(run.local.parent, run.store.url, wandb_id, settings, config)
        self._wandb = WandbRows(run, of_run) if settings.wandb != "disabled" else None

    def row(self, result: dict[str, Any], run_part: dict[str, Any]) -> None:
        """Take one step's values; numbers that are not finite become None."""
        row = self.run.metrics.append({"result": result, "run": {**run_part, "attempt": self.run.attempt}})
        if self._wandb is not None:
            self._wandb.row(row)
        self._watch(row["result"])

    def alarm(self, step: int, title: str, reason: str) -> None:
        """Tell of what somebody should look at: an event, and W&B's mail or Slack to who wants it."""
        self.run.event("alarm", step=step, reason=reason)
        if self._wandb is not None:
            self._wandb.alert(f"Farseer: {title}", reason)

    def close(self, wait_s: float = CLOSE_S, outcome: str | None = None) -> None:
        """Send what is left, for `wait_s` at most; the local files stay. May be called twice.

        outcome: pipeline.train's; None: an error.
        """
        deadline = time.monotonic() + wait_s
        self._closing.set()
        if self._wandb is not None:
            self._wandb.close(deadline, outcome)
        self._uploader.join(max(0.0, deadline - time.monotonic()))

    def _upload_now_and_then(self) -> None:
        while not self._closing.wait(self.settings.upload_seconds):
            self._try_upload()
        self._try_upload()

    def _try_upload(self) -> None:
        try:
            self.run.upload()
        except Exception as error:  # noqa: BLE001 - rows must never stop a training; they are kept and sent later
            if not self._upload_fails:  # said once
                self.run.event("upload failed", reason=f"{error}; the lines are kept and sent later")
            self._upload_fails = True
        else:
            self._upload_fails = False

    def _watch(self, result: dict[str, Any]) -> None:
        """Raise the alarm of a collapse, once until the loss is below ln K again; what is not finite counts as ln K."""
        if result["step"] <= self._quiet_until:
            return
        self._losses.append(self._ln_k if result["loss"] is None else result["loss"])
        if len(self._losses) < self.settings.collapse_window:
            return
        mean = sum(self._losses) / len(self._losses)
        near = mean > (1 - self.settings.collapse_band) * self._ln_k
        if near and not self._alarmed:
            reason = f"collapse: mean loss {mean:.4f} of {len(self._losses)} steps, ln K is {self._ln_k:.4f}"
            self.alarm(result["step"], "the run learns nothing", reason)
        self._alarmed = near


class Recovery:
    """How long a start took to bring its run forward again, told once, when it has come to a step that is new.

    folder: the run's on the shared disk, with the rows of earlier attempts; a start at another site, which has none,
    tells nothing. attempt: this one. start: the step that it goes on from.
    """

    def __init__(self, folder: Path, attempt: int, start: int) -> None:
        earlier = [path / "metrics.jsonl" for number, path in attempt_folders(folder).items() if number < attempt]
        last = [row for row in map(last_line, earlier) if row is not None]
        self._start = start
        self._reached = max((row["result"]["step"] for row in last), default=None)
        self._heard = max((row["run"]["time"] for row in last), default=0.0)

    def step(self, step: int, time: float) -> dict[str, Any] | None:
        """A step has ended, at that time; what to tell if it is the first new one."""
        if self._reached is None or step <= self._reached:
            return None
        redone, self._reached = max(0, self._reached - self._start), None
        return {"step": step, "seconds": round(time - self._heard, 1), "redone": redone}
