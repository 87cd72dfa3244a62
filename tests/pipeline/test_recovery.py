import json
from pathlib import Path

from pipeline.monitor import Recovery


def attempt(folder: Path, number: int, *rows: tuple[int, float]) -> None:
    """Rows (step, time) as an attempt left them; the last line is one that was cut."""
    lines = [{"result": {"step": step}, "run": {"time": time}} for step, time in rows]
    path = folder / f"a{number:02d}" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"result": {"st')


def test_the_first_new_step_tells_once_how_long_it_took_and_what_was_done_again(tmp_path: Path) -> None:
    attempt(tmp_path, 1, (1, 10.0), (9, 90.0))
    attempt(tmp_path, 2, (6, 110.0))  # it died before it had done anything new
    recovery = Recovery(tmp_path, 3, 5)
    assert [recovery.step(step, 120.0 + step) for step in range(6, 10)] == [None] * 4
    assert recovery.step(10, 130.0) == {"step": 10, "seconds": 20.0, "redone": 4}
    assert recovery.step(11, 131.0) is None


def test_after_a_save_at_the_signal_nothing_is_done_again(tmp_path: Path) -> None:
    attempt(tmp_path, 1, (9, 90.0))
    assert Recovery(tmp_path, 2, 9).step(10, 100.5) == {"step": 10, "seconds": 10.5, "redone": 0}


def test_a_first_start_and_one_that_knows_of_no_earlier_tell_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 1, (9, 90.0))
    assert Recovery(tmp_path, 1, 0).step(1, 100.0) is None
    assert Recovery(tmp_path / "elsewhere", 2, 9).step(10, 100.0) is None
