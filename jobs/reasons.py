"""Collects what is wrong, so that a user reads all of it at once and not one thing after another."""

from collections.abc import Callable
from typing import TypeVar

from data_shards.errors import UserError

T = TypeVar("T")


class Reasons:
    """Lines of refusal, in the order in which they were found."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def ask(self, check: Callable[[], T]) -> T | None:
        """What the check gives; None when it refuses, and its lines are kept."""
        try:
            return check()
        except UserError as error:
            self.add(error)
            return None

    def add(self, error: UserError) -> None:
        """Keep the lines of a refusal, each of them once."""
        self.lines += [line for line in str(error).splitlines() if line not in self.lines]

    def refuse(self) -> None:
        """Raise UserError with all lines, if there are any."""
        if self.lines:
            raise UserError("\n".join(self.lines))
