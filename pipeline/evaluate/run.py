"""Evaluating a run: its newest checkpoint's trunk, and the same one untrained, on labelled sets in the store."""

import json
from dataclasses import replace

import torch

from data_shards.index import ShardSet
from data_shards.store import Store
from pipeline.config import Config
from pipeline.evaluate.suite import evaluate
from pipeline.evaluate.table import Evaluation
from pipeline.evaluate.tiles import Tiles, read_tiles
from pipeline.evaluate.views import render_views
from pipeline.loader import device_of
from pipeline.regnet import RegNet
from pipeline.run import read_config
from pipeline.weights import trained_trunk


def evaluate_run(store: Store, bank: Tiles, held_out: Tiles) -> Evaluation:
    """Evaluate and keep the figures in the run's folder, `eval/step-<step>/report.json`.

    store: the run's folder. bank, held_out: by `open_tiles`.
    Raises UserError when the run is not there, it has no checkpoint yet, or an image does not decode.
    """
    config = read_config(store)
    trained, place = trained_trunk(store, config)
    views = render_views(bank, held_out, config.augment)
    device = device_of("auto")
    evaluation = evaluate(trained.to(device), untrained_trunk(config).to(device), bank, held_out, views)
    made_of = {"step": place.step, "bank_url": bank.url, "held_out_url": held_out.url}
    evaluation = replace(evaluation, facts=evaluation.facts | made_of)
    store.put(f"eval/step-{place.step:09d}/report.json", json.dumps(evaluation.to_json()).encode())
    return evaluation


def open_tiles(url: str) -> Tiles:
    """All images of a labelled set. Raises UserError when it is not there, or too large."""
    return read_tiles(ShardSet.open(Store(url)))


def untrained_trunk(config: Config) -> RegNet:
    """The trunk with the random weights of the run's seed, with which it began unless it is a fork."""
    torch.manual_seed(config.train.seed)
    return RegNet(config.model)
