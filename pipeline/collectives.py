"""Who keeps the others waiting, where training stands still and all ranks live: torch's flight recorder knows.

It counts, for each process group, the collectives that this rank has begun and those that have ended. When training
stands still each rank leaves what it says beside its stacks (pipeline.watchdog), as collectives-0003.json.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.whole import write_whole

NAMED = 4  # of many


class Late(NamedTuple):
    """Ranks that have begun (or ended: `did`) fewer collectives of a group than others, which wait in `waiting_in`."""

    ranks: tuple[int, ...]
    group: str
    did: str
    own: int
    others: int
    waiting_in: str

    def __str__(self) -> str:
        named, more = ", ".join(map(str, self.ranks[:NAMED])), " and more" if len(self.ranks) > NAMED else ""
        who = f"ranks {named}{more} have" if len(self.ranks) > 1 else f"rank {named} has"
        waiting = f", who wait in {self.waiting_in}" if self.waiting_in else ""
        of = f"of the collectives of group {self.group}"
        return f"{who} {self.did} {self.own:,} {of}, others {self.others:,}{waiting}"


def record(path: Path) -> None:
    """Write down what this process has begun, and what of it goes on; nothing where torch does not tell."""
    recorder = sys.modules.get("torch._C._distributed_c10d")  # else there are no collectives
    with suppress(Exception):  # a private function, and a disk that may be full
        told = recorder._dump_fr_trace_json(includeCollectives=True, onlyActive=True)  # type: ignore[union-attr]
        write_whole(path, told)


def late(records: Mapping[int, Path]) -> Late | None:
    """The ranks to look at, by what each of them left; None where all are alike, or left nothing of use."""
    try:
        return _late(records)
    except Exception:  # noqa: BLE001 - a rank that hangs must leave, whatever others have written
        return None


def _late(records: Mapping[int, Path]) -> Late | None:
    told = {rank: found for rank, path in records.items() if (found := _read(path)) is not None}
    for did, key in (("begun", "last_enqueued_collective"), ("ended", "last_completed_collective")):
        for group in sorted({group for found in told.values() for group in found["pg_status"]}):
            counts = {
                rank: int(found["pg_status"][group][key]) for rank, found in told.items() if group in found["pg_status"]
            }
            if len(set(counts.values())) > 1:
                own, others = min(counts.values()), max(counts.values())
                ranks = tuple(rank for rank, count in sorted(counts.items()) if count == own)
                ahead = next(rank for rank, count in counts.items() if count == others)
                return Late(ranks, group, did, own, others, _waiting_in(told[ahead], group, own))
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found.get("pg_status"), dict) else None


def _waiting_in(found: dict[str, Any], group: str, own: int) -> str:
    """The first collective that a rank waits in and the late ones have not come to, in words."""
    for entry in found.get("entries", []):
        if str(entry.get("pg_id")) == group and entry.get("collective_seq_id", 0) > own:
            return f"{entry['profiling_name']} of {entry['input_sizes']}"
    return ""
