"""What a cut upload left on the nodes' disks: sent at the next start, if it completes a checkpoint.

    <local>/step-000001000-a3/rank-1/{rank-1.safetensors, rank-1.json}     the part is written last

Only the newest checkpoint that can be completed is; all that older attempts left on the disk is removed afterwards.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_shards.store import NotFound, Store
from pipeline import commit
from pipeline.commit import Damaged, Fence, Part, Place
from pipeline.ranks import Ranks

PartsOfRanks = dict[int, tuple[Part, Path]]  # and in which folder each lies
Parts = dict[Place, PartsOfRanks]
Known = dict[str, tuple[int, list[int]]]  # of checkpoints by name: the world size, and the ranks whose parts are there


def complete(
    store: Store, local: Path, attempt: int, fingerprint: str, ranks: Ranks, fence: Fence, event: Callable[..., None]
) -> None:
    """On all ranks at once, before the newest checkpoint is looked for. Raises UserError on all alike."""
    own = _on_disk(local, attempt, fingerprint)
    disk = {place.name: (next(iter(parts.values()))[0].world_size, sorted(parts)) for place, parts in own.items()}
    in_store, exist = ranks.first(partial(_in_store, store, attempt, fingerprint))
    for place in _completable([*ranks.exchange(disk), in_store], [Place(*one) for one in exist]):
        ranks.together(partial(_send, store, place, own.get(place, {}), attempt, fence, event))
        if ranks.first(partial(_commit, store, place, fence, event)):
            break
    ranks.exchange(None)
    for folder in local.glob("step-*"):
        found = Place.parse(folder.name)
        if found and found.attempt < attempt:
            shutil.rmtree(folder, ignore_errors=True)


def _on_disk(local: Path, attempt: int, fingerprint: str) -> Parts:
    """Those of earlier attempts."""
    parts: Parts = {}
    for path in local.glob("step-*/rank-*/rank-*.json"):
        place = Place.parse(path.parent.parent.name)
        if place and place.attempt < attempt:
            part = _read(path.read_bytes)
            if part and part.fingerprint == fingerprint and part.refused is None:
                parts.setdefault(place, {})[part.rank] = (part, path.parent)
    return parts


def _read(bytes_of: Callable[[], bytes]) -> Part | None:
    """None when it is damaged or gone."""
    try:
        return Part.decode(bytes_of())
    except (ValueError, KeyError, TypeError, OSError, NotFound):
        return None


def _in_store(store: Store, attempt: int, fingerprint: str) -> tuple[Known, list[tuple[int, int]]]:
    """Of the checkpoints that no existing one has passed, and which ones exist."""
    checkpoints = commit.survey(store)
    exist = commit.committed(checkpoints)
    there: Known = {}
    for place, names in checkpoints.items():
        present = commit.ranks_present(names)
        if not _passed(place, exist) and place.attempt < attempt and present:
            part = _read(partial(store.get, f"{place.path}/rank-{min(present)}.json"))
            if part and part.fingerprint == fingerprint:
                there[place.name] = part.world_size, sorted(present)
    return there, [(place.step, place.attempt) for place in exist]


def _passed(place: Place, exist: list[Place]) -> bool:
    """Whether its attempt, or a later one, has a checkpoint as far on. One of an earlier attempt that is further on was
    damaged, so that the later one began below."""
    return any(one.step >= place.step and one.attempt >= place.attempt for one in exist)


def _completable(everywhere: list[Known], exist: list[Place]) -> list[Place]:
    """The checkpoints of which all parts are somewhere, and that none which exists has passed; the newest first."""
    parts: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for known in everywhere:
        for name, (world_size, present) in known.items():
            parts.setdefault(name, set()).update(present)
            sizes[name] = world_size
    whole = [Place.parse(name) for name, present in parts.items() if present == set(range(sizes[name]))]
    return sorted((place for place in whole if place and not _passed(place, exist)), reverse=True)


def _send(
    store: Store, place: Place, parts: PartsOfRanks, attempt: int, fence: Fence, event: Callable[..., None]
) -> None:
    for rank, (part, folder) in parts.items():
        if store.exists(f"{place.path}/{part.name}") or not _claimed(folder, attempt):
            continue
        try:
            for file in part.files:
                commit.check(folder / file.name, file, place)
        except (Damaged, OSError) as error:
            event("leftover damaged", step=place.step, rank=rank, reason=str(error))
            continue
        for file in part.files:
            fence()
            store.upload(folder / file.name, f"{place.path}/{file.name}")
        fence()
        store.put(f"{place.path}/{part.name}", part.encode())


def _claimed(folder: Path, attempt: int) -> bool:
    """Whether this rank is the one of its node that sends the part."""
    try:
        (folder / f"sent-by-a{attempt}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _commit(store: Store, place: Place, fence: Fence, event: Callable[..., None]) -> bool:
    """Whether it is whole, and so exists now."""
    sizes = commit.survey(store).get(place, {})
    present = commit.ranks_present(sizes)
    found = [_read(partial(store.get, f"{place.path}/rank-{rank}.json")) for rank in sorted(present)]
    parts = [part for part in found if part is not None and part.refused is None]
    whole = parts and [part.rank for part in parts] == list(range(parts[0].world_size))
    if not whole or any(sizes.get(file.name) != file.size for part in parts for file in part.files):
        return False
    commit.put_manifest(store, place, parts, fence)
    reason = f"{place.path}: its upload was cut; sent from what was left on the nodes' disks"
    event("checkpoint completed", step=place.step, reason=reason)
    return True
