"""A rank's life with a store that is a folder: on this machine's CPU, and on its GPU where there is one."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.trainer.states import TrainerStatus

from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from pipeline.config import Config
from pipeline.journal import read_metrics
from pipeline.module import SwAV
from pipeline.signals import StopRequest
from pipeline.train import Launch, Session
from tests.photos import write_tiles
from tests.pipeline import distributed
from tests.real import ranks

STEPS = 12
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("set")
    pack(write_tiles(folder / "photos", 96), Store(f"file://{folder}/shards"), PackSettings(shard_bytes=150_000))
    return f"file://{folder}/shards"


def config(tiles: str, folder: Path, **efficiency: Any) -> dict[str, Any]:
    crops = [{"size": 32, "count": 2, "scale": [0.3, 1.0]}, {"size": 16, "count": 2, "scale": [0.1, 0.3]}]
    return {
        "store": f"file://{folder}/runs",
        "data": {"url": tiles, "batch": 16, "lanes": 2, "chunk_samples": 8, "window_chunks": 4},
        "augment": {"crops": crops},
        "model": {"trunk": "custom", "w_0": 16, "w_a": 16, "w_m": 2.0, "depth": 2, "group_width": 8, "stem_width": 8},
        "swav": {"prototypes": 24, "head": [32, 16], "freeze_prototypes_steps": 3},
        "optim": {"lr": 10.0, "warmup_steps": 4},
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 5},
        "monitor": {"wandb": "disabled"},
        "efficiency": efficiency,
    }


def statuses_at_saves(rank: int, values: dict[str, Any], folder: str) -> list[str]:
    """What Lightning is about whenever the state is asked for, in a run that ends between two checkpoints."""
    seen, state = [], SwAV.state

    def watched(module: SwAV) -> dict[str, torch.Tensor]:
        seen.append(str(module.trainer.state.status.value))
        return state(module)

    SwAV.state = watched  # type: ignore[method-assign]
    launch = Launch(folder, f"{values['store']}/first", 0, 0, 1, 1, "127.0.0.1", 0)
    session = Session(Config.model_validate(values), launch, StopRequest())
    with closing(session.watchdog):
        assert session.train() == "finished"
    return seen


def test_every_save_is_made_while_lightning_holds_the_weights_on_their_device(tiles: str, tmp_path: Path) -> None:
    """After its end they are on the host, where NCCL reaches none of them."""
    values = config(tiles, tmp_path)
    (seen,) = distributed.run(1, statuses_at_saves, values, str(tmp_path / "first"))
    assert seen == [TrainerStatus.RUNNING.value] * 3  # steps 5, 10 and 12
    assert len(Store(f"{values['store']}/first").list("checkpoints/step-000000012-a1")) > 2


def rows(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row["result"] for row in read_metrics(Store(f"{values['store']}/{name}"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "fp32"), *(pytest.param("cuda", p, marks=needs_gpu) for p in ("fp32", "bf16"))]
)
def test_a_run_that_was_killed_goes_on_with_the_same_crops(
    tiles: str, tmp_path: Path, device: str, precision: str
) -> None:
    values = config(tiles, tmp_path)
    values["train"]["precision"] = precision
    for name, kill in (("straight", False), ("killed", True)):
        started = ranks.start(values, tmp_path / name, 1, gpus=device == "cuda")
        if kill:
            manifest = tmp_path / "runs" / name / "checkpoints" / "step-000000005-a1" / "MANIFEST.json"
            started.wait_until(manifest.exists)
            started.kill()
            started = ranks.start(values, tmp_path / name, 1, gpus=device == "cuda")
        assert started.wait() == [0], started.tails()
    straight, killed = rows(values, "straight"), rows(values, "killed")
    assert [row["step"] for row in straight] == [row["step"] for row in killed] == list(range(1, STEPS + 1))
    for key in ("batch_hash", "crop_hash"):
        assert [row[key] for row in straight] == [row[key] for row in killed]
    losses = torch.tensor([[row["loss"] for row in run] for run in (straight, killed)])
    torch.testing.assert_close(losses[0], losses[1], rtol=0 if device == "cpu" else 0.02, atol=0)
