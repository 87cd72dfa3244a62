"""What a run tells: rows in its folder and in W&B, alarms; and that none of it can stop or hold up a training."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest

from data_shards.store import Store
from jobs.rank import LEAVE_S
from pipeline import wandb_client
from pipeline.journal import read_events, read_metrics
from pipeline.monitor import CLOSE_S, LAST_S, Monitor, MonitorSettings, close_s
from pipeline.run import Run
from tests.pipeline import wandb_file
from tests.waiting import until

NUMBERS = count()
K = 300
SECRET = "planted-0123456789abcdef0123456789abcdef"


pytestmark = pytest.mark.usefixtures("no_wandb_key")


@pytest.fixture
def store() -> Store:
    return Store(f"memory://monitor-{os.getpid()}-{next(NUMBERS)}")


def open_monitor(run: Run, wandb_id: str = "run-id", quiet_until: int = 0, **settings: Any) -> Monitor:
    chosen = MonitorSettings.model_validate({"wandb": "disabled", **settings})
    return Monitor(run, chosen, {"optim": {"lr": 0.3}}, wandb_id, K, quiet_until)


def result(step: int, loss: float | None = None) -> dict[str, Any]:
    """Like a training's: usage on each tenth step only, and a loss that is not finite at step 7."""
    measured = step % 10 == 0
    return {
        "step": step,
        "loss": loss if loss is not None else (None if step == 7 else 5.5 / step),
        "lr": 0.1 + 0.2,
        "grad_norm": math.inf if step == 7 else 1 / 3,
        "prototypes_used": 0.25 if measured else None,
        "code_entropy": (math.nan if step == 10 else 0.75) if measured else None,
        "batch_hash": f"{step:016x}",
    }


def run_part(step: int) -> dict[str, Any]:
    return {"time": time.time(), "step_s": 0.1 / 3, "bytes_read": 2**40 + step}


def feed(monitor: Monitor, steps: range) -> None:
    for step in steps:
        monitor.row(result(step), run_part(step))


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def local_lines(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.local / f"{name}.jsonl"
    text = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=refuse_constant) for line in text]


def events(run: Run) -> list[str]:
    return [event["event"] for event in local_lines(run, "events")]


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
    run = Run(Store(f"memory://alarm-{os.getpid()}-{next(NUMBERS)}"), tmp_path / f"{next(NUMBERS)}", 1)
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


# ---- W&B: the real client, without a network


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[None]:
    """At the end nothing of W&B runs."""
    yield
    until(lambda: not services(), 20)


def services() -> list[int]:
    """W&B's processes that this one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" (", 1)
        except OSError:
            continue
        name, fields = rest.rsplit(") ", 1)
        if name.startswith("wandb-core") and int(fields.split()[1]) == os.getpid() and fields.split()[0] != "Z":
            found.append(int(pid))
    return found


def files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("wandb/*run-*/run-*.wandb"))


def as_sent(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl as W&B is to have it: flat, without what is null."""
    flat = {f"{part}/{key}": value for part in ("result", "run") for key, value in row[part].items()}
    step = {"step": flat.pop("result/step")}
    return step | {key: value for key, value in flat.items() if value is not None}


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_wandb_has_the_rows_of_metrics_jsonl_over_two_attempts_under_one_id_and_no_secret(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "SOME_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    first, second = Run(store, tmp_path, 1), Run(store, tmp_path, 2)
    started = time.monotonic()
    monitor = open_monitor(first, wandb="auto")
    opened = time.monotonic()
    feed(monitor, range(1, 61))
    monitor.close(60.0)
    assert opened - started < 0.5  # the training does not wait for W&B
    assert not services()
    again = open_monitor(second, wandb="auto")
    feed(again, range(41, 81))  # resumed from step 40
    again.close(60.0)
    again.close(60.0)
    one, two = files(tmp_path)
    assert [wandb_file.run_id(path) for path in (one, two)] == ["run-id", "run-id"]
    assert wandb_file.rows(one) == [as_sent(row) for row in local_lines(first, "metrics")]
    assert wandb_file.rows(two) == [as_sent(row) for row in local_lines(second, "metrics")[20:]]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "debug-internal.log" for path in written)
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert events(first) == events(second) == []


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("outcome", "preempted", "code"),
    [
        ("finished", False, 0),
        ("cancelled", False, 0),
        ("preempted", True, 1),
        ("terminated", True, 1),
        (None, False, 1),
    ],
)
def test_wandb_shows_how_a_start_has_ended(
    outcome: str | None, preempted: bool, code: int, store: Store, tmp_path: Path
) -> None:
    monitor = open_monitor(Run(store, tmp_path, 1), wandb="auto")
    feed(monitor, range(1, 4))
    monitor.close(60.0, outcome)
    monitor.close()  # as when an error comes behind it: the first word counts
    (path,) = files(tmp_path)
    assert wandb_file.end(path) == (preempted, [code])
    assert len(wandb_file.rows(path)) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_wandb_is_asked_to_tell_of_a_collapse_once_and_gets_the_rows_around_it(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="auto", collapse_window=2)
    for step in range(1, 7):
        monitor.row(result(step) | {"loss": math.log(K)}, run_part(step))
    monitor.close(60.0, "finished")
    (path,) = files(tmp_path)
    (alarm,) = [event for event in local_lines(run, "events") if event["event"] == "alarm"]
    assert wandb_file.alerts(path) == [alarm["reason"]]
    assert [row["step"] for row in wandb_file.rows(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_wandb_has_the_load_of_the_machine_too(store: Store, tmp_path: Path) -> None:
    monitor = open_monitor(Run(store, tmp_path, 1), wandb="auto")
    feed(monitor, range(1, 4))
    until(lambda: any({"cpu", "memory_percent"} <= wandb_file.load(path).keys() for path in files(tmp_path)))  # in 15 s
    monitor.close(60.0)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_rows_that_wandb_lost_with_a_killed_start_or_never_saw_are_sent_by_the_next_one(
    store: Store, tmp_path: Path
) -> None:
    unseen = Run(store, tmp_path, 1)
    without = open_monitor(unseen)
    feed(without, range(1, 11))
    without.close()
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from tests.pipeline.test_monitor import feed_for_ever; feed_for_ever({str(tmp_path)!r})",
        ]
    )
    killed = Run(store, tmp_path, 2)
    try:
        until(lambda: any(wandb_file.rows(path) for path in files(tmp_path)))
        until(lambda: (tmp_path / "wandb" / "sent.json").exists())
    finally:
        child.kill()
        child.wait()
    local = local_lines(killed, "metrics")
    last = local[-1]["result"]["step"]
    third = Run(store, tmp_path, 3)
    monitor = open_monitor(third, wandb="offline")
    feed(monitor, range(last - 3, last + 5))
    monitor.close(60.0)
    sent = {row["step"]: row for path in files(tmp_path) for row in wandb_file.rows(path)}
    counts = [line for run in (unseen, killed, third) for line in local_lines(run, "metrics")]  # the later attempt's
    assert sent == {line["result"]["step"]: as_sent(line) for line in counts}
    assert list(sent) == list(range(1, last + 5))


