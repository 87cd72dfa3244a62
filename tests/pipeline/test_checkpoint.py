"""Checkpoints in a store that is a folder: what is saved comes back, what is damaged is noticed, cuts are harmless."""

import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_shards.errors import BadHost, UserError
from data_shards.store import AlreadyExists, Denied, Store, StoreError, Unavailable
from pipeline import commit, sender
from pipeline.checkpoint import Checkpointer, CheckpointSettings, order_for
from pipeline.commit import File, Manifest, NoRoom, Part, Place, Retention
from pipeline.ranks import Ranks
from pipeline.snapshot import HostCopy, deal, write
from pipeline.weights import point
from tests.pipeline.distributed import run
from tests.waiting import until


class LoggedStore(Store):
    """The real store with a log of its writes; `fail` may raise in a write's place, as a store that is away does."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.log: list[str] = []
        self.fail: Callable[[str], None] = lambda line: None
        self.arrived: Callable[[Path], object] = lambda local: None  # may spoil it, as a bad disk does

    def put(self, path: str, data: bytes, *, create_only: bool = False) -> None:
        self._write(f"put {path}")
        super().put(path, data, create_only=create_only)

    def upload(self, local: Path, path: str) -> None:
        self._write(f"put {path}")
        super().upload(local, path)

    def download(self, path: str, local: Path) -> None:
        super().download(path, local)
        self.arrived(local)

    def delete(self, paths: Iterable[str]) -> None:
        paths = list(paths)
        for path in paths:
            self._write(f"delete {path}")
        super().delete(paths)

    def abandon(self, prefix: str) -> int:
        self._write(f"abandon {prefix}")
        return super().abandon(prefix)

    def _write(self, line: str) -> None:
        self.fail(line)
        self.log.append(line)


class Attempt:
    """One start of a run on one rank: its Checkpointer and what it told."""

    def __init__(
        self, folder: Path, number: int = 1, *, keep: int = 2, keep_every: int | None = None,
        local: Path | None = None, fingerprint: str = "f1",
        ranks: Ranks = Ranks(0, 1, None),  # noqa: B008 - of one rank, without a state
    ) -> None:  # fmt: skip
        self.store = LoggedStore(f"file://{folder}/store")
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.fence: Callable[[], object] = lambda: None
        self.local = local or folder / "local"
        self.checkpoints = Checkpointer(
            self.store, self.local, attempt=number, fingerprint=fingerprint, ranks=ranks,
            host=f"node{ranks.rank}", settings=CheckpointSettings(keep=keep, keep_every=keep_every),
            fence=self.call_fence, event=self.event, before_commit=lambda: self.store.log.append("before commit"),
        )  # fmt: skip

    def call_fence(self) -> None:
        self.fence()

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def line(self, name: str) -> str:
        """The reason in the only event of that name."""
        (reason,) = [fields["reason"] for event, fields in self.events if event == name]
        assert "\n" not in reason
        return str(reason)

    def commit(self, step: int, state: dict[str, Tensor] | None = None, **extra: Any) -> "Attempt":
        self.checkpoints.save(step, state or numbered(step), extra)
        self.checkpoints.wait(30)
        return self

    def found_step(self) -> int | None:
        found = self.checkpoints.newest()
        return found.step if found else None

    def loaded(self) -> dict[str, Tensor]:
        found = self.checkpoints.newest()
        assert found is not None
        state = {name: torch.full_like(tensor, 1) for name, tensor in numbered(0).items()}
        self.checkpoints.load(found, state)
        return state


def numbered(step: int) -> dict[str, Tensor]:
    """A state that shows which step it is of."""
    return {"model.weight": torch.arange(600.0).reshape(20, 30) + step, "optim.step": torch.tensor(step)}


def objects(folder: Path) -> dict[str, bytes]:
    """What lies in the store, without what vanishes while one looks: old checkpoints are deleted in the background."""
    root, found = folder / "store" / "checkpoints", {}
    for directory, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):
                found[str((Path(directory) / name).relative_to(root))] = (Path(directory) / name).read_bytes()
    return dict(sorted(found.items()))


def folders(folder: Path) -> list[str]:
    return sorted({name.split("/")[0] for name in objects(folder)})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_kind_of_tensor_comes_back_into_the_very_tensors_that_are_given(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    saved: dict[str, Tensor] = {
        "weight": nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)),
        "view": torch.randn(6, 8, generator=generator)[::2, 1::3],
        "scalar": torch.tensor(7), "flag": torch.tensor([True, False]), "empty": torch.zeros(0, 3),
        "half": torch.randn(9, generator=generator).bfloat16(), "double": torch.randn(3, generator=generator).double(),
        "random": torch.get_rng_state(),
    }  # fmt: skip
    Attempt(tmp_path).commit(3, saved, quarantine=[[1, 2, "x"]])
    later = Attempt(tmp_path, 2)
    found = later.checkpoints.newest()
    assert found is not None
    assert (found.step, found.attempt, found.extra) == (3, 1, {"quarantine": [[1, 2, "x"]]})
    state = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    state["weight"] = nn.Parameter(state["weight"])
    before = dict(state)
    later.checkpoints.load(found, state)
    for name, tensor in saved.items():
        assert torch.equal(state[name], tensor), name
        assert state[name] is before[name], name
    assert state["weight"].is_contiguous(memory_format=torch.channels_last)


def test_the_saved_bytes_are_those_of_the_moment_of_the_save(tmp_path: Path) -> None:
    attempt, state = Attempt(tmp_path), numbered(1)
    go = threading.Event()
    attempt.fence = lambda: go.wait(30)
    attempt.checkpoints.save(1, state, {})
    for tensor in state.values():
        tensor.fill_(-1)  # training goes on while the save is on its way
    go.set()
    attempt.checkpoints.wait(30)
    attempt.checkpoints.save(2, numbered(2), {})  # and the host memory is used again
    attempt.checkpoints.wait(30)
    assert same(attempt.loaded(), numbered(2))
    shutil.rmtree(tmp_path / "store/checkpoints/step-000000002-a1")
    assert same(attempt.loaded(), numbered(1))


def test_the_manifest_is_put_after_everything_else_and_the_journals_before_everything(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path).commit(1)
    place = "put checkpoints/step-000000001-a1"
    assert attempt.store.log == [
        "before commit", f"{place}/rank-0.safetensors", f"{place}/rank-0.json", f"{place}/MANIFEST.json"
    ]  # fmt: skip
    assert attempt.names() == ["saved", "committed"]
    assert attempt.checkpoints.committed_step == attempt.checkpoints.pending_step == 1


def test_without_any_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert Attempt(tmp_path).found_step() is None


def test_the_highest_step_is_found_then_the_highest_attempt_and_only_of_this_fingerprint(tmp_path: Path) -> None:
    for attempt, step, fingerprint in ((1, 20, "f1"), (2, 30, "other"), (3, 20, "f1"), (4, 10, "f1")):
        Attempt(tmp_path, attempt, keep=9, fingerprint=fingerprint).commit(step)
    found = Attempt(tmp_path, 5).checkpoints.newest()
    assert found is not None
    assert (found.step, found.attempt) == (20, 3)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["rank-0.safetensors", "MANIFEST.json"])
def test_a_damaged_file_of_the_newest_checkpoint_sends_the_resume_to_the_older_one_and_says_so(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    Attempt(tmp_path).commit(1).commit(2)
    damage(tmp_path / "store/checkpoints/step-000000002-a1" / file)
    attempt = Attempt(tmp_path, 2)
    if (file, damage) == ("MANIFEST.json", Path.unlink):  # all else is there: as if it had been cut just before
        assert same(attempt.loaded(), numbered(2))
        assert "step-000000002-a1" in attempt.line("checkpoint completed")
        return
    assert same(attempt.loaded(), numbered(1))
    line = attempt.line("checkpoint damaged")
    assert line.startswith(f"checkpoints/step-000000002-a1: {file} ")
    assert line.endswith("; going on from step-000000001-a1")


def test_any_flipped_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    Attempt(tmp_path).commit(1, loss=0.25)
    path = tmp_path / "store/checkpoints/step-000000001-a1/MANIFEST.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if json.loads(whole) == _json_or_none(path.read_bytes()):
            continue  # white space
        assert Attempt(tmp_path, 2).found_step() is None, place


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_the_line_about_a_flipped_byte_shows_both_sums(tmp_path: Path) -> None:
    Attempt(tmp_path).commit(1)
    flip(tmp_path / "store/checkpoints/step-000000001-a1/rank-0.safetensors")
    attempt = Attempt(tmp_path, 2)
    assert attempt.found_step() is None
    line = attempt.line("checkpoint damaged")
    assert " has sha256 " in line
    assert ", its manifest says " in line
    assert line.endswith("no older one is whole: starting from step 0")


def test_a_damaged_part_record_does_no_harm_once_the_manifest_is_there(tmp_path: Path) -> None:
    Attempt(tmp_path).commit(1)
    flip(tmp_path / "store/checkpoints/step-000000001-a1/rank-0.json")
    assert Attempt(tmp_path, 2).found_step() == 1


def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    Attempt(tmp_path).commit(1)
    manifest = Manifest(2, 1, "f1", 1, (File("../../../outside", 1, "0"),), {})
    path = tmp_path / "store/checkpoints/step-000000002-a1/MANIFEST.json"
    path.parent.mkdir()
    path.write_bytes(manifest.encode())
    assert Attempt(tmp_path, 2).found_step() == 1


@pytest.mark.parametrize("name", ["../rank-0.safetensors", "/etc/passwd", "rank-0.safetensors/..", "rank-0.pkl", ""])
def test_what_a_rank_left_cannot_name_a_file_outside_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="a file name that no rank writes"):
        Part.decode(Part(0, 1, "f1", (File(name, 1, "0"),)).encode())


def test_the_name_of_another_run_cannot_lead_out_of_the_folder_of_all_runs(tmp_path: Path) -> None:
    Attempt(tmp_path).commit(1)
    with pytest.raises(UserError, match="leads out of the store"):
        point(Store(f"file://{tmp_path}/store/elsewhere"), "..@1")  # with a slash it would be a path


def test_nothing_on_the_way_back_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Malice:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    Attempt(tmp_path).commit(1)
    for name in (".metadata", "__0_0.distcp", "rank-1.safetensors"):
        (tmp_path / "store/checkpoints/step-000000001-a1" / name).write_bytes(pickle.dumps(Malice()))

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle is read")

    for module, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert same(Attempt(tmp_path, 2).loaded(), numbered(1))
    assert not (tmp_path / "executed").exists()


def test_a_state_that_does_not_fit_is_refused_in_a_line_that_names_the_tensor_and_nothing_is_changed(
    tmp_path: Path,
) -> None:
    Attempt(tmp_path).commit(1)
    attempt = Attempt(tmp_path, 2)
    whole = numbered(0)
    cases = {
        r"no tensor head\.bias": {**whole, "head.bias": torch.zeros(2)},
        r"a tensor optim\.step, which this run does not know": {"model.weight": whole["model.weight"]},
        r"model\.weight has the shape \(20, 30\), this run's has \(20, 31\)": {
            **whole,
            "model.weight": torch.ones(20, 31),
        },
        r"optim\.step is torch\.int64, this run's is torch\.float32": {**whole, "optim.step": torch.tensor(0.0)},
    }
    for message, state in cases.items():
        before = {name: tensor.clone() for name, tensor in state.items()}
        found = attempt.checkpoints.newest()
        assert found is not None
        with pytest.raises(UserError, match=message) as error:
            attempt.checkpoints.load(found, state)
        assert str(error.value).startswith("checkpoints/step-000000001-a1: ")
        assert "\n" not in str(error.value)
        assert same(state, before)


def test_a_state_that_is_not_finite_never_becomes_a_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path).commit(1)
    bad = numbered(2)
    bad["model.weight"][3, 4] = float("nan")
    attempt.checkpoints.save(2, bad, {})
    with pytest.raises(UserError, match=r"model\.weight holds a value that is not finite"):
        attempt.checkpoints.wait(30)
    assert "step-000000002-a1" in attempt.line("save refused")
    attempt.commit(3)
    assert folders(tmp_path) == ["step-000000001-a1", "step-000000003-a1"]


def test_the_last_ones_are_kept_and_an_older_one_goes_only_after_a_newer_is_committed(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        attempt.commit(step)
    until(lambda: folders(tmp_path) == ["step-000000003-a1", "step-000000004-a1"])
    log, gone, cause = attempt.store.log, "step-000000001-a1", "step-000000003-a1"
    deletions = [line for line in log if line.startswith(f"delete checkpoints/{gone}/")]
    assert deletions[0].endswith("MANIFEST.json")
    assert log.index(deletions[0]) > log.index(f"put checkpoints/{cause}/MANIFEST.json")


def test_a_run_that_ends_leaves_no_more_than_it_keeps(tmp_path: Path) -> None:
    attempt, allowed = Attempt(tmp_path, keep=2).commit(1).commit(2), threading.Event()

    def slowly(line: str) -> None:
        if line.startswith("delete"):
            allowed.wait(20)

    attempt.store.fail = slowly
    attempt.commit(3)
    attempt.checkpoints.tidy(0.1)  # no longer than it may
    assert len(folders(tmp_path)) == 3
    threading.Timer(0.2, allowed.set).start()
    attempt.checkpoints.tidy(20)
    assert folders(tmp_path) == ["step-000000002-a1", "step-000000003-a1"]


def test_every_mth_and_those_that_were_evaluated_stay_for_ever(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, keep=2, keep_every=4)
    attempt.store.put("eval/step-000000002/report.json", b"{}")
    for step in range(1, 8):
        attempt.commit(step)
    until(lambda: folders(tmp_path) == [f"step-00000000{step}-a1" for step in (2, 4, 6, 7)])


def test_what_stays_for_ever_is_not_read_again_at_each_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, looked = Attempt(tmp_path, keep=2, keep_every=1), list[int]()
    for step in range(1, 8):
        attempt.commit(step)
    attempt.checkpoints.tidy(20)
    read = commit.read_manifest
    monkeypatch.setattr(commit, "read_manifest", lambda store, place: looked.append(place.step) or read(store, place))
    commit.retain(attempt.store, Place(7, 1), "f1", Retention(2, 1), set(), set(), fence=lambda: None)
    assert looked == [7, 6]
    assert len(folders(tmp_path)) == 7


def test_a_deletion_that_fails_is_told_and_done_after_the_next_save(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, keep=2).commit(1).commit(2)

    def fail(line: str) -> None:
        if line.startswith("delete") and line.endswith(".safetensors"):
            raise StoreError("no deletions today")

    attempt.store.fail = fail
    attempt.commit(3)
    until(lambda: "checkpoint not deleted" in attempt.names())
    assert "step-000000001-a1: not deleted" in attempt.line("checkpoint not deleted")
    assert Attempt(tmp_path, 2).found_step() == 3
    attempt.store.fail = lambda line: None
    attempt.commit(4)
    until(lambda: folders(tmp_path) == ["step-000000003-a1", "step-000000004-a1"])


def test_an_abandoned_upload_of_an_earlier_attempt_is_removed_and_one_of_a_later_attempt_is_not(tmp_path: Path) -> None:
    root = tmp_path / "store/checkpoints"
    for name in ("step-000000009-a1", "step-000000009-a3", "somebody-elses"):
        (root / name).mkdir(parents=True)
        (root / name / "rank-0.safetensors").write_bytes(b"half of")
    attempt = Attempt(tmp_path, 2)
    assert attempt.found_step() is None
    attempt.commit(1)
    until(lambda: folders(tmp_path) == ["somebody-elses", "step-000000001-a2", "step-000000009-a3"])


def test_a_key_that_may_not_list_unfinished_uploads_costs_a_line_and_not_the_start(tmp_path: Path) -> None:
    Attempt(tmp_path).commit(1)
    attempt = Attempt(tmp_path, 2)

    def deny(line: str) -> None:
        if line.startswith("abandon"):
            raise Denied("s3://runs/checkpoints: access denied")

    attempt.store.fail = deny
    assert attempt.found_step() == 1
    assert "access denied" in attempt.line("uploads not freed")


def test_damaged_newer_checkpoints_do_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    Attempt(tmp_path, keep=9).commit(10).commit(20).commit(30)
    for step in (20, 30):
        flip(tmp_path / f"store/checkpoints/step-0000000{step}-a1/rank-0.safetensors")
    attempt = Attempt(tmp_path, 2, keep=2)
    assert attempt.found_step() == 10
    attempt.commit(15).commit(16)
    until(lambda: folders(tmp_path)[:2] == ["step-000000015-a2", "step-000000016-a2"])
    assert folders(tmp_path)[2:] == ["step-000000020-a1", "step-000000030-a1"]  # for a later look at them
    again = Attempt(tmp_path, 3, keep=2)
    assert again.found_step() == 16
    again.commit(31)
    last = Attempt(tmp_path, 4, keep=2)
    assert last.found_step() == 31
    last.commit(32)
    until(lambda: folders(tmp_path) == ["step-000000031-a3", "step-000000032-a4"])


def test_checkpoints_that_one_start_finds_damaged_and_the_next_one_whole_are_not_lost(tmp_path: Path) -> None:
    Attempt(tmp_path, keep=9).commit(100).commit(200).commit(300)
    spoilt = Attempt(tmp_path, 2)
    spoilt.store.arrived = flip
    assert spoilt.found_step() is None
    spoilt.store.arrived = lambda local: None
    spoilt.commit(10).commit(11).commit(12)
    assert same(Attempt(tmp_path, 3).loaded(), numbered(300))


def test_a_disk_without_room_for_a_checkpoint_is_named_and_may_be_another_nodes_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Attempt(tmp_path).commit(1)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(
        NoRoom, match=r"fetched-a2/step-000000001-a1: has 0\.0 GB free, and checkpoints/.* takes"
    ) as error:
        Attempt(tmp_path, 2).found_step()
    assert error.value.passing


def test_a_file_that_arrives_damaged_once_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    Attempt(tmp_path).commit(1).commit(2)
    attempt = Attempt(tmp_path, 2)
    first = iter([flip])
    attempt.store.arrived = lambda local: next(first, bool)(local)
    assert attempt.found_step() == 2
    assert attempt.events == []


class Superseded(UserError):
    exit_code = 3


def test_an_attempt_that_lost_the_run_writes_nothing_more_and_is_told_at_the_next_save_and_wait(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path).commit(1)

    def superseded() -> None:
        raise Superseded("attempt 2 owns the run")

    attempt.fence = superseded
    before = objects(tmp_path)
    attempt.checkpoints.save(2, numbered(2), {})
    with pytest.raises(Superseded):
        attempt.checkpoints.wait(30)
    with pytest.raises(Superseded):
        attempt.checkpoints.save(3, numbered(3), {})
    assert objects(tmp_path) == before


def test_two_attempts_at_one_step_do_not_touch_each_others_files(tmp_path: Path) -> None:
    zombie, owner = Attempt(tmp_path, 1, local=tmp_path / "node-1"), Attempt(tmp_path, 2, local=tmp_path / "node-2")
    zombie.commit(7, numbered(100))
    first = objects(tmp_path)
    owner.commit(7, numbered(200))
    both = objects(tmp_path)
    assert {name: data for name, data in both.items() if "-a1/" in name} == first
    for step in (8, 9, 10):  # what an older attempt does away with is its own
        zombie.commit(step)
    until(lambda: folders(tmp_path)[-2:] == ["step-000000009-a1", "step-000000010-a1"])
    until(lambda: "step-000000008-a1" not in folders(tmp_path))
    assert {n: d for n, d in objects(tmp_path).items() if "-a2/" in n} == {n: d for n, d in both.items() if "-a2/" in n}


def test_with_a_store_slower_than_the_saves_the_one_under_way_and_the_newest_are_completed(
    tmp_path: Path,
) -> None:
    attempt, go = Attempt(tmp_path, keep=9), threading.Event()
    attempt.fence = lambda: go.wait(30)
    for step in (1, 2, 3):
        attempt.checkpoints.save(step, numbered(step), {})
    go.set()
    attempt.checkpoints.wait(30)
    assert folders(tmp_path) == ["step-000000001-a1", "step-000000003-a1"]
    assert [fields["step"] for name, fields in attempt.events if name == "save dropped"] == [2]
    assert not list(attempt.local.rglob("*.safetensors"))  # nothing piles up on the node


def test_a_store_that_is_away_delays_a_save_without_stopping_training_and_the_next_save_takes_it_along(
    tmp_path: Path,
) -> None:
    attempt = Attempt(tmp_path)

    def away(line: str) -> None:
        raise Unavailable("no answer for 60 s")

    attempt.store.fail = away
    attempt.checkpoints.save(1, numbered(1), {})
    until(lambda: "save delayed" in attempt.names())
    assert str(attempt.local) in attempt.line("save delayed")
    with pytest.raises(UserError, match=r"step-000000001-a1: not committed after 0 s \(no answer for 60 s\).*local"):
        attempt.checkpoints.wait(0.2)
    attempt.store.fail = lambda line: None
    attempt.checkpoints.save(2, numbered(2), {})
    attempt.checkpoints.wait(30)
    assert [fields["step"] for name, fields in attempt.events if name == "committed"] == [1, 2]


@pytest.mark.slow
def test_the_last_save_waits_for_a_store_that_comes_back_though_an_older_one_rests_before_it(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    asked = []

    def away(line: str) -> None:
        asked.append(line)
        if len(asked) < 4:  # the first save's own try, and those after the next save and at the begin of the wait
            raise Unavailable("no answer for 60 s")

    attempt.store.fail = away
    attempt.checkpoints.save(1, numbered(1), {})
    until(lambda: "save delayed" in attempt.names())
    attempt.checkpoints.save(2, numbered(2), {})
    attempt.checkpoints.wait(30)
    assert [fields["step"] for name, fields in attempt.events if name == "committed"] == [1, 2]


@pytest.mark.parametrize("world_size", [8, 64])
def test_the_ranks_of_a_node_hardly_fetch_a_file_twice(world_size: int) -> None:
    """In rounds, in each of which a rank fetches the first of its files that no round before has brought."""
    files = list(range(world_size))
    orders, here, fetched = [order_for(rank, files) for rank in range(8)], set[int](), 0
    assert all(sorted(order) == files for order in orders)
    while len(here) < len(files):
        now = [next(file for file in order if file not in here) for order in orders]
        fetched += len(now)
        here.update(now)
    assert fetched <= 2.5 * len(files)


def test_a_store_that_refuses_writes_stops_the_run_at_the_next_save(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store/checkpoints").write_text("a file where the folder should be")
    attempt.checkpoints.save(1, numbered(1), {})
    until(lambda: "save failed" in attempt.names())
    with pytest.raises(StoreError, match="checkpoints"):
        attempt.checkpoints.save(2, numbered(2), {})


def test_a_local_disk_that_takes_nothing_costs_the_save_and_not_the_training(tmp_path: Path) -> None:
    (tmp_path / "local").write_text("a file where the folder should be")
    attempt = Attempt(tmp_path)
    attempt.checkpoints.save(1, numbered(1), {})
    until(lambda: "save failed" in attempt.names())
    (tmp_path / "local").unlink()
    attempt.commit(2)
    assert folders(tmp_path) == ["step-000000002-a1"]


def test_events_that_cannot_be_written_do_not_hold_up_the_saves(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)

    def full(name: str, **fields: Any) -> None:
        attempt.events.append((name, fields))
        raise OSError(28, "No space left on device")

    attempt.checkpoints._sender._event = full
    attempt.commit(1).commit(2)
    until(lambda: attempt.names() == ["saved", "committed"] * 2)


def cut_save(attempt: Attempt, writes: int, state: dict[str, Tensor], extra: dict[str, Any]) -> None:
    """Begin a save of step 2 whose sending ends for good after that many writes, as if the process were killed."""
    cut = threading.Event()
    calls = iter([False] * (writes + 1) + [True])

    def fence() -> None:  # called before the journals are sent and before each write
        if next(calls):
            cut.set()
            raise SystemExit  # ends the thread

    attempt.fence = fence
    attempt.checkpoints.save(2, state, extra)
    assert cut.wait(30)


def puts(attempt: Attempt) -> list[str]:
    return [line for line in attempt.store.log if line.startswith("put")]


silent_end = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@silent_end
@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("disk_survives", [True, False])
def test_a_save_cut_between_any_two_writes_is_completed_from_the_nodes_disk_or_the_older_one_is_found(
    tmp_path: Path, writes: int, disk_survives: bool
) -> None:
    attempt = Attempt(tmp_path).commit(1)
    done = len(puts(attempt))
    cut_save(attempt, writes, numbered(2), {"mark": 2})
    assert len(puts(attempt)) - done == writes
    later = Attempt(tmp_path, 2, local=None if disk_survives else tmp_path / "another disk")
    found = later.checkpoints.newest()
    assert found is not None
    completed = disk_survives or writes == 2  # with all parts in the store only the manifest was missing
    assert (found.step, found.extra) == ((2, {"mark": 2}) if completed else (1, {}))
    assert ("checkpoint completed" in later.names()) == completed
    assert same(later.loaded(), numbered(found.step))


@silent_end
@pytest.mark.parametrize("spoilt", ["refused", "damaged"])
def test_a_leftover_that_makes_no_checkpoint_does_not_hide_an_older_one_that_does(tmp_path: Path, spoilt: str) -> None:
    older, newer = Attempt(tmp_path, 1), Attempt(tmp_path, 2)
    cut_save(older, 0, numbered(2), {"of": 1})
    cut_save(newer, 0, numbered(2), {"of": 2})
    (leftover,) = tmp_path.glob("local/*/step-000000002-a2/rank-0/rank-0.json")
    if spoilt == "damaged":
        flip(leftover.with_name("rank-0.safetensors"))
    else:
        leftover.write_bytes(replace(Part.decode(leftover.read_bytes()), refused="no room").encode())
    later = Attempt(tmp_path, 3)
    found = later.checkpoints.newest()
    assert found is not None
    assert (found.attempt, found.extra) == (1, {"of": 1})
    assert not [*later.local.rglob("step-000000002-a*/rank-0")]


@silent_end
def test_a_damaged_leftover_is_not_sent(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path).commit(1)
    cut_save(attempt, 0, numbered(2), {})
    (leftover,) = attempt.local.rglob("rank-0.safetensors")
    flip(leftover)
    later = Attempt(tmp_path, 2)
    assert later.found_step() == 1
    assert "has sha256" in later.line("leftover damaged")
    assert not leftover.exists()


@silent_end
def test_of_two_whole_leftovers_the_newer_one_is_completed_alone(tmp_path: Path) -> None:
    for number in (1, 2):
        cut_save(Attempt(tmp_path, number), 0, numbered(2), {"of": number})
    later = Attempt(tmp_path, 3)
    found = later.checkpoints.newest()
    assert found is not None
    assert found.extra == {"of": 2}
    assert not [line for line in puts(later) if "step-000000002-a1" in line]


@silent_end
def test_a_leftover_below_a_damaged_checkpoint_of_an_earlier_attempt_is_completed(tmp_path: Path) -> None:
    Attempt(tmp_path, 1).commit(1).commit(3)
    flip(tmp_path / "store" / "checkpoints" / "step-000000003-a1" / "rank-0.safetensors")
    second = Attempt(tmp_path, 2)
    assert second.found_step() == 1  # so it saves below the damaged one
    cut_save(second, 0, numbered(2), {"of": 2})
    found = Attempt(tmp_path, 3).checkpoints.newest()
    assert found is not None
    assert (found.step, found.extra) == (2, {"of": 2})


@silent_end
def test_a_part_that_the_store_has_is_not_sent_again(tmp_path: Path) -> None:
    cut_save(Attempt(tmp_path), 2, numbered(2), {})
    later = Attempt(tmp_path, 2)
    assert later.found_step() == 2
    assert puts(later) == ["put checkpoints/step-000000002-a1/MANIFEST.json"]


@silent_end
@pytest.mark.parametrize("writes", [0, 2])
def test_what_another_config_left_is_not_completed(tmp_path: Path, writes: int) -> None:
    cut_save(Attempt(tmp_path, fingerprint="another"), writes, numbered(2), {})
    later = Attempt(tmp_path, 2)
    assert later.found_step() is None
    assert puts(later) == []


@silent_end
def test_a_leftover_of_one_of_two_ranks_is_no_checkpoint(tmp_path: Path) -> None:
    cut_save(Attempt(tmp_path), 0, numbered(2), {})
    (part,) = tmp_path.glob("local/**/rank-0.json")
    part.write_bytes(replace(Part.decode(part.read_bytes()), world_size=2).encode())
    later = Attempt(tmp_path, 2)
    assert later.found_step() is None
    assert puts(later) == []


@silent_end
def test_a_start_that_a_later_one_has_overtaken_leaves_what_that_one_saves_alone(tmp_path: Path) -> None:
    cut_save(Attempt(tmp_path, 2), 0, numbered(2), {})
    overtaken = Attempt(tmp_path, 1)
    assert overtaken.found_step() is None
    assert puts(overtaken) == []
    assert [*tmp_path.glob("local/**/step-000000002-a2/rank-0/rank-0.json")]


def test_a_manifest_is_put_once_and_again_only_as_it_is(tmp_path: Path) -> None:
    store, place = Store(f"file://{tmp_path}"), Place(1, 1)
    first, other = (Part(0, 1, "f", (), extra={"mark": mark}) for mark in (1, 2))
    manifest = commit.put_manifest(store, place, [first], lambda: None)
    assert commit.put_manifest(store, place, [first], lambda: None) == manifest
    with pytest.raises(AlreadyExists):
        commit.put_manifest(store, place, [other], lambda: None)
    assert commit.read_manifest(store, place) == manifest


def test_ranks_make_their_folders_while_another_one_removes_the_empty_parent(tmp_path: Path) -> None:
    save, over = tmp_path / "step-000000001-a1", threading.Event()

    def remove_again_and_again() -> None:
        while not over.is_set():
            sender._remove(save / "rank-2")

    def make_again_and_again(mine: Path) -> None:
        for _ in range(200):
            sender._make(mine)
            assert mine.is_dir()
            mine.rmdir()

    with ThreadPoolExecutor(3) as threads:
        threads.submit(remove_again_and_again)
        makers = [threads.submit(make_again_and_again, save / f"rank-{rank}") for rank in range(2)]
        try:
            assert [maker.result() for maker in makers] == [None, None]
        finally:
            over.set()


LANES = 4


def with_lanes(lanes: Iterable[int]) -> dict[str, Tensor]:
    """Replicated tensors of several sizes, and a tensor of its own for each lane."""
    shared = {f"model.{i}": torch.arange(100.0 * (i + 1)) + i for i in range(6)}
    return shared | {f"queue.lane-{lane:03d}": torch.full((5, 2), float(lane)) for lane in lanes}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def test_each_tensor_is_dealt_to_one_rank_and_all_ranks_write_about_as_much() -> None:
    state = with_lanes(range(0)) | {f"optim.{i}": torch.zeros(i % 7 * 50) for i in range(60)}
    own = [{f"queue.lane-{lane:03d}": torch.zeros(5, 2)} for lane in range(LANES)]
    dealt = [deal(state | own[rank], rank, LANES) for rank in range(LANES)]
    for names, lane in zip(dealt, own, strict=True):
        assert set(lane) <= set(names)
    assert sorted(name for names in dealt for name in names) == sorted(name for part in (state, *own) for name in part)
    sizes = [sum(state[name].nbytes for name in names if name in state) for names in dealt]
    assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in state.values())


def test_a_rank_of_512_knows_in_no_time_what_it_writes() -> None:
    state = {f"model.{i}": torch.empty(1000 + i, device="meta") for i in range(2000)}
    begun = time.process_time()
    names = deal(state, 511, 512)
    assert time.process_time() - begun < 0.5  # 3 ms here
    assert 1 <= len(names) <= 5


def one_bad_disk(rank: int, folder: Path) -> dict[str, str]:
    ranks = Ranks(rank, 2, dist.new_group(backend="gloo"))
    Attempt(folder, 1, ranks=ranks).commit(10, with_lanes([rank])).commit(20, with_lanes([rank]))
    later = Attempt(folder, 2, local=folder / f"node{rank}", ranks=ranks)
    found = later.checkpoints.newest()
    assert found is not None
    seen = {}
    if rank == 1:
        later.store.arrived = flip
    seen["loaded"] = message_of(lambda: later.checkpoints.load(found, zeros(with_lanes([rank]))))
    dist.barrier(ranks.group)
    third = Attempt(folder, 3, local=folder / f"node{rank}", ranks=ranks)
    if rank == 1:
        third.store.arrived = flip
    try:
        third.checkpoints.newest()
    except BadHost as error:
        seen["looked"], seen["hosts"] = str(error), ",".join(error.hosts)
    assert third.events == []
    return seen


@pytest.mark.slow
def test_a_node_on_which_whole_checkpoints_arrive_damaged_is_named_and_no_checkpoint_passed_over(
    tmp_path: Path,
) -> None:
    for seen in run(2, one_bad_disk, tmp_path):
        assert "bad host node1: checkpoints/step-000000020-a1: rank-" in seen["loaded"]
        assert seen["loaded"].endswith("the same file arrived whole before: look at its disk and memory")
        assert seen["looked"].startswith("bad host node1: checkpoints/step-000000020-a1: rank-1.safetensors has sha256")
        assert seen["looked"].endswith("the same file arrived whole on node0: look at its disk and memory")
        assert seen["hosts"] == "node1"


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """What a rank of two sees; asserted by the test."""
    own = range(rank * 2, rank * 2 + 2)
    ranks = Ranks(rank, 2, dist.new_group(backend="gloo"))
    seen: dict[str, Any] = {}

    one = Attempt(folder / "from one", 2, ranks=ranks)
    found = one.checkpoints.newest()
    assert found is not None
    state = zeros(with_lanes(own))
    one.checkpoints.load(found, state)
    seen["from one"] = same(state, with_lanes(own))

    both = Attempt(folder / "from two", 1, ranks=ranks)
    both.commit(10, with_lanes(own), note=f"rank {rank}")
    both.commit(20, with_lanes(own))
    seen["committed"] = both.checkpoints.committed_step
    missing = {"head.bias": torch.zeros(1)} if rank == 1 else {}
    found = both.checkpoints.newest()
    assert found is not None
    seen["missing"] = message_of(lambda: both.checkpoints.load(found, {**zeros(with_lanes(own)), **missing}))
    unwanted = zeros(with_lanes(range(2)))  # nobody takes the lanes 2 and 3
    seen["unwanted"] = message_of(lambda: both.checkpoints.load(found, unwanted))

    apart = {
        "shape": {"model.2": torch.zeros(3)},
        "type": {"model.2": torch.zeros(300).double()},
        "name": {"model.more": torch.zeros(300)},
        "lane": {"queue.lane-001": torch.zeros(5, 2)},
    }
    for what, odd in apart.items():
        other = with_lanes(own) | (odd if rank == 1 else {})
        seen[f"another {what}"] = message_of(lambda other=other: both.checkpoints.save(25, other, {}))

    bad = with_lanes(own)
    if rank == 1:
        bad["queue.lane-003"][0] = float("inf")
    both.checkpoints.save(30, bad, {})
    seen["refused"] = message_of(lambda: both.checkpoints.wait(5 if rank == 0 else 0.5))
    both.commit(40, with_lanes(own))

    dist.barrier(ranks.group)
    if rank == 0:
        flip(folder / "from two/store/checkpoints/step-000000040-a1/rank-1.safetensors")
    dist.barrier(ranks.group)
    later = Attempt(folder / "from two", 2, ranks=ranks)
    seen["after damage"] = (later.found_step(), later.names())

    cut = Attempt(folder / "cut", 1, local=folder / f"cut/node-{rank}", ranks=ranks)
    cut.commit(1, with_lanes(own))
    cut_save(cut, 0, with_lanes(own), {"mark": 2})
    dist.barrier(ranks.group)
    seen["completed"] = Attempt(folder / "cut", 2, local=folder / f"cut/node-{rank}", ranks=ranks).found_step()
    return seen


@pytest.mark.slow
def test_two_ranks_save_load_refuse_and_fall_back_as_one(tmp_path: Path) -> None:
    Attempt(tmp_path / "from one").commit(1, with_lanes(range(LANES)))
    views = run(2, two_ranks, tmp_path)
    for rank, seen in enumerate(views):
        assert seen["from one"], f"rank {rank} did not get its lanes from a checkpoint of one rank"
        assert seen["committed"] == 20
        assert "no tensor head.bias" in seen["missing"]
        assert "queue.lane-002" in seen["unwanted"]
        for what in ("shape", "type", "name"):
            assert "rank 1 has tensors of other names, shapes or types than rank 0" in seen[f"another {what}"], what
        assert "queue.lane-001 is there on two ranks" in seen["another lane"]
        assert seen["after damage"][0] == 20
        assert seen["completed"] == 2
    assert "rank 1" in views[0]["refused"]
    assert "queue.lane-003 holds a value that is not finite" in views[0]["refused"]
    assert views[0]["after damage"][1] == ["checkpoint damaged"]
    assert views[1]["after damage"][1] == []

    names = folders(tmp_path / "from two")
    assert "step-000000030-a1" not in names
    one = Attempt(tmp_path / "from two", 3)
    found = one.checkpoints.newest()
    assert found is not None
    assert (found.step, found.world_size, len(found.files)) == (20, 2, 2)
    sizes = [file.size for file in found.files]
    assert max(sizes) < 1.5 * min(sizes), "the replicated tensors are not shared out evenly"
    state = zeros(with_lanes(range(LANES)))
    one.checkpoints.load(found, state)
    assert same(state, with_lanes(range(LANES)))


def test_a_copy_is_of_its_moment_in_one_piece_of_memory_that_the_next_one_takes_again(tmp_path: Path) -> None:
    state = {
        "odd": torch.arange(7, dtype=torch.float32),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }
    host = HostCopy()
    first = host.take(state, state)
    assert all(torch.equal(first[name], tensor) for name, tensor in state.items())
    write(first, tmp_path / "first.safetensors")  # which refuses tensors that overlap
    assert len({tensor.untyped_storage().data_ptr() for tensor in first.values()}) == 1
    state["odd"] += 1
    assert first["odd"][0] == 0
    again = host.take(state, state)
    assert again["odd"][0] == 1
    assert [tensor.data_ptr() for tensor in again.values()] == [tensor.data_ptr() for tensor in first.values()]
    other = host.take({"odd": torch.zeros(9)}, ["odd"])
    assert other.keys() == {"odd"}
    assert other["odd"].shape == (9,)
