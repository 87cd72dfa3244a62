"""What a run would do and cost, to read before anything is spent; what cannot work is refused, all reasons at once.

Needs the store, for the manifest of the shards, and no SLURM.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from data_shards.order import Order
from data_shards.order_limits import divisors
from data_shards.store import Store
from jobs import estimate
from jobs.estimate import Duration, Held, Speed
from jobs.launch import script_text
from jobs.reasons import Reasons
from jobs.site import Site
from jobs.verbs import duration
from pipeline.config import Config
from pipeline.run import open_data

CHECK_SECONDS = 20.0  # how long a store that does not answer is asked again before a run is refused
TABLE_ROWS = 12  # world sizes shown


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


def make_plan(config: Config, site: Site, run: str = "run", images_s: float | None = None) -> Plan:
    """Raises UserError with a line for each reason why it cannot work. images_s: speed to assume, of all ranks."""
    reasons, held = Reasons(), estimate.held(config)
    reasons.lines += _wrong_without_data(config, site, held)
    found = reasons.ask(lambda: _open(config))
    if found is not None:
        sample_bytes, order, config = found
        reasons.lines += _wrong_with_data(config, site, sample_bytes, order)
    reasons.refuse()
    rate = estimate.speed(config, site, images_s)
    figures = [*_learning(config, site, sample_bytes, order), *_spending(config, site, sample_bytes, order, rate, held)]
    figures += _memory(config, site, sample_bytes, order, held)
    return Plan(config, tuple(figures), script_text(site, run, f"{config.store}/{run}"))


def _open(config: Config) -> tuple[float, Order, Config]:
    """Bytes of a sample on average, the order, the config filled in."""
    for source in config.data.sets:
        Store(source.url).check()  # gives up sooner than a read would
    shards, order, filled = open_data(config, CHECK_SECONDS)
    return shards.mean_bytes, order, filled


def _wrong_without_data(config: Config, site: Site, held: Held) -> Iterator[str]:
    lanes, ranks, where = config.data.lanes, site.ranks, f"SITE={site.name}"
    if lanes % ranks:
        near = sorted(sorted(divisors(lanes), key=lambda n: abs(n - ranks))[:3])
        fitting = max(1, round(lanes / ranks)) * ranks
        hint = f', or SET="data.lanes={fitting}" in a new run' if config.data.batch % fitting == 0 else ""
        yield (
            f"data.lanes: {lanes} does not divide among {ranks} ranks ({where}: {site.nodes} nodes x "
            f"{site.ranks_per_node}); {', '.join(map(str, near))} ranks would{hint}"
        )
    if 0 < site.gpus_per_node < site.ranks_per_node:
        yield f"{where}: ranks_per_node: {site.ranks_per_node} ranks for {site.gpus_per_node} GPUs; one each at most"
    if site.gpu_memory_gb is not None and held.device > site.gpu_memory_gb * 2**30:
        yield (
            f"model.trunk: {config.model.trunk} takes {_bytes(held.device)} of each GPU before any image, {where}: "
            f"gpu_memory_gb is {site.gpu_memory_gb:g}; a model is not split among GPUs: choose a smaller one"
        )
    if site.signal_delay_s >= 60 * site.time_limit_min:
        yield f"{where}: signal_delay_s: {site.signal_delay_s} is not below the time limit, {site.time_limit_min} min"


def _wrong_with_data(config: Config, site: Site, sample_bytes: float, order: Order) -> Iterator[str]:
    if config.train.length(order) < 1:
        yield f"train.epochs: {config.train.epochs:g} is less than one step of {order.batch_size} images"
    if order.lanes % site.ranks:
        return
    window = int(order.lanes // site.ranks * order.window_samples * sample_bytes)
    if window > config.reader.prefetch_bytes:
        yield (
            f"reader.prefetch_bytes: {config.reader.prefetch_bytes:,} bytes are too few for a window of each "
            f"of a rank's {order.lanes // site.ranks} lanes; "
            f'SET="reader.prefetch_bytes={window}" would do, or more ranks'
        )
    node = _node_bytes(config, site.ranks_per_node, order.lanes / site.ranks, order, sample_bytes)
    if site.memory_gb is not None and node > site.memory_gb * 2**30:
        yield (
            f"SITE={site.name}: memory_gb: {site.memory_gb:g} is too little for {site.ranks_per_node} ranks that hold "
            f"{_bytes(node)} of samples; fewer data.window_chunks, a smaller reader.prefetch_bytes, or more nodes"
        )


def _learning(config: Config, site: Site, sample_bytes: float, order: Order) -> Iterator[Figure]:
    group, optim, batch = "LEARNS", config.optim, order.batch_size
    steps = config.train.length(order)
    images = steps * batch
    total = sample_bytes * order.samples
    rates = [rate * batch / 256 for rate in (optim.start_lr, optim.lr, optim.final_lr)]
    yield Figure(group, "fingerprint", config.fingerprint(), config.fingerprint())
    where = ", ".join(source.url for source in config.data.sets)
    text = f"{where}: {order.samples:,} images of {_bytes(sample_bytes)}, {_bytes(total)} in all"
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
    flow = f", {_bytes(rate.images_s * sample_bytes)}/s of all ranks" if rate else ""
    yield Figure(group, "bytes read", int(read), f"{_bytes(read)} from the store{flow}")
    size, every = held.checkpoint, config.checkpoint.every_steps
    kept = min(config.checkpoint.keep, -(-steps // every))
    how_often = f", {every * order.batch_size / rate.images_s / 60:,.0f} min" if rate else ""
    text = f"{_bytes(size)} every {every:,} steps{how_often}; the last {kept} are kept, {_bytes(kept * size)}"
    yield Figure(group, "checkpoint bytes", size, text)
    if rate is None:
        yield Figure(group, "speed", None, "not known: no earlier run like it here; IMAGES_PER_S=1400 assumes one")
        return
    yield Figure(group, "speed", rate.images_s, f"{rate.images_s:,.1f} images/s ({rate.source})")
    step_s = order.batch_size / rate.images_s
    yield Figure(group, "step", step_s, f"{1000 * step_s:,.0f} ms, {rate.images_s / site.ranks:,.2f} images/s a rank")
    yield from _time(site, estimate.duration(steps, step_s, every, site))


def _time(site: Site, takes: Duration) -> Iterator[Figure]:
    group = "TAKES"
    text = f"{takes.failures:.1f} failures ({site.failures_per_node_day:.3g} a node and day)"
    text += f", {takes.time_limits} at the time limit; {estimate.RESTART_S:.0f} s each"
    yield Figure(group, "restarts", takes.failures + takes.time_limits, text)
    days = takes.step_seconds / 86_400
    yield Figure(group, "days", days, f"{_days(takes.step_seconds)} of steps, {_days(takes.seconds)} with restarts")
    gpus = site.nodes * site.gpus_per_node
    hours = takes.seconds / 3600 * (gpus or site.ranks)
    if gpus:
        yield Figure(group, "GPU-hours", hours, f"{hours:,.0f}, {gpus} GPUs")
    else:
        yield Figure(group, "rank-hours", hours, f"{hours:,.1f}, no GPU")
    if site.price_per_gpu_hour is not None and gpus:
        price = hours * site.price_per_gpu_hour
        yield Figure(group, "money", price, f"{price:,.0f} at {site.price_per_gpu_hour:g} a GPU-hour")


def _memory(config: Config, site: Site, sample_bytes: float, order: Order, held: Held) -> Iterator[Figure]:
    """Of the model; then of samples that wait for their step: two windows a lane, as far as prefetch_bytes allows."""
    text = f"{_bytes(held.device)} a rank before any image: weights, optimizer, gradients and a copy of them"
    yield Figure("HOLDS ON ITS DEVICE", "device bytes", held.device, text)
    shown = sorted(sorted(divisors(order.lanes), key=lambda n: abs(n - site.ranks))[:TABLE_ROWS])
    for ranks in shown:
        lanes, each = order.lanes // ranks, min(site.ranks_per_node, ranks)
        window = lanes * order.window_samples * sample_bytes
        node = _node_bytes(config, each, lanes, order, sample_bytes)
        fits = window <= config.reader.prefetch_bytes
        text = f"{_bytes(node / each)} a rank, {_bytes(node)} a node of {each}"
        text = text if fits else f"not within reader.prefetch_bytes: a window a lane is {_bytes(window)}"
        here = "  <- this site" if ranks == site.ranks else ""
        yield Figure("HOLDS IN HOST MEMORY", f"{ranks} ranks", int(node / each) if fits else None, text + here)


def _node_bytes(config: Config, ranks: int, lanes: float, order: Order, sample_bytes: float) -> float:
    """Bytes of samples that a node's ranks hold, with so many lanes each."""
    windows = 2 * lanes * order.window_samples * sample_bytes
    return float(ranks * min(windows, config.reader.prefetch_bytes))


def _bytes(number: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def _days(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:,.1f}" if days >= 1 else f"{days:.2g} ({duration(seconds)})"
