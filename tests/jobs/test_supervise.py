import json
import os
import resource
import signal
from pathlib import Path

import pytest

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import slurm, supervise
from jobs.blame import START_LINE, excluded
from jobs.cli import main
from jobs.rank import OutOfTime
from jobs.start import Failure, Outcome, Start, append_lines, cancel_marker, events, note, this_host
from jobs.supervise import BY_THE_SHELL, Decision, after, before, committed_step, decide, publish, stalled_starts
from pipeline.journal import read_events

CRASH = Failure(1, "node2", 2.0, "RuntimeError: gloo", "Traceback ...", None)
MENDABLE = Failure(0, "node1", 1.0, "conf/x.yaml: data.lanes: 3", "", 2)
CODE = Failure(2, "node3", 3.0, "AttributeError: 'NoneType' ...", "Traceback ...", 1)
SUPERSEDED = Failure(0, "node1", 1.0, "attempt 4 owns the run now", "", 3)


@pytest.mark.parametrize(
    ("exit_code", "outcome", "failures", "cancelled", "stalled", "action"),
    [
        (0, Outcome("finished"), [], False, 0, "end"),
        (139, Outcome("finished"), [], False, 0, "end"),  # crashed on its way out, with everything saved
        (143, Outcome("preempted", requeued=True), [], False, 0, "end"),  # SLURM knows
        (0, Outcome("preempted"), [], False, 0, "requeue"),
        (0, Outcome("preempted"), [], False, 9, "requeue"),  # preemptions are no failures
        (1, Outcome("preempted"), [CRASH], False, 0, "requeue"),
        (0, Outcome("terminated"), [], False, 0, "requeue"),
        (0, Outcome("cancelled"), [], True, 0, "end"),
        (137, None, [], True, 0, "end"),  # a cancel was asked for, and it died
        (137, None, [], False, 0, "requeue"),
        (137, None, [], False, 2, "requeue"),
        (137, None, [], False, 3, "stop"),
        (143, None, [CRASH], False, 1, "requeue"),
        (143, None, [CRASH], False, 3, "stop"),
        (143, None, [MENDABLE, CRASH], False, 0, "stop"),
        (143, None, [CRASH, MENDABLE], False, 0, "stop"),
        (3, None, [SUPERSEDED], False, 0, "stop"),
        (1, None, [CODE, CRASH], False, 0, "stop"),
        (1, None, [CRASH, CODE], False, 0, "requeue"),  # on its way out of a start that was broken already
    ],
)
def test_each_end_of_a_start_means_one_thing(exit_code, outcome, failures, cancelled, stalled, action):
    assert decide(exit_code, outcome, failures, cancelled=cancelled, stalled=stalled).action == action


def test_the_reason_names_what_failed_first_or_how_the_ranks_ended():
    assert decide(143, None, [CRASH]).reason == "rank 1 on node2: RuntimeError: gloo"
    assert decide(143, None, [CRASH, MENDABLE]).reason == "rank 0 on node1: conf/x.yaml: data.lanes: 3"
    assert decide(137, None, []).reason == "the ranks left without a word (ended by signal 9)"
    assert decide(1, None, []).reason == "the ranks left without a word (exit code 1)"
    assert decide(128, None, []).reason == "the ranks left without a word (exit code 128)"
    assert decide(129, None, []).reason == "the ranks left without a word (ended by signal 1)"
    assert decide(137, None, [], suspects={"node2": "it left first"}).reason == "it left first"
    assert decide(137, None, [CODE], suspects={"node2": "it left first"}) == Decision("requeue", "it left first")
    memory = "srun: node2: task 1: Out Of Memory"
    assert decide(1, None, [CRASH], memory=memory).reason == memory
    assert decide(1, None, [CODE], memory=memory) == Decision("requeue", memory)
    assert decide(1, None, [CRASH], stalled=3).reason.startswith(
        "3 starts without a new checkpoint (collective); the last one: rank 1"
    )


def said(*steps: int | None) -> list[dict[str, object]]:
    """A submission with its step, then the starts that failed with theirs."""
    return [{"event": "submitted" if i == 0 else "requeued", "committed": step} for i, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("noted", "committed", "stalled"),
    [
        (said(None), None, 1),
        (said(None, None), None, 2),
        (said(None, None, None), None, 3),
        (said(None), 100, 0),
        (said(None), 0, 0),
        (said(None), 1, 0),
        (said(None, 100), 100, 1),
        (said(None, None, None), 100, 0),  # progress at last
        (said(300, 300), 200, 2),  # the newest was damaged: no progress either
        (said(None, None, None) + said(None), None, 1),  # submitted again by hand: counted from there
        ([*said(0), {"event": "requeued", "reason": "preempted"}], 0, 1),
        ([], None, 0),
    ],
)
def test_starts_count_as_stalled_until_a_newer_checkpoint_is_committed(noted, committed, stalled):
    assert stalled_starts(noted, committed) == stalled


