"""A checkpoint in the store: the parts of the ranks, the manifest with which it exists, its end.

    checkpoints/step-000001000-a3/        a3: written by attempt 3 of the run, and by no other
      rank-0.safetensors  rank-1.safetensors
      rank-0.json  rank-1.json            a part: size and sha256 of the rank's files; put when they are there
      MANIFEST.json                       put last, by rank 0: all files, step, attempt, fingerprint, world size, extra

Relies on a store whose puts are atomic and whose listing is never stale. Knows nothing of tensors.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.store import AlreadyExists, NotFound, Store, StoreError
from data_shards.whole import beside

ROOT = "checkpoints"
MANIFEST = "MANIFEST.json"
_FOLDER = re.compile(r"step-(\d{9,})-a(\d+)")
_FILE = re.compile(r"rank-\d+\.safetensors")
_PART = re.compile(r"rank-(\d+)\.json")

Fence = Callable[[], None]  # raises when the attempt must not write any more


class Damaged(UserError):
    """Bytes are not those that were saved."""


class NoRoom(UserError):
    """A disk of this machine has no room for what a checkpoint brings there; that of another may have."""

    passing = True


class Refused(UserError):
    """A checkpoint that a rank does not let come into being: its disk is full, say, and another start's may not be."""

    passing = True


@dataclass(frozen=True, order=True)
class Place:
    """Which checkpoint; the greater is the newer."""

    step: int
    attempt: int

    @property
    def name(self) -> str:
        return f"step-{self.step:09d}-a{self.attempt}"

    @property
    def path(self) -> str:
        return f"{ROOT}/{self.name}"

    @classmethod
    def parse(cls, name: str) -> "Place | None":
        """None for a name that no checkpoint has."""
        match = _FOLDER.fullmatch(name)
        place = cls(int(match[1]), int(match[2])) if match else None
        return place if place and place.name == name else None


