"""How whoever waits is told how far something is."""

from typing import Protocol


class Progress(Protocol):
    """Called often, from one thread: what is counted, how many are done, of how many (0: not known yet).

    bytes, refused: of those done since the first call, where it makes sense.
    """

    def __call__(self, what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None: ...


def quiet(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
    """Nobody is told."""