def feed_for_ever(folder: str) -> None:
    """What a rank does until it is killed."""
    run = Run(Store(f"memory://killed-{os.getpid()}"), Path(folder), 2)
    monitor = open_monitor(run, wandb="offline")
    for step in count(8):  # resumed from step 7
        monitor.row(result(step), run_part(step))
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_a_wandb_process_that_dies_stops_nothing_and_the_next_start_sends_the_rest(
    store: Store, tmp_path: Path
) -> None:
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="offline")
    feed(monitor, range(1, 6))
    until(lambda: services() and files(tmp_path))
    for pid in services():
        os.kill(pid, signal.SIGKILL)
    for step in count(6):
        monitor.row(result(step), run_part(step))
        if events(run) or step > 3000:
            break
        time.sleep(0.02)
    feed(monitor, range(step + 1, step + 4))
    monitor.close(60.0)
    assert events(run) == ["W&B failed"]
    (failed,) = local_lines(run, "events")
    assert "\n" not in failed["reason"]
    next_run = Run(store, tmp_path, 2)
    again = open_monitor(next_run, wandb="offline")
    feed(again, range(step + 4, step + 6))
    again.close(60.0)
    assert {row["step"] for path in files(tmp_path) for row in wandb_file.rows(path)} == set(range(1, step + 6))


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_a_wandb_server_that_cannot_be_reached_leaves_an_offline_run_and_the_key_is_not_in_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_client, "INIT_S", 3.0)
    key = SECRET[-32:] + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="auto")
    feed(monitor, range(1, 6))
    monitor.close(60.0)
    assert events(run) == ["W&B offline"]
    (path,) = (path for path in files(tmp_path) if "offline-run" in path.parts[-2])
    assert [row["step"] for row in wandb_file.rows(path)] == [1, 2, 3, 4, 5]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_what_wandb_has_not_taken_by_the_end_does_not_count_as_sent(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        """A client whose server takes rows and no end: W&B's own says so by that error where it is told to raise."""

        def log(self, row: dict[str, Any]) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            raise TimeoutError("Timed out finishing run.")

    monkeypatch.setattr("pipeline.monitor.open_client", lambda *_, **__: Slow())
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="offline")
    feed(monitor, range(1, 4))
    monitor.close(60.0)
    (failed,) = local_lines(run, "events")
    assert failed["reason"] == "Timed out finishing run.; its rows go out with the next start"
    assert not (tmp_path / "wandb" / "sent.json").exists()


@pytest.mark.slow
def test_wandb_is_told_to_say_when_it_could_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = wandb_client.open_client("offline", tmp_path, lambda why: None, id="run-id", project="x")
    try:
        assert client.settings.finish_timeout_raises
    finally:
        client.finish()
        wandb_client.end_service()


def test_a_disk_that_wandb_cannot_use_stops_nothing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "wandb").touch()  # a file where a folder is needed
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="offline")
    feed(monitor, range(1, 4))
    until(lambda: events(run) == ["W&B failed"])
    feed(monitor, range(4, 6))
    monitor.close(60.0)
    assert len(local_lines(run, "metrics")) == 5


@pytest.mark.parametrize("cut", ["", '{"id"', "[]", '{"id": "x"}'])
def test_a_note_of_what_wandb_has_that_was_cut_does_not_stop_wandb(store: Store, tmp_path: Path, cut: str) -> None:
    state = tmp_path / "wandb" / "sent.json"
    state.parent.mkdir()
    state.write_text(cut)
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="offline")
    feed(monitor, range(1, 3))
    monitor.close(60.0)
    assert [row["step"] for path in files(tmp_path) for row in wandb_file.rows(path)] == [1, 2]


def test_a_run_of_the_same_name_with_another_id_begins_anew(store: Store, tmp_path: Path) -> None:
    state = tmp_path / "wandb" / "sent.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"id": "another", "step": 70}))
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="offline")
    feed(monitor, range(1, 4))
    monitor.close(60.0)
    (path,) = files(tmp_path)
    assert [row["step"] for row in wandb_file.rows(path)] == [1, 2, 3]
