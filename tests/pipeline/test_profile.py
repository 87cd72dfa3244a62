"""A look into the steps of a run that goes on: what it says, and that nothing else changes by it."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import record_function

from data_shards.store import Store
from pipeline.journal import read_events, read_metrics
from pipeline.profile import PARTS, STEPS, Profiler, table
from tests.pipeline import distributed
from tests.pipeline.test_train import alone, config, finish, tiles

__all__ = ["tiles"]

Events = list[tuple[str, dict[str, Any]]]


def told(events: Events) -> Callable[..., None]:
    return lambda name, **fields: events.append((name, fields))


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """The folder of an attempt in that of its run, of which somebody wants to know."""
    folder = tmp_path / "a01"
    folder.mkdir()
    (tmp_path / "profile").touch()
    return folder


def some_steps(profiler: Profiler, count: int) -> None:
    for done in range(count):
        profiler.between(done)
        with record_function("forward"):
            torch.ones(200, 200) @ torch.ones(200, 200)
        with record_function("optimizer"):
            torch.zeros(10).add_(1)


def test_the_table_has_the_parts_of_a_step_in_their_order_then_what_takes_longest_by_itself() -> None:
    with torch.profiler.profile() as trace:
        for _ in range(STEPS):
            with record_function("optimizer"):
                torch.zeros(10).add_(1)
            with record_function("forward"):
                for _ in range(2):
                    torch.ones(300, 300) @ torch.ones(300, 300)
    averages = trace.key_averages()
    (spent,) = (event.cpu_time_total / 1000 / STEPS for event in averages if event.key == "forward")
    parts, longest = "\n".join(table(averages)).split("\n\n")
    assert parts.splitlines()[1].split() == [f"{spent:.2f}", "forward"]
    assert [line.split()[1:] for line in parts.splitlines()[2:]] == [["optimizer"]]
    rows = [line.split(maxsplit=2) for line in longest.splitlines()[1:]]
    assert ["2", "aten::mm"] in [row[1:] for row in rows]
    assert [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)
    assert not {"forward", "optimizer"} & {row[2] for row in rows}


def test_where_a_gpu_works_its_kernels_are_told_and_backward_has_what_autograd_did_in_its_own_thread() -> None:
    def event(key: str, host: float, device: float, *, kernel: bool = False, marked: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            count=2 * STEPS,
            device_type=DeviceType.CUDA if kernel else DeviceType.CPU,
            is_user_annotation=marked,
            cpu_time_total=1000 * STEPS * host,
            device_time_total=1000 * STEPS * device,
            self_cpu_time_total=1000 * STEPS * host,
            self_device_time_total=1000 * STEPS * device,
        )

    events = [
        event("ProfilerStep*", 20, 0, marked=True),
        event("ProfilerStep*", 0, 19, kernel=True, marked=True),
        event("forward", 3, 6, marked=True),
        event("forward", 0, 7, kernel=True, marked=True),
        event("backward", 5, 1, marked=True),
        event("autograd::engine::evaluate_function: ConvolutionBackward0", 4, 8),
        event("aten::convolution", 3, 6),
        event("relu", 0, 2, kernel=True),
        event("gemm", 0, 13, kernel=True),
    ]
    parts, longest = "\n".join(table(events)).split("\n\n")
    assert [line.split(maxsplit=2) for line in parts.splitlines()[1:]] == [
        ["20.00", "15.00", "the whole step"],
        ["3.00", "6.00", "forward"],
        ["5.00", "9.00", "backward"],
    ]
    assert [line.split() for line in longest.splitlines()[1:]] == [["13.00", "2", "gemm"], ["2.00", "2", "relu"]]


def test_who_asks_gets_one_look_and_who_asks_again_another(asked: Path) -> None:
    events: Events = []
    profiler = Profiler(asked, told(events))
    some_steps(profiler, 12)
    table, trace = asked / "profile-step-000000004.txt", asked / "profile-step-000000004.json.gz"
    assert events == [("profiled", {"step": 4, "table": str(table), "trace": str(trace)})]
    assert not (asked.parent / "profile").exists()
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"forward", "optimizer", "aten::mm"} <= names
    said = table.read_text()
    assert said.startswith("steps 2 to 4 on rank 0\n")
    assert "aten::mm" in said
    (asked.parent / "profile").touch()
    profiler._looked = 0.0  # it looks every LOOK_S only
    some_steps(profiler, 12)
    assert len(events) == 2


def test_a_look_that_fails_is_told_and_the_steps_go_on(asked: Path) -> None:
    events: Events = []
    profiler = Profiler(asked, told(events))
    (asked / "profile-step-000000004.json.gz").mkdir()
    some_steps(profiler, 8)
    ((name, fields),) = events
    assert (name, fields["step"]) == ("profile failed", 4)
    assert "profile-step-000000004.json.gz" in fields["reason"]
    with torch.profiler.profile() as trace:  # torch's own state is as if nothing had been
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert "aten::mm" in {event.key for event in trace.key_averages()}


def test_a_look_that_the_end_cuts_short_says_nothing(asked: Path) -> None:
    events: Events = []
    profiler = Profiler(asked, told(events))
    some_steps(profiler, 3)
    profiler.close()
    some_steps(profiler, 8)
    assert events == []
    assert list(asked.iterdir()) == []


def one_run(rank: int, values: dict[str, Any], folder: str, ask: bool) -> None:
    Path(folder).mkdir()
    if ask:
        (Path(folder) / "profile").touch()
    finish(alone(values, folder))


@pytest.mark.slow
def test_a_run_that_is_looked_at_learns_the_same_to_the_bit(tiles: str, tmp_path: Path) -> None:
    values = config(tiles, tmp_path)
    distributed.run(1, one_run, values, str(tmp_path / "plain"), False)
    distributed.run(1, one_run, values, str(tmp_path / "asked"), True)
    plain, looked_at = (Store(f"{values['store']}/{name}") for name in ("plain", "asked"))
    results = [[row["result"] for row in read_metrics(store)] for store in (plain, looked_at)]
    assert results[0] == results[1]
    assert len(results[0]) == 12
    (event,) = [event for event in read_events(looked_at) if event["event"].startswith("profile")]
    said = Path(event["table"]).read_text()
    parts = [line.split(maxsplit=1)[1] for line in said.split("\n\n")[1].splitlines()[1:]]
    assert parts == ["the whole step", *PARTS]
