"""How long `make status` takes with 200 runs of three attempts each, rows and events as a day's training leaves them,
and with ten runs of another site, each a day old, that only a real S3 has.

python -m bench.status
"""

import json
import tempfile
import time
from pathlib import Path

from bench.figures import keep
from bench.s3 import served
from data_shards.store import Store
from jobs.daemons import Process
from jobs.elsewhere import elsewhere
from jobs.runs import Job, statuses
from jobs.site import Site

RUNS, ATTEMPTS, STEPS, EVERY = 200, 3, 5000, 100
ELSEWHERE, SEGMENTS = 10, 300


def main() -> None:
    on_disk()
    in_store()


def on_disk() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(RUNS):
            make_run(Path(folder) / f"run{number:03d}")
        begun = time.monotonic()
        found = statuses(Site(name="bench", shared_dir=folder, executor="local"))
        seconds = time.monotonic() - begun
    assert len(found) == RUNS
    print(f"status of {RUNS} runs: {seconds:.2f} s, {1000 * seconds / RUNS:.1f} ms a run")
    keep({"status_s_200_runs": round(seconds, 3)})


def in_store() -> None:
    with served():
        store = Store("s3://runs/team")
        for number in range(ELSEWHERE):
            put_run(store.at(f"run{number}"))
        begun = time.process_time()
        found, _ = elsewhere([], [store.url])
        seconds = time.process_time() - begun
    assert [one.step for one in found] == [SEGMENTS] * ELSEWHERE
    print(
        f"status of {ELSEWHERE} runs in a store: {seconds:.2f} s of a core, {1000 * seconds / ELSEWHERE:.0f} ms a run"
    )
    keep({"status_s_10_runs_in_store": round(seconds, 3)})


def put_run(store: Store) -> None:
    """As an attempt leaves it that sends its lines every few minutes."""
    now = time.time()
    for step in range(1, SEGMENTS + 1):
        told = event(now, 1, "committed", step) if step > 1 else event(now, 1, "started", 0)
        for name, line in (("events", told), ("metrics", row(now, 1, step))):
            store.put(f"{name}/a01-{step:06d}.jsonl", json.dumps(line).encode() + b"\n")


def make_run(run_dir: Path) -> None:
    """Attempts that each take up the last checkpoint of the one before."""
    now, step = time.time(), 0
    for attempt in range(1, ATTEMPTS + 1):
        here = run_dir / f"a{attempt:02d}"
        here.mkdir(parents=True)
        events = [event(now, attempt, "resumed" if step else "started", step)]
        events += [event(now, attempt, "committed", s) for s in range(step + EVERY, step + STEPS, EVERY)]
        rows = [row(now, attempt, s) for s in range(step + 1, step + STEPS)]
        (here / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
        (here / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
        step += STEPS - EVERY
    Job(run_dir.name, run_dir, f"file://{run_dir}/store", "local-1", Process(1, -1)).save()


def event(now: float, attempt: int, name: str, step: int) -> dict[str, object]:
    return {"time": now + step, "attempt": attempt, "event": name, "step": step, "steps": 100_000, "ranks": 8}


def row(now: float, attempt: int, step: int) -> dict[str, object]:
    run = {"time": now + step, "step_s": 1.0, "wait_s": 0.05, "images_s": 64.0, "bytes_read": 10**7, "retries": 0}
    result = {"step": step, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0, "batch_hash": "f" * 16, "crop_hash": "f" * 16}
    return {"result": result, "run": {**run, "attempt": attempt, "replaced": 0, "rss_bytes": 10**9}}


if __name__ == "__main__":
    main()
