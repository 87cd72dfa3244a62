"""A monitor of a run that is fed rows like a training's, and what it leaves behind."""

import json
import math
import os
import time
from itertools import count
from typing import Any, NoReturn

from data_shards.store import Store
from pipeline.monitor import Monitor, MonitorSettings
from pipeline.run import Run

NUMBERS = count()
K = 300


def fresh_store() -> Store:
    """An empty one."""
    return Store(f"memory://monitor-{os.getpid()}-{next(NUMBERS)}")


def open_monitor(run: Run, wandb_id: str = "run-id", quiet_until: int = 0, **settings: Any) -> Monitor:
    chosen = MonitorSettings.model_validate({"wandb": "disabled", **settings})
    return Monitor(run, chosen, {"optim": {"lr": 0.3}}, wandb_id, K, quiet_until)


def result(step: int, loss: float | None = None) -> dict[str, Any]:
    """Like a training's: usage on each tenth step only, and a loss that is not finite at step 7."""
    measured = step % 10 == 0
    return {
        "step": step,
        "loss": loss if loss is not None else (None if step == 7 else 5.5 / step),
        "lr": 0.1 + 0.2,
        "grad_norm": math.inf if step == 7 else 1 / 3,
        "prototypes_used": 0.25 if measured else None,
        "code_entropy": (math.nan if step == 10 else 0.75) if measured else None,
        "batch_hash": f"{step:016x}",
    }


def run_part(step: int) -> dict[str, Any]:
    return {"time": time.time(), "step_s": 0.1 / 3, "bytes_read": 2**40 + step}


def feed(monitor: Monitor, steps: range) -> None:
    for step in steps:
        monitor.row(result(step), run_part(step))


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def local_lines(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.local / f"{name}.jsonl"
    text = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=refuse_constant) for line in text]


def events(run: Run) -> list[str]:
    return [event["event"] for event in local_lines(run, "events")]
