"""What can happen to a run. Each fault waits for its moment, strikes, and returns the moment in words.

A fault leaves the rest to the product: what follows must end with the rows of the undisturbed run. `Scene.repair`
brings back what of the machine itself a fault took away.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_shards.errors import UserError
from jobs import local_slurm, runs, slurm
from jobs.chaos.proxy import Mode
from jobs.chaos.trial import SETTINGS, Trial
from jobs.daemons import Process, processes, wait_until
from jobs.local_slurm import Record, with_step_daemons
from pipeline import commit

AWAY_S = 15.0  # the store is away for so long: longer than the watchdog's floor
Fault = Callable[[Trial], str]


def preempted(trial: Trial) -> str:
    """A job of a higher partition takes all nodes."""
    moment = _now(trial)
    nodes = f"--nodes={trial.scene.slurm.nodes}"
    slurm.ask("sbatch", "--partition=main", nodes, "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    return moment


def requeued(trial: Trial) -> str:
    """`scontrol requeue` by hand."""
    moment = _now(trial)
    slurm.requeue(trial.job.id)
    return moment


def out_of_time(store_away: bool) -> Fault:
    """The time limit: the ranks stand still until SLURM's signal, with which it lets them go on.

    With the store away for as long, the last save does not arrive before the end.
    """

    def fault(trial: Trial) -> str:
        moment, ranks = _now(trial), trial.ranks()
        trial.hit(ranks, signal.SIGSTOP)
        if store_away:
            trial.scene.proxy.mode = "refuse"
        try:
            _limit(trial, _soon(trial))
            trial.wait(lambda: _told(trial, "requeued" if store_away else "preempted"), "what follows the time limit")
        finally:
            if store_away:
                trial.scene.proxy.mode = "pass"
            _limit(trial, trial.scene.site.time_limit_min)  # a busy machine needs most of a minute to start
            trial.hit(ranks, signal.SIGCONT)
        return moment

    return fault


def struck(number: signal.Signals, everyone: bool = False) -> Fault:
    """A rank, or all of them, are killed or stopped; of a stop the watchdogs of the others take notice."""

    def fault(trial: Trial) -> str:
        moment, ranks = _now(trial), trial.ranks()
        trial.hit(ranks if everyone else [trial.rng.choice(ranks)], number)
        return moment

    return fault


def node_killed(trial: Trial) -> str:
    """A node's slurmd, its steps' daemons and its tasks, at once; SLURM notices by its silence."""
    moment, victim = _now(trial), trial.rng.choice(trial.ranks()).host
    kill_at_once([_record(trial).running[victim], *on_node(victim, trial.job.id)])
    return f"{moment}, {victim}"


def controller_killed(trial: Trial) -> str:
    """slurmctld dies and comes back."""
    moment = _now(trial)
    with _without_controller(trial):
        return moment


def rank_killed_without_controller(trial: Trial) -> str:
    """A rank dies, and nobody takes the requeue: slurmctld is away for a while."""
    moment = _now(trial)
    with _without_controller(trial):
        trial.hit([trial.rng.choice(trial.ranks())], signal.SIGKILL)
        trial.wait(lambda: _told(trial, "requeued"), "the end of the start")
        time.sleep(AWAY_S)
    return moment


def killed_while(what: str, there: Callable[[Trial], bool]) -> Fault:
    """All ranks die as soon as a save is that far; a slow store makes the moment long enough to be met."""

    def fault(trial: Trial) -> str:
        trial.somewhere()
        trial.scene.proxy.mode = "slow"
        trial.wait(lambda: there(trial), what)
        moment = f"step {trial.step}"
        trial.hit(trial.ranks(), signal.SIGKILL)
        trial.scene.proxy.mode = "pass"
        return f"{moment}, {what}"

    return fault


def store(mode: Mode, at: str = "training") -> Fault:
    """The store misbehaves for a while: during training, from the middle of a save on, or while the run resumes."""

    def fault(trial: Trial) -> str:
        moment = trial.somewhere()
        if at == "a save":
            trial.wait(lambda: _saving(trial), "a save")
        trial.hit_at = time.time()
        if at == "the resume":
            trial.hit(trial.ranks(), signal.SIGKILL)
        trial.scene.proxy.mode = mode
        end = time.monotonic() + AWAY_S
        trial.wait(lambda: time.monotonic() > end or runs.state(trial.job) is None, "the end of the fault")
        trial.scene.proxy.mode = "pass"
        return f"{moment}, {at}"

    return fault


def disk_full(trial: Trial) -> str:
    """No room for the next save on the node's disk."""
    assert trial.scene.disk is not None  # else it is not drawn
    moment = _now(trial)
    with _full(trial.scene.disk):
        trial.wait(lambda: _save_lost(trial), "a full disk")
    return moment


