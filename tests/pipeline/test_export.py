"""Exports: the tensors and names that timm reads, whose they are, and what is never written over."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline.augment import AugmentSettings
from pipeline.checkpoint import Checkpointer, CheckpointSettings
from pipeline.commit import Place
from pipeline.config import Config
from pipeline.export import UNFINISHED, describe, export_run
from pipeline.ranks import Ranks
from pipeline.regnet import TRUNKS, ModelSettings, RegNet
from tests.pipeline.test_regnet import import_timm

TINY = {"trunk": "custom", "w_0": 16, "w_a": 16, "w_m": 2.0, "depth": 8, "group_width": 8, "stem_width": 16}
MEAN = [0.5, 0.4, 0.3]


def a_run(folder: Path, *steps: int, model: dict[str, Any] = TINY) -> tuple[Store, dict[int, RegNet]]:
    """A run's folder with a checkpoint at each of the steps, and the trunk that is in each."""
    store = Store(f"file://{folder}/runs/first")
    config = Config.model_validate(
        {
            "data": {"url": f"file://{folder}/set", "batch": 8, "lanes": 2},
            "augment": {"mean": MEAN},
            "model": model,
            "train": {"steps": 9},
        }
    )
    store.put("config.yaml", yaml.safe_dump(config.dump()).encode())
    checkpoints = Checkpointer(
        store, folder / "local", attempt=1, fingerprint="f", ranks=Ranks(0, 1, None), host="node1",
        settings=CheckpointSettings(keep=9), fence=lambda: None, event=lambda name, **fields: None,
        before_commit=lambda: None,
    )  # fmt: skip
    trunks = {}
    for step in steps:
        torch.manual_seed(step)
        trunks[step] = RegNet(config.model)
        state: dict[str, Tensor] = {f"model.trunk.{name}": tensor for name, tensor in trunks[step].state_dict().items()}
        checkpoints.save(step, {**state, "model.prototypes.weight": torch.ones(3, 4)}, {})
        checkpoints.wait(30)
    return store, trunks


def damage(store: Store, step: int) -> None:
    """Turn a bit of the tensors of the checkpoint that `a_run` has put there."""
    (path,) = [entry.path for entry in store.list(Place(step, 1).path) if entry.path.endswith("safetensors")]
    data = bytearray(store.get(path))
    data[-1] ^= 1
    store.put(path, bytes(data))


def exported(target: Store) -> dict[str, Tensor]:
    return load_file(Path(target.url.removeprefix("file://")) / "model.safetensors")


def test_the_newest_trunk_is_exported_alone_and_whose_it_is_stands_beside_it(tmp_path: Path) -> None:
    store, trunks = a_run(tmp_path, 3, 6)
    target = Store(f"file://{tmp_path}/to")
    found = export_run(store, target)
    tensors, expected = exported(target), trunks[6].state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    config = json.loads(target.get("config.json"))
    assert config["farseer"] == {"run": store.url, "step": 6, "attempt": 1, "fingerprint": None}
    assert config["pretrained_cfg"]["mean"] == MEAN
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    assert config["num_features"] == trunks[6].width == found.width
    assert found.parameters == sum(parameter.numel() for parameter in trunks[6].parameters())
    assert f"local-dir:{tmp_path}/to" in found.lines()[1]


def test_a_step_may_be_named_and_those_that_there_are_are_told(tmp_path: Path) -> None:
    store, trunks = a_run(tmp_path, 3, 6)
    assert export_run(store, Store(f"file://{tmp_path}/to"), step=3).step == 3
    assert torch.equal(exported(Store(f"file://{tmp_path}/to"))["stem.conv.weight"], trunks[3].stem.conv.weight)
    with pytest.raises(UserError, match="no checkpoint of step 4; there are 3, 6"):
        export_run(store, Store(f"file://{tmp_path}/to"), step=4)


