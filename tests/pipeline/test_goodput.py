from typing import Any

import pytest

from pipeline.goodput import End, goodput


def begins(attempt: int, time: float, step: int) -> dict[str, Any]:
    return {"attempt": attempt, "time": time, "event": "resumed" if step else "started", "step": step}


def rows(first: tuple[int, float], last: tuple[int, float], step_s: float = 1.0) -> tuple[End, End]:
    return End(*first, step_s), End(*last, step_s)


def test_a_run_that_never_began_has_no_goodput():
    assert goodput([{"time": 1.0, "event": "submitted"}], {}) is None


def test_an_undisturbed_run_loses_only_the_time_before_its_first_step():
    found = goodput([begins(1, 100.0, 0)], {1: rows((1, 121.0), (80, 200.0))})
    assert (found.restarts, found.lost_steps) == (0, 0)
    assert (found.productive_s, found.elapsed_s, found.share) == (80.0, 100.0, 0.8)


def test_steps_after_the_checkpoint_that_a_start_goes_on_from_are_lost():
    events = [begins(1, 0.0, 0), begins(2, 120.0, 60)]
    found = goodput(events, {1: rows((1, 11.0), (90, 100.0)), 2: rows((61, 131.0), (100, 170.0))})
    assert (found.restarts, found.lost_steps) == (1, 30)
    assert (found.productive_s, found.elapsed_s) == (60.0 + 40.0, 170.0)


def test_going_back_past_an_attempt_takes_back_all_of_it():
    events = [begins(1, 0.0, 0), begins(2, 200.0, 80), begins(3, 400.0, 60)]
    ends = {1: rows((1, 1.0), (100, 100.0)), 2: rows((81, 201.0), (150, 270.0)), 3: rows((61, 401.0), (160, 500.0))}
    found = goodput(events, ends)
    assert found.lost_steps == 40 + 70
    assert found.productive_s == pytest.approx(60 + 0 + 100)


def test_a_start_without_a_step_costs_its_time_only_and_a_single_step_counts_by_its_own():
    events = [begins(1, 0.0, 0), begins(2, 50.0, 0), begins(3, 90.0, 0)]
    found = goodput(events, {3: rows((1, 100.0), (1, 100.0), step_s=2.0)}, until=110.0)
    assert (found.restarts, found.lost_steps, found.productive_s, found.elapsed_s) == (2, 0, 2.0, 110.0)