def test_only_a_checkpoint_with_its_manifest_counts_as_committed(tmp_path):
    store = Store(f"file://{tmp_path}/run")
    assert committed_step(store) is None
    for path in (
        "checkpoints/step-000000040-a1/MANIFEST.json",
        "checkpoints/step-000000100-a2/MANIFEST.json",
        "checkpoints/step-000000120-a2/rank-0.json",
        "checkpoints/step-000000999-a2/old/MANIFEST.json",
    ):
        store.put(path, b"{}")
    assert committed_step(store) == 100


def test_progress_below_a_damaged_checkpoint_is_progress(tmp_path):
    """A later attempt has passed over it, and goes on from an older one."""
    store = Store(f"file://{tmp_path}/run")
    for path in ("step-000000400-a1", "step-000000100-a2", "step-000000200-a2"):
        store.put(f"checkpoints/{path}/MANIFEST.json", b"{}")
    assert committed_step(store) == 200


@pytest.fixture
def start(tmp_path: Path) -> Start:
    (tmp_path / "shared" / "run" / "logs").mkdir(parents=True)
    note(tmp_path / "shared" / "run", "submitted", job="7", committed=None)
    return Start(tmp_path / "shared" / "run", "7", 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


def test_a_full_disk_changes_no_decision(start, tmp_path, capsys):
    store = Store(f"memory://{tmp_path.name}-{os.getpid()}")  # with room
    start.fail(1, RuntimeError("gloo"))
    noted = start.run_dir / "jobs.jsonl"
    before_it, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (noted.stat().st_size, most))  # no file may grow beyond that
    try:
        starts = [Start(start.run_dir, start.job, number) for number in range(3)]
        assert [after(one, 143, store, max_cycles=3).action for one in starts] == ["requeue", "requeue", "stop"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before_it, most))
    assert "not written, [Errno 27] File too large" in capsys.readouterr().err
    assert [event["event"] for event in read_events(store)][-3:] == ["requeued", "requeued", "failed"]


