"""W&B's real client, without a network and with a server that can be away: what it gets of a run, and when."""

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
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline import wandb_client
from pipeline.monitor import MonitorSettings
from pipeline.run import Run
from pipeline.wandb_rows import WandbRun
from tests.pipeline import wandb_file
from tests.pipeline.monitored import K, events, feed, fresh_store, local_lines, open_monitor, result, run_part
from tests.pipeline.wandb_server import WandbServer, serve
from tests.waiting import until

SECRET = "planted-0123456789abcdef0123456789abcdef"

pytestmark = pytest.mark.usefixtures("no_wandb_key")


@pytest.fixture
def store() -> Store:
    return fresh_store()


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
            f"from tests.pipeline.test_wandb_rows import feed_for_ever; feed_for_ever({str(tmp_path)!r})",
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

        offline = True

        def log(self, row: dict[str, Any]) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            raise TimeoutError("Timed out finishing run.")

    monkeypatch.setattr("pipeline.wandb_rows.open_client", lambda *_, **__: Slow())
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="offline")
    feed(monitor, range(1, 4))
    monitor.close(60.0)
    (failed,) = local_lines(run, "events")
    assert failed["reason"] == "Timed out finishing run.; its rows go out with the next start, or by make sync"
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


# ---- online


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


def start(store: Store, folder: Path, attempt: int, steps: range, outcome: str = "preempted") -> Run:
    """One start of a run, from its first row to its end."""
    run = Run(store, folder, attempt)
    monitor = open_monitor(run, wandb="auto")
    feed(monitor, steps)
    monitor.close(60.0, outcome)
    return run


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_rows_of_an_outage_that_lasted_to_the_end_of_a_start_go_out_with_the_next_one(
    store: Store, server: WandbServer, tmp_path: Path
) -> None:
    assert events(start(store, tmp_path, 1, range(1, 6))) == []
    second = Run(store, tmp_path, 2)
    monitor = open_monitor(second, wandb="auto")
    until(lambda: server.opened == 2)
    server.away = True
    feed(monitor, range(6, 11))
    monitor.close(60.0, "preempted")
    assert events(second) == ["W&B failed"]
    assert server.runs["run-id"].steps == [1, 2, 3, 4, 5]
    server.away = False
    assert events(start(store, tmp_path, 3, range(10, 13))) == []  # resumed from step 9
    assert server.runs["run-id"].steps == [*range(1, 13)]


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_rows_of_starts_offline_go_out_with_one_online_and_count_as_sent_then(
    store: Store, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(store, tmp_path, 1, range(1, 4))
    with monkeypatch.context() as without:
        without.delenv("WANDB_API_KEY")
        start(store, tmp_path, 2, range(4, 7))
    assert server.runs["run-id"].steps == [1, 2, 3]
    start(store, tmp_path, 3, range(7, 9), "finished")
    assert server.runs["run-id"].steps == [*range(1, 9)]
    (path,) = (path for path in files(tmp_path) if "offline-run" in path.parts[-2])
    assert path.with_name(f"{path.name}.synced").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_what_the_last_start_could_not_send_is_sent_later_once(
    store: Store, server: WandbServer, tmp_path: Path
) -> None:
    run = Run(store, tmp_path, 1)
    monitor = open_monitor(run, wandb="auto")
    until(lambda: server.opened)
    server.away = True
    feed(monitor, range(1, 6))
    monitor.close(60.0, "finished")
    of_run = WandbRun(tmp_path, store.url, "run-id", MonitorSettings(), {})
    server.away = False
    assert [of_run.catch_up("finished"), of_run.catch_up("finished")] == [5, 0]
    assert server.runs["run-id"].steps == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_a_server_that_is_away_still_is_an_error_when_rows_are_sent_later(
    store: Store, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_client, "INIT_S", 3.0)
    Run(store, tmp_path, 1).metrics.append({"result": result(1), "run": run_part(1)})
    server.away = True
    with pytest.raises(UserError, match="W&B: "):
        WandbRun(tmp_path, store.url, "run-id", MonitorSettings(), {}).catch_up(None)
