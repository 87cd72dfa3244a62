"""The progress of a run on a terminal and elsewhere, and lines beside it."""

import io
import json
from pathlib import Path

import pytest

from jobs.progress import CLEAR, Progress
from tests.jobs.test_pack_verb import Terminal


def write_rows(run_dir: Path, last: int) -> None:
    folder = run_dir / "a01"
    folder.mkdir(exist_ok=True)
    run = {"step_s": 0.5, "wait_s": 0.1, "images_s": 32.0}
    rows = [{"result": {"step": step, "loss": 5.0}, "run": run} for step in range(1, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_told_beside_the_progress_has_lines_of_its_own(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    progress = Progress(tmp_path, steps=120, prototypes=300)
    assert progress.show() == 0
    for last in (10, 49, 60, 70):
        write_rows(tmp_path, last)
        assert progress.show() == last
    progress.tell("preempted")
    lines = [line.rpartition(CLEAR)[2] for line in out.getvalue().split("\n")]
    shown = "  step 60/120  loss 5.000 (ln K 5.704)  32 images/s  data wait 20%  0:30 left"
    assert lines == (["  preempted", ""] if terminal else [shown, "  preempted", ""])
