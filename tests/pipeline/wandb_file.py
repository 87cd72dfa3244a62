"""Reads what W&B's client wrote: the records of a run-*.wandb file, by its format and W&B's own protobufs."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER = 7  # bytes of the file's header, and of each chunk's: checksum, length, kind
BLOCK = 32 * 1024
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a file, which may have been cut; LevelDB's log format."""
    data, at, whole = path.read_bytes(), HEADER, b""
    if len(data) < HEADER:
        return  # it has been opened just now
    assert data.startswith(b":W&B")
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no chunk begins so near to the end of a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += HEADER
        whole += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged, without what W&B adds to each (its names begin with an underscore)."""
    histories = (record.history for record in records(path) if record.WhichOneof("record_type") == "history")
    named = ({item.nested_key[0]: json.loads(item.value_json) for item in history.item} for history in histories)
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in named]


def load(path: Path) -> dict[str, float]:
    """What was said last of the machine's load, by W&B's names."""
    stats = [record.stats for record in records(path) if record.WhichOneof("record_type") == "stats"]
    return {item.key: float(item.value_json) for item in stats[-1].item} if stats else {}


def end(path: Path) -> tuple[bool, list[int]]:
    """Whether the run was marked as preempted, and its exit code; no code while it goes on."""
    found = list(records(path))
    preempted = any(record.WhichOneof("record_type") == "preempting" for record in found)
    return preempted, [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]


def alerts(path: Path) -> list[str]:
    """What W&B was asked to tell people."""
    return [record.alert.text for record in records(path) if record.WhichOneof("record_type") == "alert"]


def run_id(path: Path) -> str:
    """The id under which the run was opened."""
    return next(str(record.run.run_id) for record in records(path) if record.WhichOneof("record_type") == "run")
