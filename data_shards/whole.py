"""Files that appear whole or not at all: written beside their place, then renamed to it."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

HIDDEN = ".part-"  # how the names begin of what is not whole yet
PRIVATE = 0o600  # the mode of a file that its owner alone reads


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name in the same folder, of which nothing is left afterwards."""
    aside = path.with_name(f"{HIDDEN}{secrets.token_hex(6)}")
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes, mode: int = 0o666) -> None:
    """Write a file, and its folder if need be: who reads meanwhile finds the older file or the new one.

    mode: who may read and write it, less the umask. Raises OSError; the older file then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as aside:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        aside.replace(path)
