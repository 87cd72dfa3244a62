"""The last step of a packing: whoever does it, and however large the set."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.errors import UserError
from data_shards.index import Manifest
from data_shards.merge import Commit, Refusal, merge, read_refused, save_group, unfinished
from data_shards.plan import Asked, PackSettings, Plan
from data_shards.shard import Written
from data_shards.sources import SourceOptions
from data_shards.store import Store

PLAN = Plan(1, "identity", Asked("there", PackSettings(), SourceOptions()), 60, 10**6, 0, 6, None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"memory://{tmp_path.name}")


def finish(store: Store, plan: Plan, group: int, samples: int = 9) -> None:
    commits = [
        Commit(Written(samples, 1000 + shard, f"{shard:032x}"), [Refusal(f"{shard}.jpg", "empty", "")])
        for shard in plan.group_shards(group)
    ]
    save_group(store, plan, group, commits)


def test_groups_are_unfinished_until_their_summary_is_there(store: Store) -> None:
    for group in (0, 2, 5):
        finish(store, PLAN, group)
    assert unfinished(store, PLAN) == {1, 3, 4}


def test_the_manifest_has_the_shards_in_order_whoever_finished_first_and_two_may_merge(store: Store) -> None:
    for group in (5, 0, 2, 1, 4, 3):
        finish(store, PLAN, group)
    manifest = merge(store, PLAN)
    assert manifest.shard_bytes == tuple(range(1000, 1006))
    assert (manifest.samples, manifest.refused) == (54, {"empty": 6})
    assert manifest.settings["shard_bytes"] == PackSettings().shard_bytes
    assert [one.source for one in read_refused(store)] == [f"{group}.jpg" for group in range(6)]
    before = store.get("MANIFEST.json")
    assert merge(store, PLAN) == manifest
    assert store.get("MANIFEST.json") == before


def test_the_layout_depends_on_the_plan_and_on_what_was_accepted_never_on_contents(tmp_path: Path) -> None:
    layouts = {}
    for name, plan, samples in (
        ("a", PLAN, 9),
        ("moved", replace(PLAN, asked=PLAN.asked._replace(source="elsewhere")), 9),
        ("other counts", PLAN, 8),
        ("other plan", replace(PLAN, identity="another"), 9),
    ):
        store = Store(f"memory://{tmp_path.name}/{name.replace(' ', '')}")
        for group in range(6):
            finish(store, plan, group, samples)
        layouts[name] = merge(store, plan).layout_id
    assert layouts["a"] == layouts["moved"]
    assert len(set(layouts.values())) == 3


def test_when_nothing_was_accepted_nothing_stays(store: Store) -> None:
    PLAN.save(store)
    for group in range(6):
        finish(store, PLAN, group, samples=0)
    with pytest.raises(UserError, match="there: no image to pack: 6 empty"):
        merge(store, PLAN)
    assert store.list() == []


def test_a_late_merge_of_an_append_does_not_undo_a_newer_one(store: Store) -> None:
    for group in range(6):
        finish(store, PLAN, group)
    first = merge(store, PLAN)
    second = replace(PLAN, number=2, identity="second", first_shard=6, after=first.layout_id)
    for group in range(6):
        finish(store, second, group)
    third = replace(second, number=3, identity="third", first_shard=12, after=merge(store, second).layout_id)
    for group in range(6):
        finish(store, third, group)
    newest = merge(store, third)
    with pytest.raises(UserError, match="no longer the version that plan 2 adds to"):
        merge(store, second)
    assert Manifest.load(store) == newest
    assert newest.samples == 3 * 54


@pytest.mark.slow
def test_a_billion_samples_in_a_hundred_thousand_shards_are_merged_from_a_thousand_objects(tmp_path: Path) -> None:
    program = """
        import json, sys
        from pathlib import Path
        from data_shards.merge import Commit, merge, save_group
        from data_shards.plan import Asked, PackSettings, Plan
        from data_shards.shard import Written
        from data_shards.sources import SourceOptions
        from data_shards.store import Store
        store = Store(f"file://{sys.argv[1]}")
        plan = Plan(1, "identity", Asked("there", PackSettings(), SourceOptions()), 10**9, 10**14, 0, 100_000, None)
        for group in range(plan.groups):
            shards = plan.group_shards(group)
            commits = [Commit(Written(10_000, 10**9, f"{shard:032x}"), []) for shard in shards]
            save_group(store, plan, group, commits)
        requests = store.counters.requests
        manifest = merge(store, plan)
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
        print(json.dumps([manifest.samples, store.counters.requests - requests, peak]))
    """
    code = "\n".join(line[8:] for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    samples, requests, peak_gib = json.loads(done.stdout)
    assert samples == 10**9
    assert requests == 1000 + 2  # the manifest is put under its layout, then as the newest
    assert peak_gib < 1
