"""A disk of this machine that is full: the user's to mend, so it is told in a line, whatever ran into it."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator

from data_shards.errors import UserError


@contextlib.contextmanager
def told_when_full() -> Iterator[None]:
    """For what writes temporary files. Raises UserError in the place of the system's error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = tempfile.gettempdir()
        raise UserError(
            f"{folder}: {error.strerror}; TMPDIR=... takes another disk, the same command goes on"
        ) from error
