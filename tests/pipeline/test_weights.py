"""What FROM= may name, and what is asked of it before a run is submitted."""

import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline import commit
from pipeline.commit import Place
from pipeline.config import Config
from pipeline.regnet import RegNet
from pipeline.run import read_config
from pipeline.weights import check_origin, fill, parse, point, trained_trunk
from tests.pipeline.test_export import a_run, damage


def config(start_from: str, trunk: str = "regnety_002") -> Config:
    train = {"steps": 9, "start_from": start_from}
    return Config.model_validate(
        {"data": {"url": "s3://set", "batch": 8, "lanes": 2}, "model": {"trunk": trunk}, "train": train}
    )


def test_a_checkpoints_url_is_read_and_any_other_is_none() -> None:
    assert parse("s3://runs/old/checkpoints/step-000001000-a1/") == ("s3://runs/old", Place(1000, 1))
    for other in ("s3://runs/old", "s3://runs/old/checkpoints/step-1000-a1", "/checkpoints/step-000001000-a1", "old"):
        assert parse(other) is None


def test_a_run_a_step_of_it_a_checkpoint_and_a_file_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = a_run(tmp_path, 3, 6)
    runs = Store(f"file://{tmp_path}/runs")
    monkeypatch.chdir(tmp_path)
    assert point(runs, "first") == f"{store.url}/checkpoints/step-000000006-a1"
    assert point(runs, "first@3") == f"{store.url}/checkpoints/step-000000003-a1"
    assert point(runs, "s3://b/old/checkpoints/step-000001000-a1") == "s3://b/old/checkpoints/step-000001000-a1"
    assert point(runs, "seer.torch") == f"file://{tmp_path}/seer.torch"
    elsewhere = Store(f"file://{tmp_path}/others")
    assert point(elsewhere, f"{store.url}@3") == f"{store.url}/checkpoints/step-000000003-a1"
    with pytest.raises(
        UserError, match=r"^FROM=first@4: .* has no such checkpoint; there are: 3, 6; a run of another "
    ):
        point(runs, "first@4")


def test_what_a_run_would_begin_with_is_asked_for_before(tmp_path: Path) -> None:
    store, _ = a_run(tmp_path, 3)
    checkpoint = point(Store(f"file://{tmp_path}/runs"), "first")
    check_origin(config(checkpoint), 1)
    store.delete([f"{Place(3, 1).path}/{commit.MANIFEST}"])
    with pytest.raises(UserError, match=re.escape(f"{checkpoint}: MANIFEST.json is gone")):
        check_origin(config(checkpoint), 1)
    save_file(RegNet(config("").model).state_dict(), tmp_path / "trunk.safetensors")
    check_origin(config(f"file://{tmp_path}/trunk.safetensors"), 1)
    with pytest.raises(UserError, match=r"does not fit model\.trunk regnety_004: .* it is a regnety_002"):
        check_origin(config(f"file://{tmp_path}/trunk.safetensors", "regnety_004"), 1)
    torch.save({}, tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="it holds no RegNet"):
        check_origin(config(f"file://{tmp_path}/nothing.pt"), 1)


def test_a_disk_without_room_for_a_checkpoint_is_named_with_what_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = a_run(tmp_path, 3)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    told = rf"{tmp_path}/tmp: has 0\.0 GB free, .*step-000000003-a1 takes 0\.\d GB"
    with pytest.raises(UserError, match=rf"^{told}.* meanwhile; TMPDIR=\.\.\. is a folder elsewhere"):
        trained_trunk(store, read_config(store))
    with pytest.raises(UserError, match=rf"^{tmp_path}/beside: has .* meanwhile; make room there$"):
        fill(store, Place(3, 1), {}, tmp_path / "beside")


def test_the_trunk_of_a_run_is_that_of_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    store, trunks = a_run(tmp_path, 3, 6)
    damage(store, 6)
    trunk, place = trained_trunk(store, read_config(store))
    assert place == Place(3, 1)
    assert torch.equal(trunk.stem.conv.weight, trunks[3].stem.conv.weight)
    with pytest.raises(commit.Damaged, match=r"the checkpoint of step 6 is damaged; STEP= takes another: 3$"):
        trained_trunk(store, read_config(store), step=6)
    damage(store, 3)
    with pytest.raises(UserError, match=r"^file://.*/runs/first: no checkpoint is whole; there are those of 3, 6$"):
        trained_trunk(store, read_config(store))


def test_a_checkpoint_of_another_network_is_refused_by_the_name_of_what_differs(tmp_path: Path) -> None:
    store, _ = a_run(tmp_path, 3)
    with pytest.raises(UserError, match=r"step-000000003-a1: .*model\.trunk\..*; use it with the program and config"):
        trained_trunk(store, config("x"))
