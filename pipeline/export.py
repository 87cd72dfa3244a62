"""The trunk of a run as a folder that timm and the Hugging Face Hub read.

    model.safetensors     the trunk, fp32, under timm's names; no head: SwAV's prototypes serve its training only
    config.json           put last: timm's architecture, the pixels' mean and std, and whose checkpoint it is

`timm.create_model("local-dir:<folder>", pretrained=True, num_classes=0)` gives the features that the run's own trunk
gives, `features_only=True` its maps.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline import snapshot
from pipeline.augment import AugmentSettings
from pipeline.pretrained import IN_FOLDER
from pipeline.regnet import ModelSettings
from pipeline.run import read_config, read_record
from pipeline.weights import trained_trunk

UNKNOWN_TO_TIMM = ("custom", "regnety_10b")
TIMM_STAGES = 4
UNFINISHED = "export-is-not-finished"  # an object that is there until all others are
BASE = "regnety_002"  # of which those are variants, with numbers of their own


@dataclass(frozen=True)
class Exported:
    """url: of the folder; run: of the run's; parameters: of the trunk; width: channels of its features."""

    url: str
    run: str
    step: int
    architecture: str
    parameters: int
    width: int

    def lines(self) -> list[str]:
        folder = self.url.removeprefix("file://")
        return [
            f"{self.url}: {self.architecture} of step {self.step:,}, {self.parameters:,} parameters, "
            f"features of {self.width:,} channels",
            f'timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0)',
        ]


def export_run(store: Store, target: Store, step: int | None = None) -> Exported:
    """Write the trunk of the newest whole checkpoint, or of that of a step, to the folder `target`.

    store: the run's folder. Raises UserError when there is no such checkpoint, when timm has no such trunk, and when
    the target holds something else.
    """
    config, record = read_config(store), read_record(store)
    if (stages := len(config.model.shape().stages())) != TIMM_STAGES:
        raise UserError(f"{store.url}: its trunk has {stages} stages, and timm builds only those of {TIMM_STAGES}")
    trunk, place = trained_trunk(store, config, step)
    origin = {"run": store.url, "step": place.step, "attempt": place.attempt}
    described = describe(config.model, config.augment, trunk.width)
    described["farseer"] = origin | {"fingerprint": record.fingerprint if record else None}
    _refuse_another(target, described)
    target.put(UNFINISHED, b"")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / IN_FOLDER
        snapshot.write(dict(trunk.state_dict()), file)
        target.upload(file, IN_FOLDER)
    target.put("config.json", json.dumps(described, indent=2).encode())
    target.delete([UNFINISHED])
    parameters = sum(parameter.numel() for parameter in trunk.parameters())
    return Exported(target.url, store.url, place.step, config.model.trunk, parameters, trunk.width)


def describe(model: ModelSettings, augment: AugmentSettings, width: int) -> dict[str, Any]:
    """The config.json of a trunk, in timm's form. Images are evaluated at the size of the largest crops."""
    size = max(crop.size for crop in augment.crops)
    unknown = model.trunk in UNKNOWN_TO_TIMM
    return {
        "architecture": BASE if unknown else model.trunk,
        "num_classes": 0,
        "num_features": width,
        **({"model_args": _numbers(model)} if unknown else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "mean": list(augment.mean),
            "std": list(augment.std),
            "num_classes": 0,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        },
    }


def _numbers(model: ModelSettings) -> dict[str, Any]:
    """The shape under the names of timm's arguments."""
    names = {"w_0": "w0", "w_a": "wa", "w_m": "wm", "group_width": "group_size"}
    return {names.get(name, name): value for name, value in asdict(model.shape()).items()}


def _refuse_another(target: Store, described: dict[str, Any]) -> None:
    """Nothing is written over but the same export, whole or cut off."""
    names = {entry.path for entry in target.list()}
    try:
        same = "config.json" in names and json.loads(target.get("config.json")) == described
    except ValueError:
        same = False
    cut_off = UNFINISHED in names and not names - {UNFINISHED, IN_FOLDER}
    if names and not same and not cut_off:
        raise UserError(f"{target.url}: holds something else already; choose another TO=, or delete it first")