def test_a_requeue_that_slurm_refuses_is_told_where_one_looks(start, store, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("FARSEER_RUN_DIR", str(start.run_dir))
    monkeypatch.setenv("FARSEER_JOB", start.job)
    start.end("preempted")
    terminated = signal.getsignal(signal.SIGTERM)
    assert main(["supervise", "after", "--exit", "0", "--store", store.url]) == 2
    signal.signal(signal.SIGTERM, terminated)
    last = events(start.run_dir)[-1]
    assert (last["event"], "it is not started again: SLURM refused" in last["reason"]) == ("failed", True)


def test_where_this_python_has_no_slurm_the_shell_around_it_is_asked_to_requeue(start, store, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FARSEER_RUN_DIR", str(start.run_dir))
    monkeypatch.setenv("FARSEER_JOB", start.job)
    terminated = signal.getsignal(signal.SIGTERM)
    assert main(["supervise", "after", "--exit", "137", "--store", store.url]) == BY_THE_SHELL
    signal.signal(signal.SIGTERM, terminated)
    assert [event["event"] for event in events(start.run_dir)] == ["submitted", "requeued"]


def test_a_setup_that_fails_is_a_failed_start_which_may_be_made_again(start, store, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(slurm, "requeue_without", lambda *told: asked.append(told))
    monkeypatch.setenv("FARSEER_RUN_DIR", str(start.run_dir))
    monkeypatch.setenv("FARSEER_JOB", start.job)
    told = ["supervise", "after", "--exit", "127", "--setup", "module load cuda/99", "--store", store.url]
    assert main([*told, "--max-cycles", "2"]) == 0
    assert len(asked) == 1
    reason = f"rank 0 on {this_host()}: the site's setup: `module load cuda/99` failed (exit code 127)"
    assert reason in events(start.run_dir)[-1]["reason"]
    assert excluded(start.run_dir.parent, 12.0) == []  # a misspelt module is no node's fault
    assert main([*told, "--max-cycles", "2"]) == 2
    assert events(start.run_dir)[-1]["event"] == "failed"
    assert reason in capsys.readouterr().err


def test_no_list_of_bad_hosts_keeps_a_run_from_its_requeue(start, store, monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "requeue_without", lambda *told: asked.append(told))
    monkeypatch.setenv("FARSEER_RUN_DIR", str(start.run_dir))
    monkeypatch.setenv("FARSEER_JOB", start.job)
    (start.run_dir.parent / "hosts-another.jsonl").write_text("[" * 1_000_000)  # more than the parser has stack for
    assert main(["supervise", "after", "--exit", "137", "--store", store.url]) == 0
    assert asked == [("7", [], [], None)]


def test_nothing_of_an_older_job_of_the_same_number_passes_for_this_start(start):
    start.end("finished")
    before(start)
    assert start.outcome() is None


def test_a_crash_is_noted_with_its_cause_and_the_last_one_also_in_the_store(start, store):
    start.fail(1, RuntimeError("gloo"))
    assert after(start, 143, store, max_cycles=3).action == "requeue"
    last = events(start.run_dir)[-1]
    assert (last["event"], last["job"], last["start"], last["committed"]) == ("requeued", "7", 0, None)
    assert "RuntimeError: gloo" in last["reason"]
    assert store.list("events") == []  # the next start puts it there
    assert after(start, 143, store, max_cycles=1).action == "stop"
    assert [json.loads(line) for line in store.get("events/jobs-7.jsonl").splitlines()] == events(start.run_dir)


def test_what_one_site_knows_of_a_run_does_not_replace_what_another_has_published(start, store, tmp_path):
    publish(start.run_dir, start.job, store)
    (tmp_path / "elsewhere").mkdir()
    note(tmp_path / "elsewhere", "submitted", job="8")
    for _ in range(2):
        publish(tmp_path / "elsewhere", "8", store)
    assert [event["job"] for event in read_events(store)] == ["7", "8"]


def test_a_store_that_does_not_take_the_history_stops_nothing(start):
    publish(start.run_dir, start.job, Store("file:///proc/nowhere"))
    assert events(start.run_dir)[-1]["event"] == "upload failed"


def test_a_rank_without_memory_is_the_reason_and_not_what_the_others_say_of_it_and_no_host_is_to_blame(start, store):
    log = f"{START_LINE} 0 of job 7 on node1,node2\nsrun: error: node1: task 0: Exited with exit code 1\n"
    (start.run_dir / "logs" / "7_0_log.out").write_text(f"{log}srun: error: node2: task 1: Out Of Memory\n")
    start.fail(0, RuntimeError("[gloo] Connection closed by peer"))
    assert after(start, 1, store, max_cycles=3) == Decision("requeue", "srun: node2: task 1: Out Of Memory")
    assert "suspects" not in events(start.run_dir)[-1]


def test_a_preemption_before_the_ranks_listen_is_no_failure_and_no_hosts_fault_however_often_it_comes(start, store):
    log = start.run_dir / "logs" / "7_0_log.out"
    for number in range(4):
        with log.open("a") as file:
            file.write(f"{START_LINE} {number} of job 7 on node1,node2\n")
            file.write("srun: error: node1: task 0: User defined signal 2\nsrun: error: node2: task 1: Terminated\n")
        decision = after(Start(start.run_dir, "7", number), 140, store, max_cycles=3)
        assert decision == Decision("requeue", "preempted before the first step")
    assert {event["event"] for event in events(start.run_dir)} == {"submitted", "requeued"}
    assert excluded(start.run_dir.parent, 12.0) == []


def test_a_host_that_still_does_not_listen_when_the_time_is_over_is_suspect_and_the_start_counts(start, store):
    log = f"{START_LINE} 0 of job 7 on node1,node2\nsrun: error: node1: task 0: User defined signal 2\n"
    (start.run_dir / "logs" / "7_0_log.out").write_text(log)
    start.fail(1, OutOfTime("the time limit came 3500 s after the start"))
    assert "node1 left first" in after(start, 140, store, max_cycles=3).reason
    assert after(start, 140, store, max_cycles=1).action == "stop"


def test_a_host_whose_rank_twice_left_first_is_told_and_kept_out_of_the_next_starts(start, store):
    log = start.run_dir / "logs" / "7_0_log.out"
    for number in range(2):
        with log.open("a") as file:
            file.write(f"{START_LINE} {number} of job 7 on node1,node2\nsrun: error: node2: task 1: Killed\n")
        assert "node2 left first" in after(Start(start.run_dir, "7", number), 137, store, max_cycles=3).reason
        assert events(start.run_dir)[-1]["suspects"] == ["node2"]
    assert excluded(start.run_dir.parent, 12.0) == ["node2"]


def test_a_suspect_makes_an_error_of_the_code_worth_another_start(start, store):
    log = f"{START_LINE} 0 of job 7 on node1,node2\nsrun: error: node2: task 1: Killed\n"
    (start.run_dir / "logs" / "7_0_log.out").write_text(log)
    start.fail(0, AttributeError("None"))
    failure = start.failures()[0]
    assert failure.host != "node2"
    assert after(start, 137, store, max_cycles=3).action == "requeue"


def test_a_run_that_was_cancelled_and_died_meanwhile_is_over(start):
    cancel_marker(start.run_dir).touch()
    assert after(start, 137, Store("s3://nowhere", retry_seconds=0.1), max_cycles=3) == Decision("end", "cancelled")


def test_the_third_crash_without_a_new_checkpoint_stops_the_run_and_a_new_one_in_between_does_not(start, store):
    actions = [after(Start(start.run_dir, "7", number), 137, store, max_cycles=3).action for number in (0, 1)]
    store.put("checkpoints/step-000000100-a2/MANIFEST.json", b"{}")
    actions += [after(Start(start.run_dir, "7", number), 137, store, max_cycles=3).action for number in (2, 3, 4, 5)]
    assert actions == ["requeue", "requeue", "requeue", "requeue", "requeue", "stop"]
    assert events(start.run_dir)[-1]["event"] == "failed"


def test_a_store_that_is_away_is_no_progress_and_no_traceback(start, tmp_path):
    away = Store("s3://runs/x", retry_seconds=0.1)
    supervise_events = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        supervise_events = [after(start, 137, away, max_cycles=2).action for _ in range(2)]
        assert supervise_events == ["requeue", "stop"]
        for committed in (100, 200):
            start.note("requeued", committed=committed)
        start.note("requeued", reason="preempted")
        after(start, 137, away, max_cycles=9)
    assert events(start.run_dir)[-1]["committed"] == 200  # the last one known


def test_of_a_store_that_is_often_away_the_checkpoints_in_between_count_as_progress(start, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    away, actions = Store("s3://runs/x", retry_seconds=0.1), []
    for number in range(1, 5):
        (start.run_dir / f"a{number:02d}").mkdir(parents=True)
        told = [{"event": "committed", "step": 100 * number}, {"event": "upload failed", "reason": "away"}]
        append_lines(start.run_dir / f"a{number:02d}" / "events.jsonl", told)
        actions.append(after(Start(start.run_dir, "7", number), 137, away, max_cycles=2).action)
    assert actions == ["requeue"] * 4
    assert [event["committed"] for event in events(start.run_dir)] == [None, 100, 200, 300, 400]


def test_a_user_error_of_a_rank_stops_the_run_at_once(start, store):
    start.fail(0, UserError("s3://photos: no such bucket"))
    decision = after(start, 2, store, max_cycles=3)
    assert decision.action == "stop"
    assert decision.reason.endswith("s3://photos: no such bucket")


@pytest.mark.parametrize("outcome", ["finished", "cancelled", "preempted"])
def test_a_good_end_asks_nothing_of_the_store(start, outcome):
    start.end(outcome)
    nowhere = Store("s3://nowhere/at/all", retry_seconds=0.1)
    expected = Decision("requeue" if outcome == "preempted" else "end", outcome)
    assert after(start, 0, nowhere, max_cycles=3) == expected


def test_a_start_removes_the_results_that_an_earlier_start_pickled_and_nothing_else(start):
    logs = start.run_dir / "logs"
    for name in ("7_0_result.pkl", "7_1_result.pkl", "8_0_result.pkl", "7_submitted.pkl", "7_0_log.out"):
        (logs / name).touch()
    assert 1024 < before(start) < 32768
    assert sorted(path.name for path in logs.iterdir()) == ["7_0_log.out", "7_submitted.pkl", "8_0_result.pkl"]


def test_a_job_that_was_cancelled_while_it_waited_does_not_start(start):
    cancel_marker(start.run_dir).touch()
    with pytest.raises(UserError, match="cancel was asked for"):
        before(start)
    outcome = start.outcome()
    assert outcome is not None
    assert outcome.outcome == "cancelled"
    assert supervise.after(start, 2, Store("s3://nowhere"), max_cycles=3).action == "end"
