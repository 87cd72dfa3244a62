"""DuckDB for what does not fit into memory: so much of it, and a folder for the rest."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_shards.errors import UserError, one_line, told_when_full

if TYPE_CHECKING:
    import duckdb

MEMORY_BYTES = 2**30  # where nobody says how much; what is above goes to disk


def connect(folder: Path, memory_bytes: int) -> "duckdb.DuckDBPyConnection":
    """An empty database in a folder of its own; to be closed, or used in `with`."""
    import duckdb  # not for those who only read a set

    options: dict[str, Any] = {
        "memory_limit": f"{memory_bytes // 2**10}KiB",
        "temp_directory": str(folder / "spilled"),
        "preserve_insertion_order": False,  # else rows are kept in memory until all are there
        "autoinstall_known_extensions": False,  # nodes may have no internet
    }
    database = duckdb.connect(str(folder / "work.duckdb"), config=options)
    database.execute("set enable_progress_bar = false")  # it would go to stdout, among what a script reads
    return database


@contextlib.contextmanager
def fed(database: "duckdb.DuckDBPyConnection", name: str, schema: pa.Schema, batches: Iterator[Any]) -> Iterator[None]:
    """Batches as a table of that name, read as they come by what is asked meanwhile; raises their own UserError."""
    import duckdb

    met: list[UserError] = []

    def watched() -> Iterator[Any]:
        try:
            yield from batches
        except UserError as error:
            met.append(error)
            raise

    database.register(name, pa.RecordBatchReader.from_batches(schema, watched()))
    try:
        yield
    except duckdb.Error:
        if met:
            raise met[0] from None  # of which the engine has made an error of its own
        raise


@contextlib.contextmanager
def connected(what: str) -> "Iterator[tuple[duckdb.DuckDBPyConnection, Path]]":
    """`connect` in a folder for temporary files, which is given too, until the end; what: is done there, for people.

    Raises UserError for what the engine complains of: its disk is full, or its memory too small.
    """
    import duckdb

    with told_when_full(), tempfile.TemporaryDirectory(prefix="farseer-") as name:
        try:
            with connect(Path(name), MEMORY_BYTES) as database:
                yield database, Path(name)
        except duckdb.Error as error:
            text = one_line(error)
            raise UserError(f"{tempfile.gettempdir()}: {what} failed; TMPDIR=... takes another disk: {text}") from error
