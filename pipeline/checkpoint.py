"""Checkpoints of a run: saved while training goes on, found again in the store, loaded on any number of ranks.

In: a dict of named tensors (replicated and parted ones under the same names on all ranks, a rank's own under names of
their own) and JSON values. A save stops training for the copy to host memory; disk and store follow in the background
(`sender`). A checkpoint exists with its manifest (`commit`); the store is the only place that one is loaded from. All
collectives run in the thread that trains, so none can meet another of their group out of order.
"""

import hashlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, PositiveInt
from torch import Tensor

from data_shards.errors import BadHost, UserError
from data_shards.section import Section
from data_shards.store import Denied, Store
from pipeline import commit, leftovers, snapshot
from pipeline.commit import Damaged, Fence, File, Manifest, Part, Place, Retention
from pipeline.ranks import Ranks
from pipeline.sender import POLL_S, Save, Sender

T = TypeVar("T")


class CheckpointSettings(Section):
    """How often a run is saved and what is kept."""

    every_steps: PositiveInt = 1000  # between two saves
    keep: Annotated[int, Field(ge=2)] = 3  # the last ones; the newest may turn out to be damaged
    keep_every: PositiveInt | None = None  # for ever: those whose step this divides; evaluated ones stay anyway
    local_dir: str | None = None  # on the node's own disk; by default in the run's folder
    force: bool = False  # go on although the config differs from the one that the run began with
    affects_results: ClassVar[bool] = False

    def folder(self, run_dir: Path) -> Path:
        """Where ranks keep their saves until they are sent. run_dir: the run's folder on the shared disk."""
        return Path(self.local_dir or run_dir / "checkpoints")


class NotCommitted(UserError):
    """The last save did not reach the store in time. It is on the nodes' disks, and the next start sends it."""

    passing = True


