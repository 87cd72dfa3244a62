"""What a run would do, in lines to read before anything is spent."""

from collections.abc import Iterator

import yaml

from data_shards.index import Manifest
from data_shards.order import Order
from data_shards.store import Store
from jobs.site import Site
from jobs.submit import CHECK_SECONDS
from pipeline.config import Config
from pipeline.run import open_data


def describe(config: Config, site: Site) -> Iterator[str]:
    """The resolved config, then its arithmetic. Raises UserError when the shards are not there or do not fit."""
    Store(config.data.url).check()  # gives up sooner than a read would
    shards, order, config = open_data(config, CHECK_SECONDS)
    manifest = shards.manifest
    steps = config.train.length(order)
    batch = config.data.batch
    images = steps * batch
    yield yaml.safe_dump(config.dump(), sort_keys=False).rstrip()
    yield ""
    yield f"fingerprint    {config.fingerprint()}"
    yield f"data           {config.data.url}: {manifest.samples:,} samples of {manifest.mean_bytes / 1e3:,.0f} kB"
    yield f"length         {steps:,} steps = {images / manifest.samples:,.2f} epochs = {images:,} images"
    yield f"batch          {batch} = {order.lanes} lanes x {order.lane_batch}"
    yield f"learning rate  {config.optim.lr:g} per 256 images, {config.optim.lr * batch / 256:g} at most"
    yield f"reads          {images * manifest.mean_bytes / 1e12:,.3f} TB"
    yield f"ranks          {site.nodes} nodes x {site.ranks_per_node} on SITE={site.name}"
    for ranks in (ranks for ranks in range(1, order.lanes + 1) if order.lanes % ranks == 0):
        yield (
            f"  {ranks:5d} ranks: {_window_bytes(order, manifest, ranks) / 2**20:,.0f} MiB of samples held by each"
            + ("  <- this site" if ranks == site.ranks else "")
        )
    order.lanes_of(0, site.ranks)


def _window_bytes(order: Order, manifest: Manifest, ranks: int) -> float:
    """Two windows a lane, the one in use and the next."""
    return float(2 * order.lanes / ranks * order.window_samples * manifest.mean_bytes)