@dataclass(frozen=True)
class File:
    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "File":
        """Reads the whole file."""
        return cls(path.name, path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class Part:
    """What one rank adds; rank 0's carries what the manifest says of the whole."""

    rank: int
    world_size: int
    fingerprint: str
    files: tuple[File, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None  # why this rank's state must not become a checkpoint

    @property
    def name(self) -> str:
        return f"rank-{self.rank}.json"

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Part":
        values = json.loads(data)
        return cls(**values | {"files": _files(values["files"])})


@dataclass(frozen=True)
class Manifest:
    step: int
    attempt: int
    fingerprint: str
    world_size: int
    files: tuple[File, ...]
    extra: dict[str, Any]

    @property
    def place(self) -> Place:
        return Place(self.step, self.attempt)

    def encode(self) -> bytes:
        """JSON with its own sha256, so that a flipped byte in it is noticed too. The same parts give the same bytes."""
        body = asdict(self)
        return json.dumps(body | {"sha256": _digest(body)}, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes, place: Place) -> "Manifest":
        """Raises Damaged."""
        try:
            body = json.loads(data)
            if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
                raise ValueError
            manifest = cls(**body | {"files": _files(body["files"])})
        except (ValueError, TypeError, KeyError):
            raise Damaged(f"{place.path}: {MANIFEST} is damaged, it does not have the sha256 that it names") from None
        if manifest.place != place:
            raise Damaged(f"{place.path}: {MANIFEST} belongs to {manifest.place.path}")
        return manifest


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _files(entries: Iterable[dict[str, Any]]) -> tuple[File, ...]:
    files = tuple(File(**entry) for entry in entries)
    if any(not _FILE.fullmatch(file.name) for file in files):
        raise ValueError("a file name that no rank writes")  # it is used as a path, and comes from outside
    return files


Survey = dict[Place, dict[str, int]]


def local_folder(url: str) -> str:
    """Below which a node's disk has a run's saves, by a name that people recognise, and no path; url: of its folder."""
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in url.rstrip("/").rpartition("/")[2])
    return f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def survey(store: Store) -> Survey:
    """All checkpoints, with or without a manifest: name and size of each object."""
    found: Survey = {}
    for entry in store.list(ROOT):
        folder, _, name = entry.path.removeprefix(f"{ROOT}/").partition("/")
        place = Place.parse(folder)
        if place:
            found.setdefault(place, {})[name] = entry.size
    return found


def committed(checkpoints: Survey) -> list[Place]:
    """Those that exist, the newest first."""
    return sorted((place for place, names in checkpoints.items() if MANIFEST in names), reverse=True)


def existing(store: Store, step: int | None = None) -> list[Place]:
    """Those of a run that exist, the newest first; of a step alone, where one is given. Raises UserError for none."""
    places = committed(survey(store))
    if not places:
        raise UserError(f"{store.url}: no checkpoint yet; make status shows how far the run is")
    wanted = [place for place in places if step in (None, place.step)]
    if not wanted:
        raise UserError(f"{store.url}: no checkpoint of step {step}; there are {steps(places)}")
    return wanted


def steps(places: Iterable[Place]) -> str:
    """For people."""
    return ", ".join(map(str, sorted({place.step for place in places}))) or "none"


def read_manifest(store: Store, place: Place) -> Manifest:
    """Raises Damaged, also when it is gone."""
    try:
        return Manifest.decode(store.get(f"{place.path}/{MANIFEST}"), place)
    except NotFound:
        raise Damaged(f"{place.path}: {MANIFEST} is gone") from None


def fetch(store: Store, place: Place, file: File, folder: Path) -> None:
    """Download a file of a checkpoint unless it lies there; it does so once it is verified. Raises Damaged, NoRoom."""
    target = folder / file.name
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < file.size:
        raise NoRoom(
            f"{folder}: has {free / 1e9:,.1f} GB free, and {place.path}/{file.name} takes {file.size / 1e9:,.1f} GB "
            "there; make room on that disk"
        )
    with beside(target) as aside:  # a name of its own: several ranks of a node may fetch the same file
        try:
            store.download(f"{place.path}/{file.name}", aside)
        except NotFound:
            raise Damaged(f"{place.path}: {file.name} is missing") from None
        check(aside, file, place)
        aside.replace(target)


def damage(store: Store, place: Place) -> str | None:
    """What is wrong with a checkpoint that exists, None when every byte of it is right; downloads all of it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for file in read_manifest(store, place).files:
                fetch(store, place, file, Path(folder))
                (Path(folder) / file.name).unlink()
    except Damaged as found:
        return str(found)
    return None


def check(path: Path, file: File, place: Place) -> None:
    """Raises Damaged when the bytes at `path` are not those of the file."""
    if path.stat().st_size != file.size:
        raise Damaged(f"{place.path}: {file.name} has {path.stat().st_size} bytes, its manifest says {file.size}")
    digest = sha256_of(path)
    if digest != file.sha256:
        raise Damaged(f"{place.path}: {file.name} has sha256 {digest[:8]}..., its manifest says {file.sha256[:8]}...")


def ranks_present(names: Iterable[str]) -> set[int]:
    """Whose parts are among the names of a checkpoint's objects."""
    return {int(match[1]) for match in map(_PART.fullmatch, names) if match}


def read_parts(store: Store, place: Place, ranks: Iterable[int]) -> list[Part]:
    """All at once. Raises Refused when a rank refused the checkpoint."""
    waiting = [store.submit(store.read(f"{place.path}/rank-{rank}.json")) for rank in sorted(ranks)]
    parts = [Part.decode(future.result()) for future in waiting]
    for part in parts:
        if part.refused is not None:
            raise Refused(f"{place.path}: rank {part.rank}: {part.refused}")
    return parts


def put_manifest(store: Store, place: Place, parts: list[Part], fence: Fence) -> Manifest:
    """The commit. Putting the same manifest again is no error: an answer may have been lost. Raises StoreError."""
    first = parts[0]
    files = tuple(file for part in parts for file in part.files)
    manifest = Manifest(place.step, place.attempt, first.fingerprint, first.world_size, files, first.extra)
    path = f"{place.path}/{MANIFEST}"
    fence()
    try:
        store.put(path, manifest.encode(), create_only=True)
    except AlreadyExists:
        if store.get(path) != manifest.encode():
            raise
    return manifest


@dataclass(frozen=True)
class Retention:
    """What stays: the last `last`, for ever each whose step `every` divides, those evaluated or begun with."""

    last: int
    every: int | None = None

    def for_ever(self, store: Store) -> Callable[[Place], bool]:
        """Asks the store which steps have an evaluation, are at it, or are what another run begins with."""
        found = (re.match(r"eval/step-(\d+)", entry.path) for entry in store.list("eval"))
        evaluated = {int(match[1]) for match in found if match}
        return lambda place: (self.every is not None and place.step % self.every == 0) or place.step in evaluated


def retain(store: Store, newest: Place, fingerprint: str, keep: Retention, damaged: set[Place], busy: set[Place],
           fence: Fence) -> list[str]:  # fmt: skip
    """Delete what the commit of `newest` made superfluous; returns a line for each checkpoint that resisted.

    Of this fingerprint stays what `keep` says, and all of another one. Those found `damaged` do not count, and stay: a
    later start, on other machines, may find them whole, or they go as old ones. Uncommitted ones go unless they are
    `busy` or newer. A later attempt's are never touched. The manifest goes first: what is half deleted then no longer
    exists, instead of being a checkpoint whose verification fails; the rest of it is found as uncommitted by the next
    call.
    """
    lines = []
    checkpoints = survey(store)
    for place in _superfluous(store, checkpoints, newest, fingerprint, keep, damaged, busy):
        try:
            fence()
            if MANIFEST in checkpoints[place]:
                store.delete([f"{place.path}/{MANIFEST}"])
            store.delete(f"{place.path}/{name}" for name in checkpoints[place] if name != MANIFEST)
        except StoreError as error:
            lines.append(f"{place.path}: not deleted, tried again after the next save: {error}")
    return lines


def _superfluous(store: Store, checkpoints: Survey, newest: Place, fingerprint: str, keep: Retention,
                 damaged: set[Place], busy: set[Place]) -> list[Place]:  # fmt: skip
    existing, stays = committed(checkpoints), keep.for_ever(store)
    ours = list[Place]()  # of those that stay for ever, of which there are more and more, only what is among the last
    for place in existing:
        counts = place not in damaged and place.attempt <= newest.attempt
        needed = len(ours) < keep.last or not stays(place)
        if counts and needed and _has_fingerprint(store, place, fingerprint):
            ours.append(place)
    uncommitted = [place for place in checkpoints if place not in existing and place not in busy]
    abandoned = [place for place in uncommitted if place.attempt < newest.attempt or place < newest]
    candidates = {*ours[keep.last :], *abandoned}
    return sorted(place for place in candidates if place.attempt <= newest.attempt)


def _has_fingerprint(store: Store, place: Place, fingerprint: str) -> bool:
    try:
        return read_manifest(store, place).fingerprint == fingerprint
    except Damaged:
        return False
