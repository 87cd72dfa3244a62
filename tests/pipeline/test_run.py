"""A run's folder: who may go on with it, who owns it, and that no line of its journals is lost or doubled."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet
from data_shards.order import ORDER_VERSION
from data_shards.store import Store, StoreError
from jobs.daemons import wait_until
from pipeline.config import Config
from pipeline.journal import Journal, read_events, read_metrics
from pipeline.run import Run, Superseded, check_same, environment, open_data, read_config, read_record, record_of

NUMBERS = count()
MANIFEST = Manifest("layout-a", "contents", 100, (60, 40), (600, 400), {}, {})
SHARDS = ShardSet(Store("memory://set"), MANIFEST)


def config(**sections: dict[str, Any]) -> Config:
    data = {"url": "memory://set", "batch": 8, "lanes": 4, "chunk_samples": 4, "window_chunks": 2}
    return Config.model_validate({"data": data, "train": {"steps": 10}, **sections})


@pytest.fixture
def store() -> Store:
    return Store(f"memory://run-{os.getpid()}-{next(NUMBERS)}")


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    return Store((tmp_path / "store").as_uri())


def row(step: int, attempt: int, **result: Any) -> dict[str, Any]:
    return {"result": {"step": step, **result}, "run": {"attempt": attempt}}


def names(store: Store, folder: str) -> list[str]:
    return [entry.path for entry in store.list(folder)]


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


# ---- who may go on with it


def test_the_first_start_writes_what_a_later_one_and_an_evaluation_need(store: Store, tmp_path: Path) -> None:
    assert read_record(store) is None
    with pytest.raises(UserError, match="no such run"):
        read_config(store)
    check_same(store, config(), SHARDS)
    run = Run.start(store, tmp_path, config(), SHARDS)
    record = read_record(store)
    assert run.attempt == 1
    assert (record.fingerprint, record.layout_id, record.samples) == (config().fingerprint(), "layout-a", 100)
    assert record.order_version == ORDER_VERSION
    assert read_config(store) == config()
    assert Run.start(store, tmp_path, config(), SHARDS).attempt == 2
    assert read_record(store) == record
    assert names(store, "environment") == ["environment/a01.json", "environment/a02.json"]


def test_another_config_is_refused_in_one_line_that_names_each_difference(store: Store, tmp_path: Path) -> None:
    Run.start(store, tmp_path, config(), SHARDS)
    before = names(store, "")
    other = config(optim={"lr": 0.7}, swav={"prototypes": 30})
    with pytest.raises(UserError) as refused:
        Run.start(store, tmp_path, other, SHARDS)
    text = str(refused.value)
    assert text.startswith(store.url)
    assert "optim.lr: 0.3 -> 0.7; swav.prototypes: 3000 -> 30" in text
    assert "FORCE=1" in text
    assert "\n" not in text
    assert names(store, "") == before
    assert read_config(store) == config()


def test_what_does_not_affect_results_may_change_between_starts(store: Store, tmp_path: Path) -> None:
    Run.start(store, tmp_path, config(), SHARDS)
    other = config(checkpoint={"every_steps": 5}, monitor={"log_every": 3}, efficiency={"torch_threads": 2})
    Run.start(store, tmp_path, other, SHARDS)
    assert read_config(store) == other


def test_a_forced_start_goes_on_and_the_run_remains_the_one_that_it_was(store: Store, tmp_path: Path) -> None:
    Run.start(store, tmp_path, config(), SHARDS)
    forced = config(optim={"lr": 0.7}, checkpoint={"force": True})
    assert Run.start(store, tmp_path, forced, SHARDS).attempt == 2
    assert read_record(store).fingerprint == config().fingerprint()
    assert read_config(store) == forced
    with pytest.raises(UserError, match=r"optim\.lr: 0\.3 -> 0\.7"):
        check_same(store, config(optim={"lr": 0.7}), SHARDS)


@pytest.mark.parametrize(
    ("manifest", "found"),
    [
        (replace(MANIFEST, layout_id="layout-b"), "layout-a (100 samples), memory://set has layout-b (100)"),
        (replace(MANIFEST, samples=99), "layout-a (100 samples), memory://set has layout-a (99)"),
    ],
)
def test_other_data_is_refused_even_by_force(store: Store, tmp_path: Path, manifest: Manifest, found: str) -> None:
    Run.start(store, tmp_path, config(), SHARDS)
    with pytest.raises(UserError) as refused:
        check_same(store, config(), ShardSet(SHARDS.store, manifest), force=True)
    assert found in str(refused.value)
    repaired = replace(MANIFEST, contents_id="repaired", refused={"size": 1})
    check_same(store, config(), ShardSet(SHARDS.store, repaired))


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"order_version": ORDER_VERSION + 1}, f"has version {ORDER_VERSION + 1}, this program draws version"),
        ({"colour": "blue"}, "another version of this program"),
    ],
)
def test_a_run_of_another_version_of_the_program_is_refused_even_by_force(
    store: Store, stored: dict[str, Any], reason: str
) -> None:
    store.put("run.json", json.dumps(asdict(record_of(config(), SHARDS)) | stored).encode())
    with pytest.raises(UserError, match=reason):
        check_same(store, config(), SHARDS, force=True)


def test_a_damaged_record_is_told_in_words(store: Store) -> None:
    store.put("run.json", b'{"fingerprint": "ab')
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        read_record(store)


# ---- who owns it


def test_starts_at_the_same_time_get_different_numbers_and_all_but_the_last_are_fenced_off(
    folder_store: Store, tmp_path: Path
) -> None:
    together = threading.Barrier(4)

    def start(number: int) -> Run:
        store = Store(folder_store.url)
        together.wait()
        return Run.start(store, tmp_path / "disk", config(), SHARDS)

    with ThreadPoolExecutor(4) as threads:
        runs = sorted(threads.map(start, range(4)), key=lambda run: run.attempt)
    assert [run.attempt for run in runs] == [1, 2, 3, 4]
    for older in runs[:3]:
        older.event("late")
        with pytest.raises(Superseded, match=f"attempt {older.attempt + 1} owns the run now") as stopped:
            older.upload()
        assert stopped.value.exit_code == 3
    runs[3].event("mine")
    runs[3].upload()
    assert [event["event"] for event in read_events(folder_store)] == ["mine"]


def test_only_one_of_two_first_starts_with_different_configs_passes(folder_store: Store, tmp_path: Path) -> None:
    together = threading.Barrier(2)

    def start(lr: float) -> str | None:
        together.wait()
        try:
            Run.start(Store(folder_store.url), tmp_path / "disk", config(optim={"lr": lr}), SHARDS)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(start, (0.1, 0.2)))
    assert sorted(answer is None for answer in told) == [False, True]
    passed = (0.1, 0.2)[told.index(None)]
    assert read_config(folder_store).optim.lr == passed
    assert read_record(folder_store).fingerprint == config(optim={"lr": passed}).fingerprint()


# ---- its journals


def test_lines_reach_the_local_file_at_once_and_the_store_in_segments(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, 1)
    run.metrics.append(row(1, 1))
    run.metrics.append(row(2, 1))
    assert [json.loads(line) for line in (tmp_path / "a01/metrics.jsonl").open()] == [row(1, 1), row(2, 1)]
    assert names(store, "") == []
    run.upload()
    run.upload()
    run.metrics.append(row(3, 1))
    run.event("saved", step=3)
    run.upload()
    assert names(store, "") == ["events/a01-000001.jsonl", "metrics/a01-000001.jsonl", "metrics/a01-000002.jsonl"]
    assert read_metrics(store) == [row(1, 1), row(2, 1), row(3, 1)]
    (event,) = read_events(store)
    assert (event["event"], event["attempt"], event["step"]) == ("saved", 1, 3)
    assert abs(event["time"] - time.time()) < 60


def test_a_number_that_json_does_not_have_is_written_as_null(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, 1)
    nan, inf = float("nan"), float("inf")
    kept = run.metrics.append(
        {"result": {"step": 1, "loss": nan, "all": [1.5, inf, {"x": -inf}]}, "run": {"attempt": 1}}
    )
    assert kept["result"] == {"step": 1, "loss": None, "all": [1.5, None, {"x": None}]}
    text = (tmp_path / "a01/metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse_constant) == kept
    run.upload()
    assert read_metrics(store) == [kept]


def test_lines_that_the_store_refuses_are_kept_and_sent_once_with_the_next_upload(
    folder_store: Store, tmp_path: Path
) -> None:
    run = Run(folder_store, tmp_path / "disk", 1)
    in_the_way = tmp_path / "store" / "metrics"
    in_the_way.parent.mkdir()
    in_the_way.touch()  # a file where a folder is needed
    for step in (1, 2):
        run.metrics.append(row(step, 1))
    for _ in range(2):
        with pytest.raises(StoreError):
            run.upload()
        run.metrics.append(row(3, 1))
    in_the_way.unlink()
    run.metrics.append(row(4, 1))
    run.upload()
    steps = [line["result"]["step"] for path in names(folder_store, "metrics") for line in lines(folder_store, path)]
    assert steps == [1, 2, 3, 3, 4]


def lines(store: Store, path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.get(path).splitlines()]


@pytest.mark.slow
def test_no_line_waits_for_a_store_that_does_not_answer(silent_store: Store, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", silent_store, "metrics/a01")
    journal.append(row(1, 1))

    def upload() -> None:
        with suppress(StoreError):  # the server is closed at the end
            journal.upload()

    uploading = threading.Thread(target=upload, daemon=True)
    uploading.start()
    assert wait_until(lambda: silent_store.counters.requests > 0, 60)
    started = time.monotonic()
    journal.append(row(2, 1))
    assert time.monotonic() - started < 5
    assert uploading.is_alive()


def test_a_disk_that_refuses_lines_does_not_keep_them_from_the_store(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, 1)
    run.metrics.append(row(1, 1))
    run.local.rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match="go to the store only"):
        run.metrics.append(row(2, 1))
    run.upload()
    assert read_metrics(store) == [row(1, 1), row(2, 1)]


def killed_start(store: Store, disk: Path) -> Run:
    """A start that was killed within a line, with rows up to step 20, of which the store has those up to 10."""
    run = Run.start(store, disk, config(), SHARDS)
    for step in range(1, 21):
        run.metrics.append(row(step, 1))
        if step == 10:
            run.event("saved", step=10)
            run.upload()
    run.event("saved", step=20)
    with (run.local / "metrics.jsonl").open("a") as file:
        file.write('{"result": {"step": 21, "lo')
    return run


def test_the_next_start_sends_what_a_killed_one_left_on_the_shared_disk(store: Store, tmp_path: Path) -> None:
    killed_start(store, tmp_path)
    second = Run.start(store, tmp_path, config(), SHARDS)
    assert [line["result"]["step"] for line in read_metrics(store)] == list(range(1, 21))
    assert [event["step"] for event in read_events(store)] == [10, 20]
    before = names(store, "metrics")
    second.metrics.append(row(21, 2))
    second.upload()
    third = Run.start(store, tmp_path, config(), SHARDS)
    assert third.attempt == 3
    assert set(names(store, "metrics")) == {*before, "metrics/a02-000001.jsonl"}  # nothing is sent again
    assert [line["result"]["step"] for line in read_metrics(store)] == list(range(1, 22))


def test_lines_that_are_in_the_store_twice_are_read_once(store: Store, tmp_path: Path) -> None:
    first = killed_start(store, tmp_path)
    (first.local / "metrics.sent").write_text("")  # killed between the upload and the note of it
    (first.local / "events.sent").unlink()
    Run.start(store, tmp_path, config(), SHARDS)
    stored = [line for path in names(store, "metrics") for line in lines(store, path)]
    assert len(stored) == 30
    assert [line["result"]["step"] for line in read_metrics(store)] == list(range(1, 21))
    assert [event["step"] for event in read_events(store)] == [10, 20]


def test_lines_of_an_earlier_run_of_the_same_name_are_put_aside_and_not_mixed_in(store: Store, tmp_path: Path) -> None:
    earlier = Store(f"{store.url}-earlier")
    killed_start(earlier, tmp_path)
    Run.start(earlier, tmp_path, config(), SHARDS).event("resumed", step=20)
    run = Run.start(store, tmp_path, config(), SHARDS)
    run.metrics.append(row(1, 1))
    run.upload()
    Run.start(store, tmp_path, config(), SHARDS)
    assert read_metrics(store) == [row(1, 1)]
    assert read_events(store) == []
    assert sorted(path.name for path in (tmp_path / "a01").iterdir()) == [
        "events.old",
        "metrics.jsonl",
        "metrics.old",
        "metrics.sent",
    ]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.booleans()), min_size=1, max_size=5))
def test_the_rows_of_a_run_end_where_a_later_attempt_began_again_and_no_step_comes_twice(
    attempts: list[tuple[float, int, bool]],
) -> None:
    """Each attempt resumes at a share of the rows that there are, adds some, and its last ones may not be sent."""
    store = Store(f"memory://rows-{os.getpid()}-{next(NUMBERS)}")
    expected: list[dict[str, Any]] = []
    for number, (share, more, cut) in enumerate(attempts, start=1):
        start = round(share * len(expected))
        own = [row(step, number, loss=number / step) for step in range(start + 1, start + more + 1)]
        own = own[: len(own) // 2] if cut else own
        for segment, part in enumerate((own[:3], own[3:]), start=1):
            if part:
                data = "".join(json.dumps(line) + "\n" for line in part).encode()
                store.put(f"metrics/a{number:02d}-{segment:06d}.jsonl", data)
        expected = expected[:start] + own if own else expected
    assert read_metrics(store) == expected


def test_the_order_of_attempts_is_that_of_their_numbers_beyond_ninety_nine(store: Store, tmp_path: Path) -> None:
    for attempt in (100, 99):
        run = Run(store, tmp_path, attempt)
        run.metrics.append(row(1, attempt))
        run.upload()
    assert read_metrics(store) == [row(1, 100)]


# ---- secrets


def test_nothing_of_the_environment_is_written_into_the_run(
    folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "planted-5f3a9c"
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_TOKEN"):
        monkeypatch.setenv(name, secret)
    run = Run.start(folder_store, tmp_path / "disk", config(), SHARDS)
    run.event("started")
    run.upload()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if secret in path.read_text()]


def test_the_environment_names_the_packages_and_their_versions() -> None:
    import torch

    found = environment()
    assert torch.__version__.startswith(found["packages"]["torch"])  # +cu130, by the build
    assert {"code", "cuda", "nccl", "driver", "gpus"} <= found.keys()
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert json.loads(json.dumps(found)) == found


# ---- which version of its data


def test_a_run_that_exists_keeps_the_version_that_it_began_with_when_its_set_grows(
    store: Store, tmp_path: Path
) -> None:
    url = f"memory://set-{os.getpid()}-{next(NUMBERS)}"
    mega = 2**20
    small = replace(MANIFEST, shard_bytes=(60 * mega, 40 * mega))
    small.save(Store(url))
    values = config(data={"url": url, "batch": 8, "lanes": 4, "window_chunks": 2})
    shards, order, filled = open_data(values)
    Run.start(store, tmp_path, filled, shards)
    larger = {"samples": 120, "shard_samples": (60, 40, 20), "shard_bytes": (60 * mega, 40 * mega, 140 * mega)}
    grown = replace(small, layout_id="grown", **larger)
    grown.save(Store(url), create_only=False)
    pinned = open_data(values, record=read_record(store))
    assert (pinned[0].manifest, pinned[1:]) == (small, (order, filled))
    check_same(store, pinned[2], pinned[0])
    newest = open_data(values)
    assert newest[0].manifest == grown
    with pytest.raises(UserError, match=r"data\.chunk_samples: 8 -> 4"):
        check_same(store, newest[2], newest[0])


def test_each_set_of_a_mixture_keeps_its_version_and_another_set_is_refused(store: Store, tmp_path: Path) -> None:
    urls = [f"memory://mixed-{os.getpid()}-{next(NUMBERS)}" for _ in range(3)]
    for number, url in enumerate(urls):
        replace(MANIFEST, layout_id=f"layout-{number}").save(Store(url))

    def mixed(*some: str, weights: tuple[int, ...] = (2, 1)) -> Config:
        pairs = [{"url": url, "weight": weight} for url, weight in zip(some, weights, strict=True)]
        return config(data={"sources": pairs, "batch": 8, "lanes": 4, "chunk_samples": 4, "window_chunks": 2})

    shards, order, filled = open_data(mixed(*urls[:2]))
    Run.start(store, tmp_path, filled, shards)
    record = read_record(store)
    assert record.layouts == ("layout-0", "layout-1")
    assert (record.samples, record.layout_id) == (200, shards.manifest.layout_id)
    replace(MANIFEST, layout_id="grown").save(Store(urls[1]), create_only=False)
    again = open_data(mixed(*urls[:2]), record=record)
    assert again[1:] == (order, filled)
    check_same(store, again[2], again[0])
    for other, message in [
        (mixed(urls[0], urls[2]), "began on shards with layout"),
        (mixed(*urls[:2], weights=(1, 1)), r"data\.shares: \[2, 1\] -> \[1, 1\]"),
        (mixed(*urls, weights=(2, 1, 1)), r"data\.shares: \[2, 1\] -> \[2, 1, 1\]"),
    ]:
        found = open_data(other, record=record)
        with pytest.raises(UserError, match=message):
            check_same(store, found[2], found[0])


def test_a_run_whose_crops_were_made_otherwise_goes_on_by_force_alone(store: Store) -> None:
    values = asdict(record_of(config(), SHARDS))
    check_same(store, config(), SHARDS)
    del values["augment_version"]  # the first version did not say
    store.put("run.json", json.dumps(values).encode())
    with pytest.raises(UserError, match=r"its crops are made as by version 1, this program's by version 2; .* FORCE=1"):
        check_same(store, config(), SHARDS)
    check_same(store, config(), SHARDS, force=True)


def test_a_record_of_before_there_were_mixtures_still_reads(store: Store) -> None:
    values = asdict(record_of(config(), SHARDS))
    del values["layouts"]
    store.put("run.json", json.dumps(values).encode())
    assert read_record(store).layouts == ("layout-a",)
