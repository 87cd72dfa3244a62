"""What a page of two runs of 120,000 steps takes (`make dashboard`), and the same page again a moment later.

python -m bench.dashboard
"""

import json
import resource
import tempfile
import time
from pathlib import Path

import yaml

from bench.figures import keep
from bench.status import event, row
from jobs.daemons import Process
from jobs.dashboard import briefs
from jobs.runs import Job
from jobs.site import ROOT, Site
from pipeline.config import load
from pipeline.report.rows import RowReader

STEPS, EVERY = 120_000, 1000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            make_run(Path(folder) / name)
        site, readers = Site(name="bench", shared_dir=folder, executor="local"), dict[str, RowReader]()
        first, again = (seconds(site, readers) for _ in range(2))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"dashboard of 2 runs of {STEPS:,} steps: {first:.2f} s, again {again:.2f} s, {memory:,.0f} MB at most")
    keep({"dashboard_s": round(first, 2), "dashboard_again_s": round(again, 2), "dashboard_mb": round(memory)})


def seconds(site: Site, readers: dict[str, RowReader]) -> float:
    begun = time.process_time()
    found, _ = briefs(site, ["one", "two"], [], readers)
    assert [one.done for one in found] == [STEPS, STEPS]
    return time.process_time() - begun


def make_run(run_dir: Path) -> None:
    here, begun = run_dir / "a01", time.time() - STEPS
    here.mkdir(parents=True)
    steps = range(EVERY, STEPS, EVERY)
    events = [event(begun, 1, "started", 0), *(event(begun, 1, "committed", step) for step in steps)]
    (here / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    with (here / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row(begun, 1, step)) + "\n" for step in range(1, STEPS + 1))
    config = load(ROOT / "conf" / "demo.yaml", "store=s3://runs")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    Job(run_dir.name, run_dir, f"file://{run_dir}/store", "local-1", Process(1, -1)).save()


if __name__ == "__main__":
    main()
