import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data_shards.errors import UserError
from jobs.chaos.campaign import DISK_FAULT, Row, campaign, down, draw, line, possible, table
from jobs.chaos.faults import FAULTS, _save_lost, kill_at_once, on_node
from jobs.chaos.proxy import CUT_BYTES, Proxy
from jobs.chaos.trial import Trial
from jobs.daemons import Process, wait_until

BODY = bytes(5 * CUT_BYTES)


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    yield proxy
    proxy.close()
    server.shutdown()
    server.server_close()


def test_what_dies_with_a_node_does_not_live_to_tell_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's daemon that saw its script die told SLURM that the job had ended."""
    told, script = tmp_path / "told", tmp_path / "script"
    daemon = subprocess.Popen(["sh", "-c", f"sleep 60 & echo $! > {script}; wait; echo it died > {told}"])
    assert wait_until(lambda: script.exists() and script.read_text().endswith("\n"), 10)
    victims = [Process.of(int(script.read_text())), Process.of(daemon.pid)]
    kill = os.kill

    def slowly(pid: int, number: int) -> None:
        kill(pid, number)
        wait_until(told.exists, 0.3)

    monkeypatch.setattr(os, "kill", slowly)
    kill_at_once([victim for victim in victims if victim])
    daemon.wait()
    assert not told.exists()
    assert not any(victim and victim.running() for victim in victims)


def ask(proxy: Proxy, timeout_s: float = 20.0) -> bytes:
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=timeout_s)
    connection.request("GET", "/")
    return connection.getresponse().read()


def test_a_node_is_told_from_others_and_from_those_of_the_same_name_in_other_clusters() -> None:
    def task(node: str, job: str) -> subprocess.Popen[bytes]:
        variables = {**os.environ, "SLURMD_NODENAME": node, "SLURM_JOB_ID": job}
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=variables)

    ours, theirs = f"{os.getpid()}1", f"{os.getpid()}2"
    tasks = [task("node1", ours), task("node2", ours), task("node2", theirs)]
    try:
        assert wait_until(lambda: len(on_node("node2", theirs)) == 1, 20)
        assert [process.pid for process in on_node("node2", ours)] == [tasks[1].pid]
    finally:
        for process in tasks:
            process.kill()
            process.wait()


@pytest.mark.parametrize("mode", ["pass", "slow"])
def test_what_passes_is_whole(proxy: Proxy, mode: Any) -> None:
    proxy.mode = mode
    assert ask(proxy) == BODY


@pytest.mark.parametrize("mode", ["refuse", "cut"])
def test_a_refused_or_cut_answer_is_an_error(proxy: Proxy, mode: Any) -> None:
    proxy.mode = mode
    with pytest.raises((ConnectionError, http.client.IncompleteRead, http.client.BadStatusLine)):
        ask(proxy)
    proxy.mode = "pass"
    assert ask(proxy) == BODY


def test_silence_lasts_until_the_mode_changes(proxy: Proxy) -> None:
    proxy.mode = "silent"
    with pytest.raises(TimeoutError):
        ask(proxy, timeout_s=0.3)
    proxy.mode = "pass"
    assert ask(proxy) == BODY


def trial(folder: Path, hit_at: float, *attempts: list[tuple[float, int]]) -> Trial:
    """A trial of which only the rows are there: (time, step) by attempt."""
    for number, rows in enumerate(attempts, start=1):
        path = folder / f"a{number:02d}" / "metrics.jsonl"
        path.parent.mkdir()
        lines = [{"result": {"step": step}, "run": {"time": when, "attempt": number}} for when, step in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = cast(Trial, SimpleNamespace(run_dir=folder, hit_at=hit_at))
    found._rows = lambda: Trial._rows(found)  # type: ignore[method-assign]
    return found


def test_recovery_ends_with_the_first_step_that_had_not_been_done(tmp_path: Path) -> None:
    killed = trial(tmp_path, 10.5, [(9.0, 1), (10.0, 2), (11.0, 3)], [(30.0, 2), (31.0, 3), (32.0, 4)])
    assert Trial.recovered_s(killed) == 21.5
    assert Trial.steps_redone(killed) == 2


def test_without_a_new_start_recovery_is_the_next_step(tmp_path: Path) -> None:
    held_up = trial(tmp_path, 10.5, [(9.0, 1), (10.0, 2), (14.0, 3), (15.0, 4)])
    assert Trial.recovered_s(held_up) == 3.5
    assert Trial.steps_redone(held_up) == 0


def test_draws_are_the_same_for_a_seed_and_take_all_faults_by_turns() -> None:
    names = list(FAULTS)
    first = draw(2 * len(names), 7, names)
    assert first == draw(2 * len(names), 7, names)
    assert first != draw(2 * len(names), 8, names)
    assert sorted(name for name, _ in first[: len(names)]) == sorted(names)


def test_a_table_has_a_line_a_fault_and_counts_what_was_not_equal() -> None:
    rows = [
        Row("a rank killed", "step 12", 1, 20.0, 2, True),
        Row("a rank killed", "step 30", 2, 31.0, 0, False, "step 40 differs in loss"),
        Row("time limit", "step 5", 3, None, 0, True),
    ]
    assert table(rows)[2:] == [
        "| a rank killed | 2 | 31 s (31 s) | 2 | 1 of 2 |",
        "| time limit | 1 | - | 0 | 1 of 1 |",
    ]
    assert line(rows[1]).endswith("NOT EQUAL: step 40 differs in loss")


def test_an_unknown_fault_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fault: found flood; there are: preempted by a higher partition; "):
        campaign(tmp_path, 1, 0, ["flood"], lambda _: None)


def test_faults_that_cannot_be_had_here_are_left_out_and_refused_when_no_other_was_asked_for() -> None:
    assert possible([], None) == [name for name in FAULTS if name != DISK_FAULT]
    assert possible([], Path("/disk")) == list(FAULTS)
    assert possible([DISK_FAULT], Path("/disk")) == [DISK_FAULT]
    with pytest.raises(UserError, match="fault: the local disk is full: no small disk can be mounted here; as root"):
        possible([DISK_FAULT], None)


@pytest.mark.parametrize(("event", "lost"), [("save failed", True), ("save refused", True), ("saved", False)])
def test_a_save_is_lost_whichever_rank_found_no_room(tmp_path: Path, event: str, lost: bool) -> None:
    (tmp_path / "a01").mkdir()
    (tmp_path / "a01" / "events.jsonl").write_text(json.dumps({"time": 1.0, "event": event}) + "\n")
    assert _save_lost(cast(Trial, SimpleNamespace(run_dir=tmp_path))) == lost


def test_what_a_campaign_has_not_begun_is_stopped_without_an_error(tmp_path):
    down(tmp_path / "chaos")
    assert list(tmp_path.iterdir()) == []