def _limit(trial: Trial, minutes: int) -> None:
    with suppress(slurm.SlurmError):  # refused when the job is over
        slurm.ask("scontrol", "update", f"JobId={trial.job.id}", f"TimeLimit={minutes}")


def _soon(trial: Trial) -> int:
    """A time limit in minutes that the job reaches in half a minute at least, so that the signal comes first."""
    used = slurm.ask("squeue", "--noheader", "--job", trial.job.id, "--format", "%M").strip()
    minutes, seconds = map(int, used.split(":")[-2:]) if used else (0, 0)
    return (60 * minutes + seconds + 30) // 60 + 1


def _told(trial: Trial, event: str) -> bool:
    return any(one["event"] == event for one in runs.history(trial.run_dir))


def _save_lost(trial: Trial) -> bool:
    """Rank 0 found no room, or another rank did and says so in its part."""
    return _told(trial, "save failed") or _told(trial, "save refused")


def _saving(trial: Trial) -> bool:
    """A save is being written to the local disk."""
    local = trial.scene.config.checkpoint.folder(trial.run_dir)
    return any(local.glob(f"{trial.run_dir.name}-*/step-*/rank-*"))


def _uploading(trial: Trial) -> bool:
    """The store has a part of a checkpoint that is none yet."""
    return any(commit.MANIFEST not in objects for objects in commit.survey(trial.store).values())


def _before_manifest(trial: Trial) -> bool:
    """All ranks have sent their parts, and the manifest is not there."""
    everyone = set(range(trial.scene.site.ranks))
    return any(
        commit.MANIFEST not in objects and commit.ranks_present(objects) >= everyone
        for objects in commit.survey(trial.store).values()
    )


FAULTS: dict[str, Fault] = {
    "preempted by a higher partition": preempted,
    "requeued by hand": requeued,
    "time limit": out_of_time(store_away=False),
    "time limit while the store is away": out_of_time(store_away=True),
    "a rank killed": struck(signal.SIGKILL),
    "all ranks killed": struck(signal.SIGKILL, everyone=True),
    "a node killed": node_killed,
    "the controller killed": controller_killed,
    "a rank killed while the controller is away": rank_killed_without_controller,
    "a rank hangs": struck(signal.SIGSTOP),
    "killed during a save": killed_while("a save is written", _saving),
    "killed during an upload": killed_while("a save is uploaded", _uploading),
    "killed before the manifest": killed_while("all parts are there", _before_manifest),
    "the store refuses": store("refuse"),
    "the store cuts answers": store("cut"),
    "the store is slow": store("slow"),
    "the store is silent": store("silent"),
    "the store refuses during a save": store("refuse", "a save"),
    "the store refuses at the resume": store("refuse", "the resume"),
    "the local disk is full": disk_full,
}


def _now(trial: Trial) -> str:
    """Wait for the moment, and note it."""
    moment = trial.somewhere()
    trial.hit_at = time.time()
    return moment


def _record(trial: Trial) -> Record:
    record = Record.load(trial.scene.slurm.directory)
    assert record is not None
    return record


@contextmanager
def _without_controller(trial: Trial) -> Iterator[None]:
    controller = _record(trial).running["slurmctld"]
    controller.send(signal.SIGKILL)
    wait_until(lambda: not controller.running(), 10)
    try:
        yield
    finally:
        local_slurm.start_slurm(trial.scene.slurm.directory, SETTINGS)


def kill_at_once(victims: Sequence[Process]) -> None:
    """As when a machine loses its power: none of them sees another one go, and tells."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in victims:
            process.send(number)


def on_node(node: str, job: str) -> list[Process]:
    """What a job runs on a node, with the daemons of its steps.

    By the job's id too: other clusters of this machine have nodes of the same names.
    """

    def there(process: Process) -> bool:
        variables = process.environment()
        return (variables.get("SLURMD_NODENAME"), variables.get("SLURM_JOB_ID")) == (node, job)

    return with_step_daemons(filter(there, processes()))


@contextmanager
def _full(disk: Path) -> Iterator[None]:
    """Take all the room of a small file system of our own, also what a save that has arrived gives back."""
    if not disk.is_mount():
        raise UserError(f"{disk}: the small disk is gone; it must not be this machine's own that is filled")
    over, filler = threading.Event(), disk / "filler"
    thread = threading.Thread(target=_fill, args=(filler, over), name="filler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        filler.unlink(missing_ok=True)


def _fill(filler: Path, over: threading.Event) -> None:
    with filler.open("wb", buffering=0) as file:
        while not over.wait(0.0005):
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