class Checkpointer:
    """The checkpoints of one attempt of a run, on one rank. All methods are called on all ranks alike.

    store: the run's folder. local: on the node's own disk, best the same for all attempts: what a killed one left there
    completes its checkpoint. ranks: all of them, their group used by one thread only. fence raises when a newer
    attempt owns the run, and is called before each write to the store; before_commit is called on rank 0 before its
    part is sent. host: by which the launcher knows this machine. event(name, **fields) is called from threads too:
    saved, committed, save delayed | refused | failed | dropped, checkpoint damaged | completed | not deleted, leftover
    damaged; each with its step and, in words, a reason.
    """

    def __init__(
        self, store: Store, local: Path, *, attempt: int, fingerprint: str, ranks: Ranks, host: str,
        settings: CheckpointSettings, fence: Fence, event: Callable[..., None],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._attempt, self._fingerprint = store, attempt, fingerprint
        self._local = local / commit.local_folder(store.url)
        self._fetched = self._local / f"fetched-a{attempt}"
        self._ranks, self._node = ranks, host
        self._fence, self._event = fence, event
        keep = Retention(settings.keep, settings.keep_every)
        self._sender = Sender(store, fence, event, before_commit, keep)
        self._host = snapshot.HostCopy()
        self._last: Save | None = None
        self._known_step: int | None = None  # of a checkpoint that exists, as this rank was told

    @property
    def committed_step(self) -> int | None:
        """Step of the newest checkpoint known to exist; on ranks above 0 as of the last save or wait."""
        return max((s for s in (self._sender.committed_step, self._known_step) if s is not None), default=None)

    @property
    def pending_step(self) -> int | None:
        """Step of the last save of this attempt, whatever became of it."""
        return self._last.place.step if self._last else None

    def save(self, step: int, state: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Begin a checkpoint; `state` may change as soon as this returns. `extra`: JSON values, rank 0's are kept.

        Raises what became of an earlier save when training must not go on with it: the run belongs to a newer attempt,
        the store refuses writes. A store that does not answer is no such thing: the save is tried again with this one.
        """
        started = time.monotonic()
        header = json.loads(json.dumps(extra)) if self._ranks.rank == 0 else {}
        self._sender.idle()
        names = self._agree(step, state)
        tensors = self._host.take(state, names)
        place = Place(step, self._attempt)
        part = Part(self._ranks.rank, self._ranks.world_size, self._fingerprint, extra=header)
        folder = self._local / place.name / f"rank-{self._ranks.rank}"
        self._last = Save(place, part, folder, started, snapshot.first_rows(state, names))
        self._sender.wake()  # before `start`, or a first try that fails fast would be followed by a second
        self._sender.start(self._last, tensors)

    def wait(self, timeout_s: float) -> None:
        """Return when the last save is committed. Raises NotCommitted if it is not after `timeout_s`."""
        if self._last is None:
            return
        place, deadline = self._last.place, time.monotonic() + max(timeout_s, 0.0)
        self._sender.wake()
        if not (self._sender.wait(self._last, deadline) and self._exists(place, deadline)):
            reason = f" ({self._last.error})" if self._last.error else ""
            raise NotCommitted(
                f"{self._store.url}/{place.path}: not committed after {timeout_s:.0f} s{reason}; what this rank saved "
                f"is in {self._last.folder}, and the next start on this node sends it"
            )
        self._known_step = place.step
        self._sender.settle(place.step, lambda step: False)

    def tidy(self, timeout_s: float) -> None:
        """Return when what the last save has made superfluous is deleted, or when the time is over."""
        self._sender.tidy(time.monotonic() + timeout_s)

    def newest(self) -> Manifest | None:
        """The checkpoint to go on from: highest step, then highest attempt, with this fingerprint and its bytes whole.

        Completes first what a killed attempt left on the nodes. Each file is downloaded and hashed by one rank. A
        damaged checkpoint is passed over with an event that says so, and stays: this attempt deletes none of them.
        Raises UserError (Unavailable and the like) on all ranks, BadHost when bytes are whole in the store and not on
        a rank's machine.
        """
        for folder in self._local.glob("fetched-a*"):
            shutil.rmtree(folder, ignore_errors=True)
        self._ranks.first(self._abandon)
        leftovers.complete(
            self._store, self._local, self._attempt, self._fingerprint, self._ranks, self._fence, self._event
        )
        passed: list[tuple[Place, str]] = []
        found = None
        for place in (Place(*numbers) for numbers in self._ranks.first(self._committed)):
            found, complaint = self._examine(place)
            if found is not None:
                break
            if complaint is not None:
                passed.append((place, complaint))
                self._drop_fetched(place)
        self._sender.damaged = {place for place, _ in passed}
        self._known_step = found.step if found else None
        for place, complaint in passed if self._ranks.rank == 0 else ():
            then = f"going on from {found.place.name}" if found else "no older one is whole: starting from step 0"
            self._event("checkpoint damaged", step=place.step, checkpoint=place.path, reason=f"{complaint}; {then}")
        return found

    def load(self, found: Manifest, state: dict[str, Tensor]) -> None:
        """Fill the given tensors in place, on whichever rank and device they are now.

        Raises UserError on all ranks, with nothing changed, naming the first tensor that is missing in the checkpoint,
        has another shape or type, or is in the checkpoint and wanted by no rank; BadHost when a file, which was whole
        when it was verified, does not arrive so.
        """
        place = found.place
        files = order_for(self._ranks.rank, found.files)
        self._ranks.together(lambda: self._fetch_verified(place, files))
        saved = snapshot.Saved(self._fetched / place.name)
        self._ranks.together(lambda: _fits(saved.mismatch(state), place.path))
        wanted = self._ranks.exchange([int(name in state) for name in saved.names])
        unwanted = [name for name, *asked in zip(saved.names, *wanted, strict=True) if not any(asked)]
        _fits(f"it has a tensor {unwanted[0]}, which this run does not know" if unwanted else None, place.path)
        saved.read_into(state)
        self._ranks.exchange(None)  # nobody removes what another still reads
        self._drop_fetched(place)

    def forget(self, found: Manifest) -> None:
        """Remove from this machine what `newest` has fetched, where nobody loads it."""
        self._ranks.exchange(None)  # nobody removes what another still fetches
        self._drop_fetched(found.place)

    def _abandon(self) -> None:
        """Free what killed attempts had begun to upload in parts. This attempt owns the run, and has not begun to."""
        self._fence()
        try:
            self._store.abandon(commit.ROOT)
        except Denied as error:  # it takes room and stops nothing
            self._event("uploads not freed", reason=f"{error}; the key needs s3:ListBucketMultipartUploads")

    def _agree(self, step: int, state: dict[str, Tensor]) -> list[str]:
        """The names that this rank writes; drops the saves that all ranks drop. Raises UserError on all alike.

        A save that one rank still sends is completed; those between it and this new one are not: with a store slower
        than the saves come, all ranks complete the same ones.
        """
        given_up = sorted(self._sender.given_up)
        views = self._ranks.together(lambda: self._view(given_up, state))
        oldest, lost, committed, forms, own = zip(*views, strict=True)
        _fit_together(forms, own)
        first = min((s for s in oldest if s is not None), default=step)
        gone = {s for of_rank in lost for s in of_rank}
        self._known_step = max((s for s in committed if s is not None), default=None)
        self._sender.settle(self._known_step, lambda s: s > first or s in gone)
        self._sender.given_up.difference_update(given_up)
        return snapshot.deal(state, self._ranks.rank, self._ranks.world_size)

    def _view(
        self, given_up: list[int], state: dict[str, Tensor]
    ) -> tuple[int | None, list[int], int | None, str, list[str]]:
        if self._sender.failure is not None:
            raise self._sender.failure
        own = [name for name in state if snapshot.is_own(name)]
        return self._sender.oldest(), given_up, self.committed_step, _form(state), own

    def _exists(self, place: Place, deadline: float) -> bool:
        """Whether the manifest is there by the deadline; rank 0 has put it itself."""
        pause = POLL_S[0]
        while self._ranks.rank != 0 and not self._store.exists(f"{place.path}/{commit.MANIFEST}"):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
        return True

    def _committed(self) -> list[tuple[int, int]]:
        """Step and attempt of those that exist, the newest first."""
        return [(place.step, place.attempt) for place in commit.committed(commit.survey(self._store))]

    def _examine(self, place: Place) -> tuple[Manifest | None, str | None]:
        """The checkpoint if all ranks find it whole, or what is wrong; neither if its fingerprint is another."""
        manifests: list[Manifest] = []
        complaints = self._ranks.together(lambda: self._complaint(place, self._ranks.rank, manifests))
        if any(complaints):
            complaints = self._look_again(place, complaints, manifests)
        if said := next(filter(None, complaints), None):
            return None, said
        return (manifests[0] if manifests[0].fingerprint == self._fingerprint else None), None

    def _complaint(self, place: Place, share: int, manifests: list[Manifest]) -> str | None:
        """What is wrong with a rank's share of the files, as they arrive here; adds the manifest to those read."""
        try:
            manifest = commit.read_manifest(self._store, place)
            manifests.append(manifest)
            if manifest.fingerprint == self._fingerprint:
                self._fetch(place, manifest.files[share :: self._ranks.world_size])
        except Damaged as damage:
            return str(damage)
        return None

    def _look_again(self, place: Place, complaints: list[str | None], manifests: list[Manifest]) -> list[str | None]:
        """What each rank that complained says of a second look. Raises BadHost when a rank elsewhere finds it whole.

        A bad disk or memory would else send the run back to where no checkpoint is, in front of whole ones.
        """
        rank, count = self._ranks.rank, self._ranks.world_size
        away = count // 2  # of ranks on several nodes, a rank so far away is on another node
        judged = (rank - away) % count
        again = self._ranks.together(lambda: self._complaint(place, rank, manifests) if complaints[rank] else None)
        if count == 1 or not any(again):
            return again
        others = self._ranks.together(lambda: self._complaint(place, judged, manifests) if again[judged] else None)
        nodes = self._ranks.exchange(self._node)
        for suspect, said in enumerate(again):
            judge = (suspect + away) % count
            if said and not others[judge]:
                raise _spoilt(nodes[suspect], said, f"on {nodes[judge]}")
        return again

    def _fetch_verified(self, place: Place, files: Sequence[File]) -> None:
        try:
            self._fetch(place, files)
        except Damaged as damage:
            raise _spoilt(self._node, str(damage), "before") from None

    def _fetch(self, place: Place, files: Sequence[File]) -> None:
        for file in files:
            commit.fetch(self._store, place, file, self._fetched / place.name)

    def _drop_fetched(self, place: Place) -> None:
        shutil.rmtree(self._fetched / place.name, ignore_errors=True)


def _spoilt(node: str, damage: str, where: str) -> BadHost:
    return BadHost(node, f"{damage}, and the same file arrived whole {where}: look at its disk and memory")


def order_for(rank: int, files: Sequence[T]) -> list[T]:
    """In which order a rank looks for the files: one of its own, or a node's ranks would fetch the same at once."""
    return random.Random(rank).sample(files, len(files))


def _fits(mismatch: str | None, path: str) -> None:
    if mismatch is not None:
        raise UserError(f"{path}: {mismatch}; go on with the program and config that saved it, or start a new RUN")


def _form(state: dict[str, Tensor]) -> str:
    """A hash of what all ranks must have alike: names, shapes and types."""
    shared = [(name, t.shape, t.dtype) for name, t in sorted(state.items()) if not snapshot.is_own(name)]
    return hashlib.sha256(repr(shared).encode()).hexdigest()


def _fit_together(forms: Sequence[str], own: Sequence[list[str]]) -> None:
    """Raise UserError unless all ranks have the same shared tensors, and each its own. Both are by rank."""
    odd = [rank for rank, form in enumerate(forms) if form != forms[0]]
    twice = [name for name, times in Counter(chain(*own)).items() if times > 1]
    wrong = [f"rank {rank} has tensors of other names, shapes or types than rank 0" for rank in odd]
    wrong += [f"{name} is there on two ranks" for name in twice]
    if wrong:
        raise UserError(f"the states of the ranks do not fit together: {wrong[0]}")
