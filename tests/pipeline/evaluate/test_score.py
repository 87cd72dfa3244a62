"""Scores as they lie in a run's folder."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from data_shards.store import Store
from pipeline.evaluate.score import TITLES, Score, read_scores, score_path

ONE = Score("s3://runs/a", 5, "s3://bank", "s3://asked", 224, 10, 5, 2, 1e-4, dict.fromkeys(TITLES, 0.5))


def test_scores_are_read_in_the_order_of_steps_of_one_exam_or_of_all(tmp_path: Path) -> None:
    run = Store(f"file://{tmp_path}")
    assert read_scores(run) == []
    for step, exam in ((1000, "aa"), (20, "aa"), (20, "bb")):
        run.put(score_path(f"{step:09d}", exam), json.dumps(asdict(replace(ONE, step=step))).encode())
    for other in ("report.json", "score-aa.shown", "features-x/about.json"):
        run.put(f"eval/step-000000020/{other}", b"{")
    assert [one.step for one in read_scores(run, "aa")] == [20, 1000]
    assert [one.step for one in read_scores(run)] == [20, 20, 1000]
    assert read_scores(run, "bb") == [replace(ONE, step=20)]
