"""Packing by a real SLURM array, into a folder that its nodes share."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.index import Manifest
from data_shards.pack import PackSettings, pack, prepare
from data_shards.plan import load_plans
from data_shards.store import Store
from jobs import slurm as slurm_commands
from jobs.daemons import wait_until
from jobs.pack_array import pack_array
from jobs.site import Site
from tests.photos import write_tiles
from tests.real.arrays import kill_second_task

pytestmark = pytest.mark.slow
SETTINGS = PackSettings(shard_bytes=20_000)
DEADLINE_S = 120.0


@pytest.fixture
def site(slurm: Any, tmp_path: Path) -> Iterator[Site]:
    tmp_path.chmod(0o755)
    yield Site(name="here", shared_dir=str(tmp_path / "shared"), time_limit_min=10, environment=slurm.environment)
    for array in tmp_path.glob("shared/pack-*/array.json"):
        slurm_commands.cancel(json.loads(array.read_text())["job"])


def contents(store: Store) -> dict[str, bytes]:
    return {entry.path: store.get(entry.path) for entry in store.list()}


def test_an_array_packs_the_same_bytes_as_one_process_and_goes_on_after_a_task_was_killed(
    site: Site, tmp_path: Path
) -> None:
    tiles = write_tiles(tmp_path / "tiles", 180)
    straight, store = Store(f"file://{tmp_path}/straight"), Store(f"file://{tmp_path}/dst")
    pack(tiles, straight, SETTINGS)
    plan = prepare(tiles, store, SETTINGS)
    assert plan is not None
    killed = False

    def kill_one(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        nonlocal killed
        assert what == "groups of shards"
        if not killed:
            killed = wait_until(lambda: kill_packer(tmp_path), DEADLINE_S, 0.02)

    with pytest.raises(
        UserError, match=r"job \d+ is over and .* groups of shards are left; the same command goes on"
    ) as error:
        pack_array(site, store, plan, 2, kill_one)
    assert "\n" not in str(error.value)
    assert killed
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").glob("plans/1/commits/*.json")}
    assert done
    assert not store.exists("MANIFEST.json")
    assert prepare(tiles, store, SETTINGS) == plan
    pack_array(site.model_copy(update={"cpus_per_rank": 2}), store, plan, 3)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert contents(store) == contents(straight)
    assert prepare(tiles, store, SETTINGS) is None


def kill_packer(folder: Path) -> bool:
    """Once a group is done."""
    return any(folder.glob("dst/plans/1/commits/*.json")) and kill_second_task(folder)


def test_what_stops_a_task_is_told_by_the_command_in_one_line(site: Site, tmp_path: Path) -> None:
    tiles = write_tiles(tmp_path / "tiles", 20)
    store = Store(f"file://{tmp_path}/dst")
    plan = prepare(tiles, store, SETTINGS)
    assert plan is not None
    path = tmp_path / "dst" / plan.group_path(0)
    path.rename(tmp_path / "aside")
    with pytest.raises(UserError, match=rf"job \d+ is over .* the same command goes on: .*{path.name}: no such file"):
        pack_array(site, store, plan, 1)
    (tmp_path / "aside").rename(path)
    broken = site.model_copy(update={"setup": ("cd /nowhere/at/all",)})
    with pytest.raises(UserError, match=r"the site's setup: cd /nowhere/at/all failed on node\d \(exit code 1\)"):
        pack_array(broken, store, load_plans(store)[0], 1)
    pack_array(site, store, load_plans(store)[0], 1)
    assert Manifest.load(store).samples == 20
    assert json.loads(next(Path(site.shared_dir).glob("pack-*/array.json")).read_text())["job"].isdigit()