def test_a_damaged_checkpoint_is_passed_over_unless_it_is_the_one_asked_for(tmp_path: Path) -> None:
    store, _ = a_run(tmp_path, 3, 6)
    damage(store, 6)
    assert export_run(store, Store(f"file://{tmp_path}/to")).step == 3
    with pytest.raises(UserError, match="the checkpoint of step 6 is damaged; STEP= takes another: 3"):
        export_run(store, Store(f"file://{tmp_path}/to"), step=6)


def test_the_same_export_may_be_repeated_and_another_folder_is_never_written_over(tmp_path: Path) -> None:
    store, _ = a_run(tmp_path, 3, 6)
    target = Store(f"file://{tmp_path}/to")
    export_run(store, target, step=3)
    first = target.get("config.json")
    export_run(store, target, step=3)
    target.delete(["config.json"])  # as a killed export leaves it
    target.put(UNFINISHED, b"")
    export_run(store, target, step=3)
    assert target.get("config.json") == first
    assert sorted(entry.path for entry in target.list()) == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match="holds something else already; choose another TO="):
        export_run(store, target, step=6)
    downloaded = Store(f"file://{tmp_path}/downloaded")
    downloaded.put("model.safetensors", b"somebody else's")
    with pytest.raises(UserError, match="holds something else"):
        export_run(store, downloaded)
    assert downloaded.get("model.safetensors") == b"somebody else's"
    other = Store(f"file://{tmp_path}/other")
    other.put("config.json", b"not json")
    with pytest.raises(UserError, match="holds something else"):
        export_run(store, other)
    assert target.get("config.json") == first
    assert [entry.path for entry in other.list()] == ["config.json"]


def test_a_run_without_a_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store, _ = a_run(tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        export_run(store, Store(f"file://{tmp_path}/to"))
    assert not (tmp_path / "to").exists()


def test_trunks_that_timm_does_not_know_are_told_by_its_arguments() -> None:
    augment = AugmentSettings()
    known = describe(ModelSettings(trunk="regnety_160"), augment, 3024)
    assert (known["architecture"], "model_args" in known) == ("regnety_160", False)
    custom = describe(ModelSettings(**TINY), augment, 16)
    assert custom["architecture"] == "regnety_002"
    assert custom["model_args"] == {
        "w0": 16, "wa": 16.0, "wm": 2.0, "depth": 8, "group_size": 8, "stem_width": 16, "se_ratio": 0.25,
    }  # fmt: skip


def test_a_trunk_that_timm_cannot_build_is_refused(tmp_path: Path) -> None:
    store, _ = a_run(tmp_path, model=TINY | {"depth": 2})
    with pytest.raises(UserError, match="has 2 stages, and timm builds only those of 4"):
        export_run(store, Store(f"file://{tmp_path}/to"))


@pytest.mark.slow
def test_timm_makes_of_an_export_the_features_of_the_run(tmp_path: Path) -> None:
    timm = import_timm()
    for model in (TINY, {"trunk": "regnety_002"}):
        folder = tmp_path / str(model["trunk"])
        store, trunks = a_run(folder, 1, model=model)
        export_run(store, Store(f"file://{folder}/to"))
        twin = timm.create_model(f"local-dir:{folder}/to", pretrained=True, num_classes=0).eval()
        assert list(timm.data.resolve_model_data_config(twin)["mean"]) == MEAN
        images = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(twin(images), trunks[1].eval()(images), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_timm_builds_every_trunk_with_the_shapes_that_it_has_here() -> None:
    timm = import_timm()
    augment = AugmentSettings()
    for name in TRUNKS:
        with torch.device("meta"):
            ours = RegNet(ModelSettings(trunk=name))
            told = describe(ModelSettings(trunk=name), augment, ours.width)
            theirs = timm.create_model(told["architecture"], num_classes=0, **told.get("model_args", {}))
        shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}, name
        assert told["num_features"] == theirs.num_features
