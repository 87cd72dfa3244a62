"""Whether a run can work at all, asked before anything is spent; what cannot is refused, all reasons at once.

Needs the store, for the manifest of the shards where they are not assumed, and no SLURM.
"""

from collections.abc import Iterator
from typing import NamedTuple

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.order import Order, make_order
from data_shards.order_limits import divisors
from data_shards.store import Store
from jobs.device_memory import Held, held_bytes
from jobs.reasons import Reasons
from jobs.site import Site
from jobs.verbs import bytes_text
from pipeline.config import SAVING, Config
from pipeline.run import Record, filled_in, open_data

Opened = tuple[float, Order, Config, ShardSet | None]

CHECK_SECONDS = 20.0  # how long a store that does not answer is asked again before a run is refused


class Assumed(NamedTuple):
    """A shard set that is yet to be packed; bytes of a sample with its tar header, on average."""

    samples: int
    sample_bytes: int


class Feasible(NamedTuple):
    """sample_bytes: on average; config: filled in; held: None where the site does not tell its memory.

    shards: None where they are assumed.
    """

    sample_bytes: float
    order: Order
    config: Config
    held: Held | None
    shards: ShardSet | None


def feasible(config: Config, site: Site, assumed: Assumed | None = None, record: Record | None = None) -> Feasible:
    """Raises UserError with a line for each reason why the run cannot work there.

    assumed: in the place of the config's data, which nobody asks for then. record: of a run that has begun, which goes
    on with the data as it was then.
    """
    reasons = Reasons()
    reasons.lines += _wrong_without_data(config, site)
    held = held_bytes(config, site.ranks) if site.gpu_memory_gb is not None or site.memory_gb is not None else None
    if held is not None:
        reasons.lines += _too_large(config, site, held)
    found = reasons.ask(lambda: _open(config, record) if assumed is None else _assume(config, assumed))
    if found is not None:
        sample_bytes, order, config, shards = found
        reasons.lines += _wrong_with_data(config, site, sample_bytes, order)
    reasons.refuse()
    return Feasible(sample_bytes, order, config, held, shards)


def _open(config: Config, record: Record | None) -> Opened:
    """Bytes of a sample on average, the order, the config filled in, the shards."""
    for source in config.data.sets:
        Store(source.url).check()  # gives up sooner than a read would
    shards, order, filled = open_data(config, CHECK_SECONDS, record)
    return shards.mean_bytes, order, filled, shards


def _assume(config: Config, assumed: Assumed) -> Opened:
    """The same of a set that is not there."""
    if len(config.data.sets) > 1:
        raise UserError(f"data.sources: SAMPLES= stands for one set, not for {len(config.data.sets)}; give data.url")
    order = make_order(config.data, assumed.samples, assumed.sample_bytes, "not packed")
    return assumed.sample_bytes, order, filled_in(config, order), None


def _wrong_without_data(config: Config, site: Site) -> Iterator[str]:
    yield from _wrong_store(config.store)
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
    if config.loader.device == "cuda" and not site.gpus_per_node:
        yield f"loader.device: cuda, and {where} has no GPUs (gpus_per_node: 0); auto takes what there is"
    if site.signal_delay_s >= 60 * site.time_limit_min:
        yield f"{where}: signal_delay_s: {site.signal_delay_s} is not below the time limit, {site.time_limit_min} min"


def _wrong_store(url: str) -> Iterator[str]:
    try:
        if Store(url).url.startswith("memory://"):
            yield f"store: {url} is the memory of one process, where no rank finds it; valid is s3://bucket/folder"
    except UserError as error:
        yield f"store: {error}"


def _too_large(config: Config, site: Site, held: Held) -> Iterator[str]:
    """What a node of the site cannot hold as it starts, or a GPU later, and what would make it fit."""
    start = site.ranks_per_node * held.weights
    if site.memory_gb is not None and start > site.memory_gb * 2**30:
        yield (
            f"SITE={site.name}: memory_gb: {site.memory_gb:g} is too little for {site.ranks_per_node} ranks that draw "
            f"{bytes_text(held.weights)} of weights each as they start; fewer ranks_per_node, or a smaller trunk"
        )
    if site.gpu_memory_gb is None or held.device <= (room := site.gpu_memory_gb * 2**30):
        return
    trunk, images = config.model.trunk, config.data.batch // site.ranks
    if held.model > room:
        what, less = f"{trunk} takes {bytes_text(held.model)} before any image", "more ranks, or a smaller trunk"
    else:
        what, less = f"a step of {images} images with {trunk} takes {bytes_text(held.device)}", "more ranks"
    savings = _savings(config, site.ranks, parting=held.model > room)
    fitting = next((saving for saving in savings if saving[1] <= room), None)
    hint = f"{less}, have less each" if fitting is None else f'SET="{fitting[0]}" takes {bytes_text(fitting[1])}'
    yield f"model.trunk: {what} of each GPU, SITE={site.name}: gpu_memory_gb is {site.gpu_memory_gb:g}; {hint}"


def _savings(config: Config, ranks: int, parting: bool) -> Iterator[tuple[str, int]]:
    """Ways to learn the same in less memory, and how much that takes then; each costs time, the later ones more.

    parting: only those that part the model among the ranks; others leave it as large as it is.
    """
    for switches in (*((switch,) for switch in SAVING), SAVING):
        if parting and "sharded" not in switches:
            continue
        if not any(getattr(config.efficiency, switch) for switch in switches):
            saving = config.efficiency.model_copy(update=dict.fromkeys(switches, True))
            held = held_bytes(config.model_copy(update={"efficiency": saving}), ranks)
            yield " ".join(f"efficiency.{switch}=true" for switch in switches), held.device


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
    node = node_bytes(config, site.ranks_per_node, order.lanes / site.ranks, order, sample_bytes)
    if site.memory_gb is not None and node > site.memory_gb * 2**30:
        yield (
            f"SITE={site.name}: memory_gb: {site.memory_gb:g} is too little for {site.ranks_per_node} ranks that hold "
            f"{bytes_text(node)} of samples; fewer data.window_chunks, a smaller reader.prefetch_bytes, or more nodes"
        )


def node_bytes(config: Config, ranks: int, lanes: float, order: Order, sample_bytes: float) -> float:
    """Bytes of samples that a node's ranks hold, with so many lanes each."""
    windows = 2 * lanes * order.window_samples * sample_bytes
    return float(ranks * min(windows, config.reader.prefetch_bytes))
