"""What a run would do and cost, to read before anything is spent.

Needs the store, for the manifest of the shards where they are not assumed, and no SLURM. A speed that nobody gives is
taken from earlier runs of the same site; each figure says where it comes from.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_shards.order import Order
from data_shards.order_limits import divisors
from jobs.device_memory import Held, held_bytes
from jobs.feasible import Assumed, feasible, node_bytes
from jobs.launch import script_text
from jobs.site import Site
from jobs.start import attempt_files
from jobs.verbs import bytes_text, duration
from pipeline.config import SAVING, Config
from pipeline.journal import read_lines

TABLE_ROWS = 12  # world sizes shown
TAIL_BYTES = 256 * 1024  # of metrics: some hundred rows
FEW_ROWS = 5  # say nothing of a run's speed
RESTART_S = 300.0  # from the end of a start to the next one's first new step: queue, imports, checkpoint, first window


class Figure(NamedTuple):
    """One line of a plan. `value`: as JSON has it, in SI units; `text`: as people read it."""

    group: str
    name: str
    value: Any
    text: str


@dataclass(frozen=True)
class Plan:
    """`config`: resolved, with what depended on the data filled in."""

    config: Config
    figures: tuple[Figure, ...]
    script: str

    def text(self) -> Iterator[str]:
        """The resolved config and the batch script, then, where one looks first, the figures."""
        yield from ("CONFIG", yaml.safe_dump(self.config.dump(), sort_keys=False).rstrip())
        yield from ("", "BATCH SCRIPT", self.script.rstrip())
        width = max(len(figure.name) for figure in self.figures) + 2
        group = ""
        for figure in self.figures:
            if figure.group != group:
                group = figure.group
                yield from ("", group)
            yield f"  {figure.name:{width}}{figure.text}"

    def to_json(self) -> dict[str, Any]:
        figures = {figure.name.replace(" ", "_").replace("-", "_"): figure.value for figure in self.figures}
        return {"config": self.config.dump(), "script": self.script, **figures}


@dataclass(frozen=True)
class Speed:
    """Images a second of all ranks; `source` says in words where the number comes from."""

    images_s: float
    source: str


@dataclass(frozen=True)
class Duration:
    """How long a run takes. `seconds` with all restarts, `step_seconds` without."""

    step_seconds: float
    seconds: float
    failures: float  # to be expected
    time_limits: int  # restarts because the job's time was over


def make_plan(
    config: Config,
    site: Site,
    run: str = "run",
    images_s: float | None = None,
    assumed: Assumed | None = None,
) -> Plan:
    """Raises UserError with a line for each reason why it cannot work.

    images_s: speed to assume, of all ranks. assumed: a set to plan for that is not packed yet.
    """
    sample_bytes, order, config, checked, _ = feasible(config, site, assumed)
    held, rate = checked or held_bytes(config, site.ranks), speed(config, site, images_s)
    figures = [*_learning(config, site, sample_bytes, order, assumed is not None)]
    figures += [*_spending(config, site, sample_bytes, order, rate, held)]
    figures += _memory(config, site, sample_bytes, order, held)
    return Plan(config, tuple(figures), script_text(site, run, f"{config.store}/{run}"))


def _learning(config: Config, site: Site, sample_bytes: float, order: Order, assumed: bool) -> Iterator[Figure]:
    group, optim, batch = "LEARNS", config.optim, order.batch_size
    steps = config.train.length(order)
    images = steps * batch
    total = sample_bytes * order.samples
    rates = [rate * batch / 256 for rate in (optim.start_lr, optim.lr, optim.final_lr)]
    yield Figure(group, "fingerprint", config.fingerprint(), config.fingerprint())
    where = "assumed" if assumed else ", ".join(source.url for source in config.data.sets)
    text = f"{where}: {order.samples:,} images of {bytes_text(sample_bytes)}, {bytes_text(total)} in all"
    yield Figure(group, "samples", order.samples, text)
    for part in order.parts:
        share = part.share / sum(one.share for one in order.parts)
        text = f"{share:.2%} of the images, {images * share / part.samples:,.2f} epochs of its {part.samples:,}"
        yield Figure(group, part.url, share, text)
    epochs = images / order.samples
    yield Figure(group, "steps", steps, f"{steps:,} of {batch:,} images")
    yield Figure(group, "images", images, f"{images:,}")
    yield Figure(group, "epochs", epochs, f"{epochs:,.2f}")
    yield Figure(
        group,
        "batch",
        batch,
        f"{batch:,} = {order.lanes} lanes x {order.lane_batch} = {site.ranks} ranks x {batch // site.ranks}",
    )
    text = f"{optim.lr:g} per 256 images x {batch / 256:g} = {rates[1]:g} at most"
    if optim.warmup_steps:
        text += f", from {rates[0]:g} in {optim.warmup_steps:,} steps ({optim.warmup_steps / steps:.1%})"
    yield Figure(group, "learning rate", rates[1], f"{text}, to {rates[2]:g}")


def _spending(
    config: Config, site: Site, sample_bytes: float, order: Order, rate: Speed | None, held: Held
) -> Iterator[Figure]:
    group, steps = "TAKES", config.train.length(order)
    yield Figure(
        group, "ranks", site.ranks, f"{site.nodes} nodes x {site.ranks_per_node} = {site.ranks}, SITE={site.name}"
    )
    read = steps * order.batch_size * sample_bytes
    flow = f", {bytes_text(rate.images_s * sample_bytes)}/s of all ranks" if rate else ""
    yield Figure(group, "bytes read", int(read), f"{bytes_text(read)} from the store{flow}")
    size, every = held.checkpoint, config.checkpoint.every_steps
    kept = min(config.checkpoint.keep, -(-steps // every))
    how_often = f", {every * order.batch_size / rate.images_s / 60:,.0f} min" if rate else ""
    text = f"{bytes_text(size)} every {every:,} steps{how_often}; the last {kept} are kept, {bytes_text(kept * size)}"
    yield Figure(group, "checkpoint bytes", size, text)
    if rate is None:
        yield Figure(group, "speed", None, "not known: no earlier run like it here; IMAGES_PER_S=1400 assumes one")
        return
    yield Figure(group, "speed", rate.images_s, f"{rate.images_s:,.1f} images/s ({rate.source})")
    step_s = order.batch_size / rate.images_s
    yield Figure(group, "step", step_s, f"{1000 * step_s:,.0f} ms, {rate.images_s / site.ranks:,.2f} images/s a rank")
    yield from _time(site, takes(steps, step_s, every, site))


def _time(site: Site, whole: Duration) -> Iterator[Figure]:
    group = "TAKES"
    text = f"{whole.failures:.1f} failures ({site.failures_per_node_day:.3g} a node and day)"
    text += f", {whole.time_limits} at the time limit; {RESTART_S:.0f} s each"
    yield Figure(group, "restarts", whole.failures + whole.time_limits, text)
    days = whole.step_seconds / 86_400
    yield Figure(group, "days", days, f"{_days(whole.step_seconds)} of steps, {_days(whole.seconds)} with restarts")
    gpus = site.nodes * site.gpus_per_node
    hours = whole.seconds / 3600 * (gpus or site.ranks)
    if gpus:
        yield Figure(group, "GPU-hours", hours, f"{hours:,.0f}, {gpus} GPUs")
    else:
        yield Figure(group, "rank-hours", hours, f"{hours:,.1f}, no GPU")
    if site.price_per_gpu_hour is not None and gpus:
        price = hours * site.price_per_gpu_hour
        yield Figure(group, "money", price, f"{price:,.0f} at {site.price_per_gpu_hour:g} a GPU-hour")


def _memory(config: Config, site: Site, sample_bytes: float, order: Order, held: Held) -> Iterator[Figure]:
    """Of the model and a step; of samples that wait for theirs: two windows a lane, as far as prefetch_bytes allows."""
    group, images = "HOLDS ON ITS DEVICE", order.batch_size // site.ranks
    parts = "its part of " if config.efficiency.sharded else ""
    text = f"{bytes_text(held.model)} a rank: {parts}weights, optimizer, gradients"
    yield Figure(group, "model bytes", held.model, text)
    again = ", blocks computed again backward" if config.efficiency.activation_checkpointing else ""
    yield Figure(group, "step bytes", held.step, f"{bytes_text(held.step)} more in a step of {images} images{again}")
    more = "; DALI, cuDNN and NCCL take some GB more" if site.gpus_per_node else ""
    text = f"{bytes_text(held.device)} as torch hands it out{more}"
    yield Figure(group, "device bytes", held.device, text)
    group, start = "HOLDS IN HOST MEMORY", site.ranks_per_node * held.weights
    text = f"{bytes_text(start)} a node: each of its {site.ranks_per_node} ranks draws all weights"
    yield Figure(group, "while starting", start, text)
    shown = sorted(sorted(divisors(order.lanes), key=lambda n: abs(n - site.ranks))[:TABLE_ROWS])
    for ranks in shown:
        lanes, each = order.lanes // ranks, min(site.ranks_per_node, ranks)
        window = lanes * order.window_samples * sample_bytes
        node = node_bytes(config, each, lanes, order, sample_bytes)
        fits = int(window) <= config.reader.prefetch_bytes  # as the reader counts
        text = f"{bytes_text(node / each)} a rank, {bytes_text(node)} a node of {each}"
        text = text if fits else f"not within reader.prefetch_bytes: a window a lane is {bytes_text(window)}"
        here = "  <- this site" if ranks == site.ranks else ""
        yield Figure(group, f"{ranks} ranks", int(node / each) if fits else None, text + here)


def _days(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:,.1f}" if days >= 1 else f"{days:.2g} ({duration(seconds)})"


def speed(config: Config, site: Site, assumed: float | None = None) -> Speed | None:
    """The assumed one, else what the site's newest run of the same model, crops, precision and batch did, else the
    site's own assumption, else None."""
    if assumed is not None:
        return Speed(assumed, "assumed, as you said")
    measured = next(_measured(config, site), None)
    if measured is not None:
        return measured
    if site.images_per_s is not None:
        return Speed(site.images_per_s, f"assumed: images_per_s of SITE={site.name}")
    return None


