"""A rank's saves on their way: from host memory to the node's disk, from there to the store. In threads, no collective.

Two threads: one writes (host memory is free again when it ends), one sends, the oldest save first; so a slow store does
not hold up the next copy. A save that the store keeps waiting stays on the disk and is tried again with the next.
"""

import random
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from data_shards.errors import UserError
from data_shards.store import Store, Unavailable
from data_shards.whole import write_whole
from pipeline import commit, snapshot
from pipeline.commit import Fence, File, Part, Place, Refused, Retention

PEERS_S = 600.0  # rank 0 waits so long for the others' parts before it reports and rests
POLL_S = (0.05, 2.0)  # between two looks at the store: at first, at most


@dataclass(eq=False)
class Save:
    """One save of this rank. `error` says why it rests or has failed."""

    place: Place
    part: Part
    folder: Path  # of this rank alone, on the node's disk
    started: float
    first_rows: dict[str, int]  # of tensors that are parted among the ranks
    unsent: list[File] = field(default_factory=list)
    written: bool = False
    resting: bool = False  # until the next save or wait
    sent: bool = False  # rank 0: committed
    failed: bool = False
    dropped: bool = False
    error: Exception | None = None

    @property
    def waiting(self) -> bool:
        return not (self.sent or self.failed or self.dropped)


