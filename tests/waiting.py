"""Waiting for what comes by itself: a poll with a deadline."""

from collections.abc import Callable

from jobs.daemons import wait_until


def until(condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    """Return as soon as it is so. Raises AssertionError when it is not by the deadline."""
    assert wait_until(lambda: bool(condition()), deadline_s, 0.01), f"not within {deadline_s:g} s"
