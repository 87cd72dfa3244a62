"""Who keeps the others waiting: by what torch's flight recorder left, and on real ranks of which one does not come."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs.daemons import wait_until
from pipeline.collectives import late, record
from pipeline.watchdog import Watchdog, WatchdogSettings
from tests.pipeline import distributed

QUICK = WatchdogSettings(floor_s=1.0, start_s=60.0, beat_s=0.3)


def left(
    folder: Path,
    rank: int,
    groups: dict[str, tuple[int, int]],
    *entries: dict[str, Any],
    gloo: dict[str, tuple[int, int]] | None = None,
) -> Path:
    """What a rank leaves. groups: of NCCL, how many collectives of each it has begun, and how many have ended."""
    path = folder / f"{rank}.json"
    recorded = {"gloo": recorder(gloo or {}), "nccl": recorder(groups) | {"entries": entries}}
    path.write_text(json.dumps(recorded))
    return path


def recorder(groups: dict[str, tuple[int, int]]) -> dict[str, Any]:
    status = {
        group: {"last_enqueued_collective": str(begun), "last_completed_collective": str(ended)}
        for group, (begun, ended) in groups.items()
    }
    return {"pg_status": status, "entries": []}


def test_who_has_begun_fewer_is_late_and_the_others_wait_in_what_it_has_not_come_to(tmp_path: Path) -> None:
    waits = [
        {"pg_id": 1, "collective_seq_id": 9, "profiling_name": "nccl:broadcast", "input_sizes": [[1]]},
        {"pg_id": 0, "collective_seq_id": 7, "profiling_name": "nccl:all_gather", "input_sizes": [[2]]},
        {"pg_id": 0, "collective_seq_id": 8, "profiling_name": "nccl:all_reduce", "input_sizes": [[3, 4]]},
    ]
    records = {rank: left(tmp_path, rank, {"0": (8, 6), "1": (9, 8)}, *waits) for rank in (0, 2, 3)}
    records[1] = left(tmp_path, 1, {"0": (7, 6), "1": (9, 8)})
    assert str(late(records)) == (
        "rank 1 has begun 7 of the collectives of nccl group 0, others 8, who wait in nccl:all_reduce of [[3, 4]]"
    )


def test_a_late_rank_that_waits_itself_for_another_one_is_not_named(tmp_path: Path) -> None:
    """Rank 3 hangs before the batch norm that it shares with rank 2; ranks 0 and 1 share one of the same number."""
    of_rank = [{"0": (2, 1), "2": (2, 2)}] * 2 + [{"0": (1, 1), "2": (2, 1)}, {"0": (1, 1), "2": (1, 1)}]
    found = late({rank: left(tmp_path, rank, groups) for rank, groups in enumerate(of_rank)})
    assert found is not None
    assert (found.ranks, found.group, found.own, found.others) == ((3,), "nccl group 0", 1, 2)


def test_groups_of_the_two_recorders_are_not_taken_for_each_other_and_nccls_count_first(tmp_path: Path) -> None:
    one = left(tmp_path, 0, {"0": (9, 8)}, gloo={"0": (5, 5)})
    other = left(tmp_path, 1, {"0": (8, 8)}, gloo={"0": (4, 4)})
    found = late({0: one, 1: other})
    assert found is not None
    assert (found.ranks, found.group, found.own, found.others) == ((1,), "nccl group 0", 8, 9)
    alike = {0: one, 1: left(tmp_path, 2, {"0": (9, 8)}, gloo={"0": (4, 4)})}
    assert str(late(alike)) == "rank 1 has begun 4 of the collectives of gloo group 0, others 5"


def test_where_all_have_begun_as_many_who_has_ended_fewer_is_late(tmp_path: Path) -> None:
    records = {rank: left(tmp_path, rank, {"0": (8, 8 - (rank == 2))}) for rank in range(3)}
    assert str(late(records)) == "rank 2 has ended 7 of the collectives of nccl group 0, others 8"


def test_groups_are_compared_among_their_own_ranks(tmp_path: Path) -> None:
    records = {0: left(tmp_path, 0, {"0": (5, 5), "1": (3, 3)}), 1: left(tmp_path, 1, {"0": (5, 5), "2": (4, 4)})}
    assert late(records) is None


def test_many_late_ranks_are_not_all_named(tmp_path: Path) -> None:
    records = {rank: left(tmp_path, rank, {"0": (6 if rank == 9 else 5, 5)}) for rank in range(10)}
    found = late(records)
    assert found is not None
    assert found.ranks == tuple(range(9))
    assert str(found).startswith("ranks 0, 1, 2, 3 and more have begun 5 of the collectives of nccl group 0, others 6")


def test_what_was_cut_or_is_not_there_says_nothing(tmp_path: Path) -> None:
    whole = left(tmp_path, 0, {"0": (5, 5)})
    statuses = ("3", '{"0": {}}', '{"0": 3}', '{"0": {"last_enqueued_collective": "x"}}')
    for number, text in enumerate(
        ("", "{", "{}", "[]", '{"nccl": 3}', *(f'{{"nccl": {{"pg_status": {status}}}}}' for status in statuses))
    ):
        cut = tmp_path / f"cut-{number}.json"
        cut.write_text(text)
        assert late({0: whole, 1: cut, 2: tmp_path / "none"}) is None
    assert late({}) is None


def one_does_not_come(rank: int, folder: str) -> list[str]:
    """Rank 0 waits in an all-reduce until its watchdog has said so; rank 1 comes to it only then."""
    said = list[str]()
    world = dist.get_world_size()
    dog = Watchdog(Path(folder), rank, world, f"host{rank}", QUICK, {}, lambda hang: said.append(str(hang)))
    dist.all_reduce(torch.ones(2))
    dog.step(1)
    if rank == 1:
        assert wait_until(lambda: bool(said), 60)
    dist.all_reduce(torch.ones(3, 5))
    assert wait_until(lambda: bool(said), 60)
    dog.close()
    return said


@pytest.mark.slow
def test_a_rank_that_lives_and_does_not_come_is_named_with_what_the_others_wait_in(tmp_path: Path) -> None:
    said = distributed.run(2, one_does_not_come, str(tmp_path))
    late_one = (
        "rank 1 has begun 1 of the collectives of gloo group 0, others 2, who wait in gloo:all_reduce of [[3, 5]]"
    )
    assert any(f"all ranks beat; {late_one} (rank 1 is on host1)" in line for line in (said[0][0], said[1][0])), said


def test_without_torch_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._C._distributed_c10d")
    record(tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []


def test_nccls_recorder_is_asked_where_torch_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of gloo never hears of what GPUs tell each other."""
    asked = torch._C._distributed_c10d
    told = json.dumps(recorder({"0": (3, 2)}))
    monkeypatch.setattr(asked, "_dump_nccl_trace_json", lambda **_: told, raising=False)
    record(tmp_path / "told.json")
    assert json.loads((tmp_path / "told.json").read_text()).keys() == {"nccl", "gloo"}
    assert json.loads((tmp_path / "told.json").read_text())["nccl"] == json.loads(told)