class Sender:
    """`event(name, **fields)` is called from the threads. `damaged`: existing checkpoints that do not count as such."""

    def __init__(
        self, store: Store, fence: Fence, event: Callable[..., None], before_commit: Callable[[], None], keep: Retention
    ) -> None:
        self._store, self._fence, self._event = store, fence, event
        self._before_commit, self._keep = before_commit, keep
        self._changed = threading.Condition()
        self._saves: list[Save] = []  # not known to be committed
        self._writer: threading.Thread | None = None
        self._sender: threading.Thread | None = None
        self._retaining = False
        self.damaged: set[Place] = set()
        self.committed_step: int | None = None
        self.failure: Exception | None = None  # what training must not go on with
        self.given_up: set[int] = set()  # steps that this rank will not complete

    def start(self, save: Save, tensors: dict[str, Tensor]) -> None:
        """Write the tensors, which are this save's until `idle` has returned, and send them."""
        with self._changed:
            self._saves.append(save)
        self._writer = threading.Thread(target=self._write, args=(save, tensors), name="checkpoint-write", daemon=True)
        self._writer.start()
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_for_ever, name="checkpoint-send", daemon=True)
            self._sender.start()

    def idle(self) -> None:
        """Return when nothing reads the tensors of the last save any more."""
        if self._writer is not None:
            self._writer.join()

    def oldest(self) -> int | None:
        """The step of the oldest save that has not arrived."""
        with self._changed:
            return min((save.place.step for save in self._saves if save.waiting), default=None)

    def settle(self, committed: int | None, drop: Callable[[int], bool]) -> None:
        """Forget, with their local files, the saves up to a committed step and those whose step is to be dropped."""
        with self._changed:
            gone = [s for s in self._saves if s.place.step <= (-1 if committed is None else committed)]
            dropped = [s for s in self._saves if s not in gone and s.waiting and drop(s.place.step)]
            for save in dropped:
                save.dropped = True
            self._saves = [s for s in self._saves if s not in gone and not s.dropped and not s.failed]
            self._changed.notify_all()
        for save in dropped:
            self._tell("save dropped", step=save.place.step, reason=str(save.error or "a newer one takes its place"))
        for save in gone + dropped:
            _remove(save.folder)

    def wake(self) -> None:
        """Try again what rests."""
        with self._changed:
            for save in self._saves:
                save.resting = False
            self._changed.notify_all()

    def wait(self, save: Save, deadline: float) -> bool:
        """Whether the save is sent (rank 0: committed) by the deadline (monotonic). Raises its error if it failed."""
        while True:
            with self._changed:
                done = self._changed.wait_for(lambda: not save.waiting or self._rests(), deadline - time.monotonic())
            if not done or not save.waiting:
                break
            time.sleep(max(0.0, min(POLL_S[1], deadline - time.monotonic())))
            self.wake()
        if save.failed and save.error is not None:
            raise save.error
        return save.sent

    def _rests(self) -> bool:
        """Whether the save whose turn it is waits to be woken: those behind it do so too."""
        first = self._first()
        return first is not None and first.resting

    def tidy(self, deadline: float) -> None:
        """Return when nothing is being deleted after a commit, or at the deadline (monotonic)."""
        with self._changed:
            self._changed.wait_for(lambda: not self._retaining, deadline - time.monotonic())

    def _write(self, save: Save, tensors: dict[str, Tensor]) -> None:
        try:
            name = snapshot.first_not_finite(tensors)
            if name is not None:
                raise Refused(f"{save.place.path}: {name} holds a value that is not finite")
            _make(save.folder)
            path = save.folder / f"rank-{save.part.rank}.safetensors"
            snapshot.write(tensors, path, save.first_rows)
            part = replace(save.part, files=(File.of(path),))
            write_whole(save.folder / part.name, part.encode())
        except (Refused, OSError) as error:
            _remove(save.folder)
            self._refuse(save, error)
        except Exception as error:  # noqa: BLE001 - it is raised again in the thread that trains
            self._fail(save, error)
        else:
            seconds = time.monotonic() - save.started
            self._tell("saved", step=save.place.step, seconds=seconds, bytes=part.files[0].size)
            with self._changed:
                save.part, save.unsent, save.written = part, list(part.files), True
                self._changed.notify_all()

    def _send_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() is not None)
                save = self._next()
            assert save is not None
            try:
                self._send(save)
            except Unavailable as error:
                self._rest(save, error)
            except (Refused, OSError) as error:
                self._refuse(save, error)
            except Exception as error:  # noqa: BLE001 - it is raised again in the thread that trains
                self._fail(save, error)

    def _next(self) -> Save | None:
        first = self._first()
        return first if first is not None and first.written and not first.resting else None

    def _first(self) -> Save | None:
        """The save whose turn it is."""
        return next((save for save in self._saves if save.waiting), None)

    def _send(self, save: Save) -> None:
        if save.part.rank == 0:
            self._fence()
            self._before_commit()
        for file in list(save.unsent):
            if save.dropped:
                return
            self._fence()
            local = save.folder / file.name
            if not local.is_file():
                raise FileNotFoundError(f"{local}: gone before it was uploaded")
            self._store.upload(local, f"{save.place.path}/{file.name}")
            save.unsent.remove(file)
        self._fence()
        self._store.put(f"{save.place.path}/{save.part.name}", save.part.encode())
        if save.part.refused is not None:
            self._fail(save, Refused(save.part.refused), fatal=False)
            return
        manifest = self._commit(save) if save.part.rank == 0 else None
        with self._changed:
            save.sent, self._retaining = not save.dropped, manifest is not None
            self.committed_step = save.place.step if manifest else self.committed_step
            self._changed.notify_all()
        if manifest:
            size = sum(file.size for file in manifest.files)
            self._tell("committed", step=save.place.step, seconds=time.monotonic() - save.started, bytes=size)
            try:
                self._retain(save)
            finally:
                with self._changed:
                    self._retaining = False
                    self._changed.notify_all()

    def _commit(self, save: Save) -> commit.Manifest | None:
        """Wait for the parts of the other ranks, then put the manifest; None when the save was dropped meanwhile."""
        pause, end = POLL_S[0], time.monotonic() + PEERS_S
        everyone = set(range(save.part.world_size))
        while missing := everyone - commit.ranks_present(Path(e.path).name for e in self._store.list(save.place.path)):
            if time.monotonic() > end:
                ranks = ", ".join(map(str, sorted(missing)[:8]))
                raise Unavailable(f"{save.place.path}: no part of rank {ranks} after {PEERS_S:.0f} s")
            with self._changed:
                if self._changed.wait_for(lambda: save.dropped, pause):
                    return None
            pause = min(2 * pause, POLL_S[1])
        parts = commit.read_parts(self._store, save.place, everyone)
        return commit.put_manifest(self._store, save.place, parts, self._fence)

    def _retain(self, save: Save) -> None:
        with self._changed:
            busy = {other.place for other in self._saves if other.waiting}
        fingerprint = save.part.fingerprint
        try:
            resisted = commit.retain(self._store, save.place, fingerprint, self._keep, self.damaged, busy, self._fence)
        except UserError as error:  # the checkpoint is there all the same; a lost fence is noticed by the next write
            resisted = [f"{save.place.path}: older ones not looked for: {error}"]
        for line in resisted:
            self._tell("checkpoint not deleted", step=save.place.step, reason=line)

    def _rest(self, save: Save, error: Unavailable) -> None:
        with self._changed:
            save.error, save.resting = error, True
            self._changed.notify_all()
        reason = f"{error}; its files stay in {save.folder} and are sent with the next save"
        self._tell("save delayed", step=save.place.step, reason=reason)

    def _refuse(self, save: Save, error: Refused | OSError) -> None:
        """This rank cannot save that step; the part that says so tells rank 0, which waits for it."""
        if save.part.rank == 0 or save.part.refused is not None:
            self._fail(save, error, fatal=False)
            return
        with self._changed:
            save.error, save.unsent, save.written = error, [], True
            save.part = replace(save.part, files=(), refused=str(error))
            self._changed.notify_all()

    def _tell(self, name: str, **fields: object) -> None:
        with suppress(OSError):  # a disk too full for an event does not end the thread that could still save
            self._event(name, **fields)

    def _fail(self, save: Save, error: Exception, fatal: bool = True) -> None:
        if save.dropped:  # its local files went with it
            return
        with self._changed:
            save.error, save.failed = error, True
            self.given_up.add(save.place.step)
            if fatal:
                self.failure = error
            self._changed.notify_all()
        name = "save refused" if isinstance(error, Refused) else "save failed"
        self._tell(name, step=save.place.step, reason=str(error))


def _make(folder: Path) -> None:
    """Again as often as another rank of this node removes the parent, which was empty, before this one is in it."""
    for _ in range(1000):
        with suppress(FileNotFoundError, FileExistsError):  # the latter: it was there, and gone at the second look
            return folder.mkdir(parents=True, exist_ok=True)
        time.sleep(random.uniform(0.0, 0.001))  # out of step with the other
    return folder.mkdir(parents=True, exist_ok=True)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another rank of this node still has files in it
        folder.parent.rmdir()
