import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.store import Store
from jobs.cli import main
from jobs.elsewhere import elsewhere, stores_of
from jobs.runs import Job, statuses
from jobs.site import Site


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"file://{tmp_path}/runs")
    yield store
    store.close()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """It knows one run of the store, `own`."""
    site = Site(shared_dir=str(tmp_path / "shared"), executor="local")
    Job("own", site.run_dir("own"), f"file://{tmp_path}/runs/own", "1").save()
    return site


def stored(store: Store, run: str, *events: dict[str, Any], steps: range = range(0)) -> None:
    """A run as another site left it in the store."""
    lines = [{"time": time.time() - 100 + n, "attempt": 1, **event} for n, event in enumerate(events)]
    store.put(f"{run}/events/a01-000001.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    for number, step in enumerate(steps, start=1):
        spent = {"time": time.time() - 30, "step_s": 2.0, "wait_s": 0.5, "images_s": 32.0, "attempt": 1}
        row = {"result": {"step": step, "loss": 5.0}, "run": spent}
        store.put(f"{run}/metrics/a01-{number:06d}.jsonl", json.dumps(row).encode() + b"\n")


STARTED = {"event": "started", "step": 0, "steps": 200, "job": "77"}


def test_a_run_that_only_the_store_knows_is_shown_with_what_it_last_told(site: Site, store: Store) -> None:
    stored(store, "theirs", STARTED, {"event": "committed", "step": 40}, steps=range(40, 51))
    stored(store, "own", STARTED)
    store.put("stray/file", b"no run")
    assert stores_of(statuses(site)) == [store.url]
    (found,), complaints = elsewhere(statuses(site), [store.url])
    assert (found.run, found.state, found.nodes, found.job) == ("theirs", "elsewhere", "elsewhere", "77")
    assert (found.step, found.steps, found.loss, found.committed, found.at_risk) == (50, 200, 5.0, 40, 10)
    assert (said := re.match(r"last heard of (\d+) s ago", found.look))
    assert 30 <= int(said[1]) < 60
    assert complaints == []


@pytest.mark.parametrize(
    ("last", "state", "look"),
    [
        ({"event": "finished", "step": 200}, "finished", ""),
        ({"event": "cancelled", "step": 20}, "cancelled", ""),
        ({"event": "failed", "reason": "rank 0 on node1: no such bucket"}, "failed", "rank 0 on node1: no such bucket"),
        ({"event": "requeued", "reason": "preempted"}, "elsewhere", "it has not told of a step"),
        ({"event": "save failed", "step": 9, "reason": "disk"}, "elsewhere", "save failed: disk; it has not told"),
    ],
)
def test_its_last_event_says_how_it_is(site: Site, store: Store, last: dict[str, Any], state: str, look: str) -> None:
    stored(store, "theirs", STARTED, last)
    (found,), _ = elsewhere(statuses(site), [store.url])
    assert (found.state, found.look[: len(look) or None]) == (state, look)


def test_a_store_that_does_not_tell_is_a_line_and_the_others_are_shown(site: Site, store: Store) -> None:
    stored(store, "theirs", STARTED)
    found, (complaint,) = elsewhere(statuses(site), ["s3:///nothing", store.url])
    assert [one.run for one in found] == ["theirs"]
    assert "runs of other sites are not shown: s3:///nothing: not the url of a store" in complaint


def test_status_of_a_site_without_runs_shows_those_of_a_store(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(store, "theirs", STARTED, steps=range(7, 8))
    conf = tmp_path / "here.yaml"
    conf.write_text(f"shared_dir: {tmp_path}/empty\nexecutor: local\n")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    assert main(["status", "--site", str(conf)]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert main(["status", "--site", str(conf), "--store", store.url]) == 0
    assert "theirs  elsewhere  7/200" in capsys.readouterr().out
