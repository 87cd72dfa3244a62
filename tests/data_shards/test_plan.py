"""The packing plan: borders and groups, what a worker reads of it, and that its memory does not grow."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.plan import MOST_GROUPS, Asked, PackSettings, Plan, load_plans, make_plan
from data_shards.sources import Source, SourceOptions
from data_shards.store import Store, Unavailable

ASKED = Asked("there", PackSettings(shard_bytes=100_000), SourceOptions())
PLAN = Plan(1, "identity", ASKED, sources=10, bytes=10, first_shard=0, shards=2, after=None)


def sources(count: int) -> list[Source]:
    return [Source(f"/there/{n}.jpg", size=9_000, name=f"{n}.jpg", label=f"{n % 7}") for n in range(count)]


@given(st.integers(1, 10**10), st.integers(1, 200_000), st.integers(0, 10**6))
def test_groups_cover_the_shards_in_their_order_and_shards_are_of_one_size(count: int, shards: int, first: int) -> None:
    plan = replace(PLAN, sources=count, shards=min(count, shards), first_shard=first)
    assert plan.groups <= MOST_GROUPS
    parts = [plan.group_shards(group) for group in (0, plan.groups // 2, plan.groups - 1)]
    assert (parts[0].start, parts[-1].stop) == (first, plan.end_shard)
    assert all(len(part) in (plan.shards // plan.groups, -(-plan.shards // plan.groups)) for part in parts)
    found = {plan.group_of(shard): part for part in parts for shard in (part.start, part[-1])}
    assert found == {group: plan.group_shards(group) for group in (0, plan.groups // 2, plan.groups - 1)}
    sizes = {plan.shard_sources(shard) for part in parts for shard in (part.start, part[-1])}
    assert max(sizes) - min(sizes) <= 1
    assert plan.shard_sources(plan.first_shard) >= 1
    if plan.groups < MOST_GROUPS:
        assert sum(map(plan.shard_sources, range(first, plan.end_shard))) == count


def test_every_source_comes_back_once_with_all_that_was_said_of_it(tmp_path: Path) -> None:
    store, given_ = Store(f"memory://{tmp_path.name}"), sources(500)
    plan = make_plan(store, ASKED, given_)
    assert plan is not None
    assert plan == load_plans(store)[0]
    assert plan.shards == -(-500 * (512 + 18 * 512) // 100_000)
    found = [part for group in range(plan.groups) for part in plan.load_sources(store, group)[1]]
    assert [len(part) for part in found] == [plan.shard_sources(shard) for shard in range(plan.shards)]
    assert sorted(source for part in found for source in part) == sorted(given_)
    assert [source for part in found for source in part] != given_


def test_the_plan_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    other = ASKED._replace(settings=PackSettings(shard_bytes=100_000, seed=1))
    moved = [source._replace(url=f"s3://b/{source.name}") for source in sources(50)]
    cases = {"a": (ASKED, sources(50)), "b": (ASKED, moved), "c": (other, sources(50)), "d": (ASKED, sources(51))}
    plans = {name: make_plan(Store(f"memory://{tmp_path.name}/{name}"), *case) for name, case in cases.items()}
    identities = {name: plan.identity for name, plan in plans.items() if plan}
    assert identities["a"] == identities["b"]
    assert len(set(identities.values())) == 3


def test_a_column_with_the_name_of_one_of_ours_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    with pytest.raises(UserError, match="sha256: the index has columns of that name"):
        make_plan(Store(f"memory://{tmp_path.name}"), ASKED, sources(3), pa.schema({"sha256": pa.string()}))


def test_a_source_that_does_not_answer_stops_the_plan_unless_such_are_to_be_skipped(tmp_path: Path) -> None:
    store, broken = Store(f"memory://{tmp_path.name}"), [Source("/proc/self/mem", name="a.jpg")]
    with pytest.raises(Unavailable, match="/proc/self/mem: Input/output error"):
        make_plan(store, ASKED, broken)
    assert make_plan(store, ASKED._replace(options=SourceOptions(skip_unreachable=True)), broken) is not None


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    store.put("plans/1/PLAN.json", b'{"version": 99}')
    with pytest.raises(UserError, match="plans/1 is of another version"):
        load_plans(store)


def test_an_engine_without_room_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.database.MEMORY_BYTES", 1024)
    with pytest.raises(UserError, match="sorting the sources failed; TMPDIR=") as error:
        make_plan(Store(f"memory://{tmp_path.name}"), ASKED, sources(5_000))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_ten_times_as_many_sources_take_no_more_memory(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from data_shards import database, plan
        from data_shards.sources import Source, SourceOptions
        from data_shards.store import Store, Unavailable
        database.MEMORY_BYTES = 100 * 2**20
        count, folder = int(sys.argv[1]), sys.argv[2]
        listed = (Source(f"/a/folder/of/images/{n}.jpg", size=100_000, name=f"{n}.jpg") for n in range(count))
        settings = plan.PackSettings(shard_bytes=100 * 2**20)
        made = plan.make_plan(Store(f"file://{folder}"), plan.Asked("a", settings, SourceOptions()), listed)
        columns, parts = made.load_sources(Store(f"file://{folder}"), 0)
        assert len(next(parts)) == made.shard_sources(0)
        print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
    """
    peaks = []
    for count in (150_000, 1_500_000):
        code = "\n".join(line[8:] for line in program.splitlines())
        command = [sys.executable, "-c", code, str(count), str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 150, peaks  # MiB; as Python objects the sources take 600
