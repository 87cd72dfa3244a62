"""Scores in W&B, a row a step, in a run beside the training's own, to which its process may still be writing."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from data_shards.store import Store
from pipeline.evaluate.exam import Score
from pipeline.monitor import MonitorSettings
from pipeline.run import read_record
from pipeline.wandb_client import end_service, one_line, open_client


def show(score: Score, run: Store, settings: MonitorSettings, folder: Path, said: Callable[[str], None]) -> None:
    """Send a score; W&B's files go to folder/wandb. What keeps W&B from it is said, and no error.

    Its run is called <run>-evaluate and is of the training's group; its figures, by the held-out set.
    """
    record = read_record(run)
    if record is None or settings.wandb == "disabled":
        return
    name, of_set = run.url.rsplit("/", 1)[-1], score.held_out_url.partition("://")[2].strip("/")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        client = open_client(
            settings.wandb,
            folder,
            said,
            id=f"{record.wandb_id}-evaluate",
            name=f"{name}-evaluate",
            group=name,
            job_type="evaluate",
            project=settings.project,
            entity=settings.entity,
            config=asdict(score),
        )
        client.log({"step": score.step, **{f"{of_set}/{key}": right for key, right in score.right.items()}})
        client.finish()
    except Exception as error:  # noqa: BLE001 - the score is in the store, whatever befalls W&B
        said(f"{one_line(error)}; the score is in the run's folder")
    finally:
        end_service()
