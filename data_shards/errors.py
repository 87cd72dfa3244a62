"""What a user can mend: one line that says where, what was found, what is right and what to type."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """An error whose message is enough for the user; the program prints that line alone and leaves with `exit_code`."""

    exit_code = 2
    passing = False  # nobody did anything wrong: asking again later may help


class BadHost(UserError):
    """That host cannot do its part; another one may."""

    passing = True

    def __init__(self, host: str, what: str) -> None:
        super().__init__(f"bad host {host}: {what}")
        self.hosts = (host,)


CODE_ERRORS = (AttributeError, ImportError, NameError, NotImplementedError, SyntaxError, TypeError)


def may_pass(error: BaseException) -> bool:
    """Whether trying again, on another machine perhaps, may help: neither a user has to mend it, nor the code is wrong.

    A library that a host lacks is an ImportError too, and no fault of the code.
    """
    if isinstance(error, UserError):
        return error.passing
    return not isinstance(error, CODE_ERRORS) or lacks_library(error)


def lacks_library(error: BaseException) -> bool:
    return isinstance(error, ImportError) and "shared object" in str(error)


def one_line(error: BaseException) -> str:
    """What it says, or else its name."""
    return " ".join(str(error).split()) or type(error).__name__


def not_yaml(path: Path, error: Exception) -> str:
    """What is wrong with a file that should be YAML, and in which of its lines."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: not valid YAML: {one_line(error)}"
    return f"{path}:{mark.line + 1}: not valid YAML: {getattr(error, 'problem', '')}"


@contextlib.contextmanager
def told_when_full() -> Iterator[None]:
    """For what writes temporary files: a full disk is the user's to mend. Raises UserError in the system's place."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = tempfile.gettempdir()
        raise UserError(
            f"{folder}: {error.strerror}; TMPDIR=... takes another disk, the same command goes on"
        ) from error
