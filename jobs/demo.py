"""`make demo`: the whole product on this machine, each part real, in six to ten minutes.

Photographs -> shards in S3 -> SwAV on SLURM, preempted half way and resumed -> evaluation -> report.html and demo.json.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.pack import PackReport, PackSettings, pack
from data_shards.sources import list_sources
from data_shards.store import Store
from data_shards.whole import write_whole
from jobs import cluster, photos
from jobs.logs import is_over, sentence
from jobs.progress import Progress
from jobs.runs import Job, history, preempt
from jobs.site import ROOT, load_site
from jobs.submit import submit
from jobs.verbs import say
from pipeline.config import Config, load
from pipeline.evaluate.run import evaluate_run, open_tiles
from pipeline.evaluate.table import Evaluation
from pipeline.journal import read_events, read_metrics
from pipeline.report.run import report_run

VAR = ROOT / "var"
STAGES = 6
POLL_S = 0.5
MARGIN = 0.10  # trained over untrained by the probe; seeds gained 0.136 to 0.198 (docs/BENCHMARKS.md)
SHARD_BYTES = 2**20  # small, so that a small set has several


@dataclass(frozen=True)
class Figures:
    """What demo.json holds. trained, untrained and histogram: linear probe on distorted held-out tiles, 0 to 1."""

    seconds: float
    steps: int
    loss: float
    ln_k: float
    trained: float
    untrained: float
    histogram: float
    preempted: bool
    resumed_step: int | None
    planted_corrupt: int
    refused: int


def demo(src: Path | None = None, overrides: str = "", var: Path = VAR) -> Figures:
    """Run it all below the folder `var`; prints what it does. Raises UserError where a user can mend what is wrong."""
    began = time.monotonic()
    _stage(1, "A real S3 server and a real SLURM, on loopback")
    say(*cluster.up(var / "cluster"))
    site = load_site(str(var / "cluster" / "site.yaml"))
    site.activate()

    _stage(2, "Real photographs")
    pictures = photos.prepare(var / "photos", src)
    say(pictures.summary())

    _stage(3, "Packing them into shards in the store")
    bank, held_out = (f"s3://shards/demo/{pictures.name}/{part}" for part in ("train", "test"))
    planted = photos.plant_corrupt(pictures.train, seed=0)
    packed = _pack(pictures.train, bank)
    _pack(pictures.test, held_out)
    say(*(f"refused: {line}" for line in packed.refused_lines()))

    conf = _write_config(var, bank)
    config = load(conf, overrides)
    run = time.strftime("demo-%Y%m%d-%H%M%S")
    where = f"{site.nodes} nodes" if site.executor == "slurm" else f"{site.ranks} processes of this machine"
    _stage(4, f"Pretraining: SwAV on a RegNetY, {where}, preempted half way")
    job = submit(config, site, run)
    say(f"job {job.id} is submitted as run {run}; {job.make('logs')} shows what its ranks say")
    _follow(job, config)

    _stage(5, "What the trunk has learned")
    store = Store(job.store)
    tiles = open_tiles(bank), open_tiles(held_out)
    evaluation = evaluate_run(store, *tiles)
    say(*evaluation.text())

    _stage(6, "The report")
    page = var / "report.html"
    report = report_run(store, *tiles, evaluation, page, authors=pictures.authors, site=site.name)
    figures = _figures(store, config, evaluation, len(planted), packed, time.monotonic() - began)
    (var / "demo.json").write_text(json.dumps(asdict(figures), indent=2) + "\n")
    again = f'make submit CONF={os.path.relpath(conf)} RUN=mine SET="optim.lr=0.004"'
    say(f"report: {report}", f"figures: {var / 'demo.json'}", f"another recipe on the same photographs: {again}")
    say("", _last_line(figures))
    if not overrides and src is None and figures.trained - figures.untrained < MARGIN:
        raise UserError(
            f"the trained trunk's probe is only {figures.trained - figures.untrained:.1%} above the untrained one's, "
            f"where {MARGIN:.0%} at least is expected; {report} shows the run"
        )
    return figures


def _write_config(var: Path, url: str) -> Path:
    """The demo's config on the photographs that were packed there; make takes it by default from then on."""
    path = var / "demo.yaml"
    recipe = os.path.relpath(ROOT / "conf" / "demo.yaml", var)
    write_whole(path, f"# Of make demo, which writes it anew.\nextends: {recipe}\ndata: {{url: {url}}}\n")
    return path


def _pack(folder: Path, url: str) -> PackReport:
    # handed over one by one, so that a checkout that was moved finds its set there
    report = pack([*list_sources(str(folder))], Store(url), PackSettings(shard_bytes=SHARD_BYTES))
    say(f"{url}: {report.summary()}")
    return report


def _follow(job: Job, config: Config) -> None:
    """Show the run's progress to its end; preempt it once, half way."""
    steps = config.train.steps or 0
    progress = Progress(job.run_dir, steps, config.swav.prototypes)
    told, preempted = 0, False
    while True:
        over = is_over(job)
        events = history(job.run_dir)
        for event in events[told:]:
            progress.tell(sentence(event))
        told = len(events)
        step = progress.show()
        if not preempted and step >= steps // 2:
            preempted = True
            progress.tell(f"preempting job {job.id} at step {step}, as SLURM would: USR2 to its ranks")
            preempt(job)
        if over:
            break
        time.sleep(POLL_S)
    if not any(event["event"] == "finished" for event in events):
        raise UserError(f"RUN={job.run}: the job is over, the run is not finished; {job.make('logs')} shows why")


def _figures(
    store: Store, config: Config, evaluation: Evaluation, planted: int, packed: PackReport, seconds: float
) -> Figures:
    events, rows = read_events(store), read_metrics(store)
    resumed = next((event["step"] for event in events if event["event"] == "resumed"), None)
    probe = evaluation.row("distorted_probe").scores
    return Figures(
        seconds=round(seconds, 1),
        steps=len(rows),
        loss=sum(row["result"]["loss"] for row in rows[-20:]) / len(rows[-20:]),
        ln_k=math.log(config.swav.prototypes),
        trained=probe["trained"],
        untrained=probe["untrained"],
        histogram=probe["histogram"],
        preempted=any(event["event"] == "preempted" for event in events),
        resumed_step=resumed,
        planted_corrupt=planted,
        refused=packed.refused,
    )


def _last_line(figures: Figures) -> str:
    probe = (
        f"{figures.trained:.1%} trained, {figures.untrained:.1%} untrained, {figures.histogram:.1%} by colour histogram"
    )
    return (
        f"Shown in {figures.seconds / 60:.1f} minutes: {figures.steps} steps of SwAV, preempted, and resumed from the "
        f"store at step {figures.resumed_step}; loss {figures.loss:.2f} (ln K {figures.ln_k:.2f}); linear probe on "
        f"distorted held-out tiles {probe}."
    )


def _stage(number: int, title: str) -> None:
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    say("", f"{bold}[{number}/{STAGES}] {title}{plain}")