def _measured(config: Config, site: Site) -> Iterator[Speed]:
    """Of the site's runs that compute the same, the newest first; scaled when they had another number of ranks."""
    wanted = _computed(config.dump())
    for run_dir in sorted(Path(site.shared_dir).glob("*"), key=_last_written, reverse=True):
        try:
            same = _computed(yaml.safe_load((run_dir / "config.yaml").read_text())) == wanted
        except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError):
            continue
        files = attempt_files(run_dir, "metrics.jsonl")
        if not same or not files:
            continue
        rows = read_lines(files[-1], TAIL_BYTES)[1:]  # without the first one, whose time is that of starting up
        begun = [event for event in read_lines(files[-1].with_name("events.jsonl")) if "ranks" in event]
        if len(rows) >= FEW_ROWS and begun:
            ranks = int(begun[-1]["ranks"])
            images_s = statistics.median(float(row["run"]["images_s"]) for row in rows)
            scaled = "" if ranks == site.ranks else f", scaled from {ranks} ranks to {site.ranks}"
            yield Speed(images_s * site.ranks / ranks, f"measured: run {run_dir.name}{scaled}")


def _computed(config: dict[str, Any]) -> str:
    """What a step's time depends on."""
    parts = [config["model"], config["augment"]["crops"], config["train"]["precision"], config["data"]["batch"]]
    parts += [config["efficiency"].get(name, False) for name in SAVING]  # once unknown
    return json.dumps(parts, sort_keys=True)


def _last_written(run_dir: Path) -> float:
    return max((path.stat().st_mtime for path in attempt_files(run_dir, "metrics.jsonl")), default=0.0)


def takes(steps: int, step_s: float, every_steps: int, site: Site) -> Duration:
    """A failure costs a restart and half of what lies between two checkpoints; a time limit, only the restart."""
    bare = steps * step_s
    failures = site.nodes * site.failures_per_node_day * bare / 86_400
    limits = int(bare // (60 * site.time_limit_min))
    lost = failures * (RESTART_S + min(every_steps, steps) * step_s / 2) + limits * RESTART_S
    return Duration(bare, bare + lost, failures, limits)
