"""A short real run that something happens to: its job, its ranks, its steps, and what came of it."""

import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import local_slurm, runs, slurm_conf
from jobs.chaos.proxy import Proxy
from jobs.daemons import wait_until
from jobs.launch import launch
from jobs.runs import Job
from jobs.site import Site
from jobs.start import RankRecord, attempt_files
from pipeline.config import Config
from pipeline.journal import read_lines, read_metrics

SETTINGS = slurm_conf.Settings(nodes=4)
DEADLINE_S = 420.0  # of a trial: several starts on a busy machine
POLL_S = 0.02
TAIL_BYTES = 4096  # of the rows, a few


@dataclass(frozen=True)
class Scene:
    """What all trials of a campaign share. The jobs reach the store through `proxy`, the campaign itself directly."""

    site: Site
    config: Config
    slurm: local_slurm.Slurm
    proxy: Proxy
    disk: Path | None = None  # a small file system for the jobs' local files, when one could be mounted

    def repair(self) -> None:
        """Start what of the cluster has died, and let the store answer."""
        self.proxy.mode = "pass"
        local_slurm.start_slurm(self.slurm.directory, SETTINGS)


class Trial:
    """One run. `rng` draws its moments."""

    def __init__(self, scene: Scene, name: str, seed: int) -> None:
        self.scene, self.rng = scene, random.Random(seed)
        self.store = Store(f"{scene.config.store}/{name}")
        self.job: Job = launch(scene.site, name, self.store.url, scene.config.dump())
        self.run_dir = self.job.run_dir
        self.hit_at: float | None = None
        self._deadline = time.monotonic() + DEADLINE_S

    @property
    def step(self) -> int:
        """The highest step that an attempt has done."""
        ends = (read_lines(path, TAIL_BYTES) for path in attempt_files(self.run_dir, "metrics.jsonl"))
        return max((rows[-1]["result"]["step"] for rows in ends if rows), default=0)

    def somewhere(self) -> str:
        """Wait for a step drawn from the middle of the run; returns it in words, as the moment of the fault."""
        steps = self.scene.config.train.steps or 0
        at = self.rng.randrange(steps // 6, steps - steps // 6)
        self.wait(lambda: self.step >= at, f"step {at}")
        return f"step {self.step}"

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until it is so. Raises UserError when the job ends, or the time is up, before."""
        over = False
        while not condition():
            if over or time.monotonic() > self._deadline:
                raise UserError(
                    f"{self.run_dir}: waited for {what}: {'the job is over' if over else 'it did not come'}"
                )
            over = self.step >= (self.scene.config.train.steps or 0) and runs.state(self.job) is None
            time.sleep(POLL_S)

    def ranks(self) -> list[RankRecord]:
        """Those of the newest start that run."""
        return [record for record in self.job.start.ranks() if record.process.running()]

    def hit(self, records: Iterable[RankRecord], number: signal.Signals) -> None:
        """Signal these ranks."""
        self.hit_at = self.hit_at or time.time()
        for record in records:
            record.process.send(number)

    def finish(self) -> None:
        """Wait until the job is over, whatever it goes through. Raises UserError when it does not end in time."""
        if not wait_until(lambda: runs.state(self.job) is None, self._deadline - time.monotonic(), 0.2):
            runs.end(self.job)
            raise UserError(
                f"{self.run_dir}: not over after {DEADLINE_S:.0f} s; its logs are in {self.run_dir / 'logs'}"
            )

    def results(self) -> list[dict[str, Any]]:
        """What the run has learned, a row a step, as the store has it."""
        return [row["result"] for row in read_metrics(self.store)]

    def steps_redone(self) -> int:
        """Steps that were done more than once."""
        steps = [row["result"]["step"] for row in self._rows()]
        return len(steps) - len(set(steps))

    def recovered_s(self) -> float | None:
        """Seconds from the fault to the end of the next step that had not been done before."""
        hit = self.hit_at
        rows = [(row["run"]["attempt"], row["run"]["time"], row["result"]["step"]) for row in self._rows()]
        if hit is None or not rows:
            return None
        struck = max((attempt for attempt, when, _ in rows if when <= hit), default=1)
        restarted = any(attempt > struck for attempt, _, _ in rows)
        before = [row for row in rows if (row[0] <= struck if restarted else row[1] <= hit)]
        reached = max((step for _, _, step in before), default=0)
        return min((when - hit for _, when, step in rows if when > hit and step > reached), default=None)

    def _rows(self) -> list[dict[str, Any]]:
        return [row for path in attempt_files(self.run_dir, "metrics.jsonl") for row in read_lines(path)]
