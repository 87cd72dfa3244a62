"""Lists of files: text, a path or url a line, or Parquet with a column of them, and with what else is said of each."""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import UserError, one_line

# Of a shard's table; a list's columns of these names get `source_` before them.
OURS = {"key", "offset", "size", "width", "height", "format", "sha256", "phash", "label", "source"}
_PATHS = ("path", "url")


class Row(NamedTuple):
    """A file of a list: where it is, its label and its other columns."""

    path: str
    label: str | None
    columns: dict[str, Any] | None


def text_rows(file: BinaryIO) -> Iterator[Row]:
    """The lines that are not empty; a byte order mark belongs to none."""
    for number, line in enumerate(file):
        if path := (line if number else line.removeprefix(BOM_UTF8)).rstrip(b"\r\n").decode("utf-8", "surrogateescape"):
            yield Row(path, None, None)


def parquet_rows(file: BinaryIO, url: str, path_column: str | None, label_column: str | None) -> Iterator[Row]:
    """The rows, a batch at a time. Raises UserError when a column is not there, or the file is no Parquet."""
    table = _opened(file, url)
    path_column = _column(table.schema_arrow, url, path_column, label_column)
    for batch in table.iter_batches(batch_size=1024):
        for row in _values(batch, url):
            path, label = row.pop(path_column), row.pop(label_column) if label_column else None
            path = path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else path
            columns = {_renamed(name): value for name, value in row.items()}
            yield Row(str(path or ""), None if label is None else str(label), columns or None)


def _values(batch: pa.RecordBatch, url: str) -> list[dict[str, Any]]:
    try:
        return list(batch.to_pylist())
    except ValueError as error:  # a time below a microsecond, text that is none
        raise UserError(
            f"{url}: a value cannot be read ({one_line(error)}); cast its column, or leave it out"
        ) from None


def parquet_schema(file: BinaryIO, url: str, path_column: str | None, label_column: str | None) -> pa.Schema | None:
    """Names and types of what is in `Row.columns`. Raises UserError for a type that a plan cannot keep."""
    schema = _opened(file, url).schema_arrow
    path_column = _column(schema, url, path_column, label_column)
    fields = [f.with_name(_renamed(f.name)) for f in schema if f.name not in (path_column, label_column)]
    for field in fields:
        if re.search(r"\bduration\[|\bhalffloat\b(?!:)", str(field.type)):
            raise UserError(
                f"{url}: column {field.name} is of {field.type}, which a plan cannot keep; cast it, or leave it out"
            )
    return pa.schema(fields) if fields else None


def _opened(file: BinaryIO, url: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{url}: not a whole Parquet file: {error}; fetch it again") from None


def _column(schema: pa.Schema, url: str, path_column: str | None, label_column: str | None) -> str:
    names = schema.names
    wanted = path_column or next((name for name in _PATHS if name in names), None)
    if wanted is None or wanted not in names:
        missing, setting = wanted or " or ".join(_PATHS), "path_column"
    elif label_column and label_column not in names:
        missing, setting = label_column, "label"
    else:
        kept = [_renamed(name) for name in names if name not in (wanted, label_column)]
        if twice := [name for name in kept if kept.count(name) > 1]:
            raise UserError(f"{url}: two columns {twice[0]}; rename one (label, say, is kept as source_label)")
        return wanted
    raise UserError(f'{url}: no column {missing}; it has {", ".join(names)} (SET="{setting}=NAME")')


def _renamed(name: str) -> str:
    return f"source_{name}" if name in OURS else name
