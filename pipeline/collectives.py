"""Who keeps the others waiting, where training stands still and all ranks live: torch's flight recorder knows.

It counts, for each process group, the collectives that this rank has begun and those that have ended. When training
stands still each rank leaves what it says beside its stacks (pipeline.watchdog), as collectives-0003.json. There are
two recorders, each of which numbers its groups from 0: NCCL's, of what a GPU does, and one of gloo.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.whole import write_whole

NAMED = 4  # of many
_RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}


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
        of = f"of the collectives of {self.group}"
        return f"{who} {self.did} {self.own:,} {of}, others {self.others:,}{waiting}"


def record(path: Path) -> None:
    """Write down what this process has begun, and what of it goes on; nothing where torch does not tell."""
    c10d = sys.modules.get("torch._C._distributed_c10d")  # else there are no collectives
    told = {}
    for backend, name in _RECORDERS.items():
        with suppress(Exception):  # a private function, which torch without NCCL has not
            told[backend] = json.loads(getattr(c10d, name)(includeCollectives=True, onlyActive=True))
    if told:
        with suppress(OSError):  # the disk may be full
            write_whole(path, json.dumps(told))


def late(records: Mapping[int, Path]) -> Late | None:
    """The ranks to look at, by what each of them left; None where all are alike, or left nothing of use."""
    try:
        return _late(records)
    except Exception:  # noqa: BLE001 - a rank that hangs must leave, whatever others have written
        return None


def _late(records: Mapping[int, Path]) -> Late | None:
    told = {rank: found for rank, path in records.items() if (found := _read(path))}
    for did in ("begun", "ended"):
        for group in dict.fromkeys(group for found in told.values() for group in found):
            counts = {rank: getattr(found[group], did) for rank, found in told.items() if group in found}
            own, others = min(counts.values()), max(counts.values())
            if own != others:
                ranks = [rank for rank, count in sorted(counts.items()) if count == own]
                # one that waits itself, in another group, has been kept from coming by who does not
                ranks = [rank for rank in ranks if not _waits(told[rank])] or ranks
                ahead = next(rank for rank, count in counts.items() if count == others)
                return Late(tuple(ranks), group, did, own, others, _waiting_in(told[ahead][group], own))
    return None


class _Group(NamedTuple):
    """How many collectives of a group a rank has begun, and how many have ended; those that go on."""

    begun: int
    ended: int
    active: list[dict[str, Any]]


def _read(path: Path) -> dict[str, _Group]:
    """By backend and number, NCCL's first; nothing for what was cut, or is not there."""
    found: dict[str, _Group] = {}
    with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        recorders = json.loads(path.read_text())
        for backend in _RECORDERS:
            told = recorders.get(backend, {})
            for group, status in sorted(told.get("pg_status", {}).items()):
                active = [entry for entry in told.get("entries", []) if str(entry.get("pg_id")) == group]
                begun, ended = (int(status[f"last_{what}_collective"]) for what in ("enqueued", "completed"))
                found[f"{backend} group {group}"] = _Group(begun, ended, active)
    return found


def _waits(groups: Mapping[str, _Group]) -> bool:
    return any(group.begun > group.ended for group in groups.values())


def _waiting_in(group: _Group, own: int) -> str:
    """The first collective that a rank waits in and the late ones have not come to, in words."""
    for entry in group.active:
        if entry.get("collective_seq_id", 0) > own:
            return f"{entry['profiling_name']} of {entry['input_sizes']}"
    return ""
