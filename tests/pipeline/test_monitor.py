"""What a run tells: rows in its folder and in W&B, alarms; and that none of it can stop or hold up a training."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from data_shards.store import Store
from jobs.rank import LEAVE_S
from pipeline.journal import read_events, read_metrics
from pipeline.monitor import CLOSE_S, LAST_S, close_s
from pipeline.run import Run
from tests.pipeline.monitored import K, events, feed, fresh_store, local_lines, open_monitor, result, run_part
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("no_wandb_key")


@pytest.fixture
def store() -> Store:
    return fresh_store()


# ---- rows


def test_rows_are_written_with_their_attempt_and_null_for_what_is_not_finite(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, 3)
    monitor = open_monitor(run)
    feed(monitor, range(1, 12))
    rows = local_lines(run, "metrics")
    assert [row["result"]["step"] for row in rows] == list(range(1, 12))
    assert {row["run"]["attempt"] for row in rows} == {3}
    assert (rows[6]["result"]["loss"], rows[6]["result"]["grad_norm"]) == (None, None)
    assert (rows[9]["result"]["prototypes_used"], rows[9]["result"]["code_entropy"]) == (0.25, None)
    assert rows[0]["result"]["lr"] == 0.1 + 0.2
    monitor.close()
    assert read_metrics(store) == rows


def test_rows_and_events_reach_the_store_without_a_checkpoint(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, upload_seconds=0.05)
    monitor.row(result(1), run_part(1))
    run.event("saved", step=1)
    until(lambda: read_metrics(store) and read_events(store))
    monitor.close()


def test_a_store_that_refuses_rows_is_told_once_and_gets_them_when_it_takes_them_again(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri())
    in_the_way = tmp_path / "store" / "metrics"
    in_the_way.parent.mkdir()
    in_the_way.touch()  # a file where a folder is needed
    run = Run(store, tmp_path / "disk", 1)
    monitor = open_monitor(run, upload_seconds=0.02)
    feed(monitor, range(1, 5))
    until(lambda: events(run))
    feed(monitor, range(5, 9))
    tried = store.counters.requests
    until(lambda: store.counters.requests > tried + 10)  # several more uploads fail
    assert events(run) == ["upload failed"]
    in_the_way.unlink()
    monitor.close()
    monitor.close()
    assert [row["result"]["step"] for row in read_metrics(store)] == list(range(1, 9))


@pytest.mark.slow
def test_a_store_that_does_not_answer_holds_up_neither_a_row_nor_the_end(silent_store: Store, tmp_path: Path) -> None:
    run = Run(silent_store, tmp_path, 1)
    monitor = open_monitor(run, upload_seconds=0.01)
    monitor.row(result(1), run_part(1))
    until(lambda: silent_store.counters.requests)
    started = time.monotonic()
    monitor.row(result(2), run_part(2))
    monitor.close(1.0)
    monitor.close(1.0)
    assert time.monotonic() - started < 10
    assert len(local_lines(run, "metrics")) == 2


def test_a_superseded_attempt_may_go_on_telling_but_the_store_takes_nothing_of_it(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, 1)
    store.put("attempts/0002.json", b"{}")
    monitor = open_monitor(run)
    feed(monitor, range(1, 3))
    monitor.close()
    assert [entry.path for entry in store.list()] == ["attempts/0002.json"]
    assert events(run) == ["upload failed"]


def test_the_end_of_the_monitor_leaves_time_for_the_requeue_of_a_preempted_job() -> None:
    assert CLOSE_S < LEAVE_S
    assert close_s(False, 100.0) == close_s(True, 5.0) == CLOSE_S


def test_a_run_that_has_finished_waits_longer_for_wandb_which_no_later_start_would_feed() -> None:
    assert close_s(True, 45.0) == 45.0
    assert close_s(True, 1000.0) == LAST_S


# ---- the alarm


def alarms(tmp_path: Path, losses: list[float | None], **settings: Any) -> list[int]:
    """The steps at which an alarm was raised."""
    store = fresh_store()
    run = Run(store, tmp_path / store.url.rpartition("-")[2], 1)
    monitor = open_monitor(run, **{"collapse_window": 4, **settings})
    for step, loss in enumerate(losses, start=1):
        monitor.row(result(step) | {"loss": loss}, run_part(step))
    monitor.close()
    told = [event for event in local_lines(run, "events") if event["event"] == "alarm"]
    assert all("collapse" in event["reason"] and "\n" not in event["reason"] for event in told)
    return [event["step"] for event in told]


def test_a_mean_loss_at_ln_k_raises_the_alarm_once_until_it_recovers(tmp_path: Path) -> None:
    at = math.log(K)
    assert alarms(tmp_path, [at] * 10) == [4]
    assert alarms(tmp_path, [at * 1.1, at * 0.9] * 5) == [4]  # the mean counts
    assert alarms(tmp_path, [at * 0.994] * 10) == []
    assert alarms(tmp_path, [at * 0.996] * 10) == [4]
    assert alarms(tmp_path, [at * 0.996] * 10, collapse_band=0.001) == []
    assert alarms(tmp_path, [at] * 6 + [4.0] * 4 + [at] * 6) == [4, 14]


def test_a_loss_above_ln_k_raises_the_alarm_too(tmp_path: Path) -> None:
    assert alarms(tmp_path, [math.log(K) * 1.006] * 10) == [4]
    assert alarms(tmp_path, [math.log(K) * 2] * 10) == [4]


def test_losses_that_are_not_finite_raise_the_alarm_and_one_of_them_among_good_ones_does_not(tmp_path: Path) -> None:
    assert alarms(tmp_path, [None, math.nan] * 5) == [4]
    assert alarms(tmp_path, [4.0, 4.0, None, 4.0, 4.0] * 5) == []


def test_no_alarm_counts_a_loss_of_the_quiet_period(tmp_path: Path) -> None:
    at = math.log(K)
    assert alarms(tmp_path, [at] * 9, quiet_until=6) == []
    assert alarms(tmp_path, [at] * 10, quiet_until=6) == [10]
