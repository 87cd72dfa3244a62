"""Scores in W&B, a row a step, in a run beside the training's own, to which its process may still be writing."""

from collections.abc import Callable
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from data_shards.errors import one_line
from data_shards.store import Store
from pipeline.evaluate.score import Score
from pipeline.monitor import MonitorSettings
from pipeline.run import read_record
from pipeline.wandb_client import end_service, open_client


def show(score: Score, run: Store, settings: MonitorSettings, folder: Path, said: Callable[[str], None]) -> bool:
    """Send a score; W&B's files go to folder/wandb. Returns whether it was: what keeps W&B from it is said.

    Its run is called <run>-evaluate and is of the training's group, one for each pair of sets and size of images.
    """
    record = read_record(run)
    if record is None or settings.wandb == "disabled":
        return False
    name, of_set = run.url.rsplit("/", 1)[-1], score.held_out_url.partition("://")[2].strip("/")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        client = open_client(
            settings.wandb,
            folder,
            said,
            id=f"{record.wandb_id}-evaluate-{_asked(score)}",
            name=f"{name}-evaluate",
            group=name,
            job_type="evaluate",
            project=settings.project,
            entity=settings.entity,
            config=asdict(score),
        )
        client.log({"step": score.step, **{f"{of_set}/{key}": right for key, right in score.right.items()}})
        client.finish()
        return True
    except Exception as error:  # noqa: BLE001 - the score is in the store, whatever befalls W&B
        said(f"{one_line(error)}; the score is in the run's folder")
        return False
    finally:
        end_service()


def _asked(score: Score) -> str:
    """What the scores of a curve have in common, in a few letters."""
    return blake2b(f"{score.bank_url} {score.held_out_url} {score.size}".encode(), digest_size=4).hexdigest()
