"""The runs of a dashboard, each read where that is quickest: on the shared disk, or in its folder in the store."""

import math
from collections.abc import Sequence
from pathlib import Path

from data_shards.errors import UserError
from data_shards.store import Store
from jobs.elsewhere import PATIENCE_S, elsewhere, status_in, stores_of
from jobs.logs import sentence
from jobs.runs import Job, Status, history, statuses
from jobs.site import Site
from jobs.start import attempt_files, newest_attempt
from pipeline.config import load
from pipeline.evaluate.score import Score, read_scores
from pipeline.journal import read_events
from pipeline.report.dashboard import MOST_RUNS, Brief, brief
from pipeline.report.data import ReportData
from pipeline.report.rows import RowReader, in_order
from pipeline.run import read_config


def briefs(
    site: Site, names: Sequence[str], stores: Sequence[str], readers: dict[str, RowReader]
) -> tuple[list[Brief], list[str]]:
    """Those runs, and a line for each thing that could not be read.

    names: of the site's runs, or urls of runs' folders. Without any, the runs of the site and of `stores` (folders of
    runs, by default those in which the site's lie) that were last heard of. readers: by the runs' folders in the store,
    those of an earlier call, which have its rows; new ones are added. Raises UserError for a name without a run.
    """
    own = [one for one in statuses(site, names) if one.store]
    folders = {one.store: site.run_dir(one.run) for one in own}
    complaints = list[str]()
    if names:
        chosen = [_named(site, own, name) for name in names]
    else:
        others, complaints = elsewhere(own, stores or stores_of(own))
        chosen = sorted([*own, *others], key=_silent_s)[:MOST_RUNS]
    found = list[Brief]()
    for one in chosen:
        try:
            data = _data(one, folders.get(one.store), readers.setdefault(one.store, RowReader()), complaints)
            found.append(brief(data, one.state, one.look, one.goodput, [sentence(event) for event in data.events]))
        except UserError as error:
            complaints.append(f"{one.run} is not shown: {error}")
    return found, complaints


def _named(site: Site, own: Sequence[Status], name: str) -> Status:
    if "://" in name:
        if (found := status_in(Store(name))) is None:
            raise UserError(f"RUN={name}: no run's folder; make status STORE={name.rstrip('/').rpartition('/')[0]}")
        return found
    job = Job.of(site, name)
    return next(one for one in own if one.run == job.run)


def _silent_s(one: Status) -> float:
    if one.seconds_ago is not None:
        return one.seconds_ago
    return 0.0 if one.state in ("waiting", "running") else math.inf


def _data(one: Status, folder: Path | None, reader: RowReader, complaints: list[str]) -> ReportData:
    store = Store(one.store, retry_seconds=PATIENCE_S)
    if folder is None or not _whole(folder):
        config, rows, events = read_config(store), in_order(reader.in_store(store)), read_events(store)
        return ReportData(one.run, config.dump(), rows, events, scores=read_scores(store))
    rows = in_order(reader.on_disk(attempt_files(folder, "metrics.jsonl")))
    scores = list[Score]()
    try:
        scores = read_scores(store)
    except UserError as error:
        complaints.append(f"evaluations of {one.run} are not shown: {error}")
    return ReportData(one.run, load(folder / "config.yaml").dump(), rows, history(folder), scores=scores)


def _whole(folder: Path) -> bool:
    """Whether all attempts of a run were made at this site, so that its rows are all here."""
    return len(attempt_files(folder, "events.jsonl")) == newest_attempt(folder)
