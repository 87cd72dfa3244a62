"""What a run tells of itself: a metrics row a step, W&B fed the same values, alarms.

A row has a `result` part, equal bit for bit between runs where exactness is claimed, and a `run` part (times, bytes,
memory), never compared. W&B gets a row only when its step is above the last one sent, under one id for all attempts.
"""

import json
import math
import netrc
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from data_shards.section import Section


class MonitorSettings(Section):
    """What is watched and where it is shown."""

    affects_results: ClassVar[bool] = False
    log_every: PositiveInt = 10  # steps between measurements of prototype usage
    upload_seconds: PositiveFloat = 30.0  # between uploads of rows that no checkpoint took along
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online with a key, else offline
    project: str = "farseer"
    entity: str | None = None
    collapse_band: PositiveFloat = 0.005  # a mean loss this near to ln K (relative) is a collapse
    collapse_window: PositiveInt = 100  # steps


class Monitor:
    """Rank 0's ear: takes rows, keeps them, sends them on.

    run: a pipeline.run.Run (its journals and events); wandb_id: the run's own; start_step: the step resumed from.
    """

    def __init__(
        self,
        run: Any,
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
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="metrics upload")
        self._upload: Future[None] | None = None
        self._uploaded = time.monotonic()
        self._wandb = WandbRows(
            run.local.parent / "wandb", settings, config, wandb_id, run.store.url.rsplit("/", 1)[-1]
        )

    def row(self, result: dict[str, Any], run_part: dict[str, Any]) -> None:
        """Take one step's values."""
        self.run.metrics.append({"result": result, "run": {**run_part, "attempt": self.run.attempt}})
        self._wandb.row(result, run_part)
        self._watch(result)
        if time.monotonic() - self._uploaded > self.settings.upload_seconds and (
            not self._upload or self._upload.done()
        ):
            self._uploaded = time.monotonic()
            self._upload = self._uploads.submit(self._try_upload)

    def close(self) -> None:
        """Send what is left. The store may refuse: the local files stay."""
        self._uploads.shutdown()
        self._try_upload()
        self._wandb.close()

    def _try_upload(self) -> None:
        try:
            self.run.upload()
        except Exception as error:  # noqa: BLE001 - rows must never stop a training; they are kept and sent later
            self.run.event("upload failed", reason=str(error))

    def _watch(self, result: dict[str, Any]) -> None:
        self._losses.append(result["loss"])
        if result["step"] <= self._quiet_until or len(self._losses) < self.settings.collapse_window:
            return
        near = abs(sum(self._losses) / len(self._losses) / self._ln_k - 1) < self.settings.collapse_band
        if near and not self._alarmed:
            self.run.event(
                "alarm",
                step=result["step"],
                reason=f"collapse: mean loss within {self.settings.collapse_band:.1%} of ln K",
            )
        self._alarmed = near


class WandbRows:
    """W&B's own client, fed rows under one id; knows which step it sent last, over restarts.

    folder: on the shared disk; keeps W&B's files and `sent.json`.
    """

    def __init__(
        self, folder: Path, settings: MonitorSettings, config: dict[str, Any], wandb_id: str, name: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._state = folder / "sent.json"
        self.sent = json.loads(self._state.read_text())["step"] if self._state.exists() else 0
        self._run: Any = None
        mode = wandb_mode(settings)
        if mode != "off":
            import wandb

            quiet = wandb.Settings(
                silent=True, console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True
            )
            self._run = wandb.init(
                mode=mode, id=wandb_id, name=name, dir=str(folder), project=settings.project, entity=settings.entity,
                resume="allow", config=config, settings=quiet,
            )  # fmt: skip
            self._run.define_metric("*", step_metric="step")

    def row(self, result: dict[str, Any], run_part: dict[str, Any]) -> None:
        """Send a row unless an earlier attempt sent its step."""
        if self._run is None or result["step"] <= self.sent:
            return
        named = {f"result/{k}": v for k, v in result.items() if k != "step"} | {
            f"run/{k}": v for k, v in run_part.items()
        }
        self._run.log({"step": result["step"], **named})
        self.sent = result["step"]
        self._state.write_text(json.dumps({"step": self.sent}))

    def close(self) -> None:
        """Finish W&B's files."""
        if self._run is not None:
            self._run.finish(quiet=True)


def wandb_mode(settings: MonitorSettings) -> str:
    """online, offline or off; `auto` is online where a key is to be had (WANDB_API_KEY or netrc)."""
    if settings.wandb != "auto":
        return settings.wandb
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        hosts = netrc.netrc().hosts
    except (FileNotFoundError, netrc.NetrcParseError):
        return "offline"
    return "online" if any("wandb" in host for host in hosts) else "offline"
