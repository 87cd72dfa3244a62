"""A trainer of a few lines in the place of pipeline.train, so that jobs are tested without training anything.

Its ranks meet at the launch's address and take `steps` steps of 0.1 s together, so that a dead one is everyone's error;
rank 0 "commits" a checkpoint every `save_every` steps; each says where it began and what it saw around itself.
Config: steps, save_every; die_at (a step), die_from (dies only in a start from there), die_rank, die_how ("kill",
"error", "mendable"); late_rank (never comes to train).
"""

import shutil
from pathlib import Path

import jobs.site

CONFIG = """
from pathlib import Path
from types import SimpleNamespace


class Config(dict):
    @property
    def checkpoint(self):
        return SimpleNamespace(folder=lambda run_dir: Path(self.get("local_dir") or run_dir / "checkpoints"))

    @property
    def reader(self):
        return SimpleNamespace(retry_seconds=60.0)


def parse(values, name):
    return Config(values)
"""
TRAIN = '''
import ctypes, json, os, re, signal, socket, sys, time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from data_shards.errors import UserError
from data_shards.store import Store


@dataclass(frozen=True)
class Launch:
    run_dir: str
    store: str
    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    master_addr: str
    master_port: int
    stop_budget_s: float = 60.0
    host: str = ""
    requeue: Callable[[], None] | None = None
    hung: Callable[[Exception], None] | None = None
    over: Callable[[str], None] = lambda outcome: None


def run_rank(config, launch):
    if "late_rank" in config:
        wait_for_late(config["late_rank"], launch)
    outcome = train(config, launch)
    launch.over(outcome)
    return outcome


def wait_for_late(late, launch):
    # one rank is still at what comes before the training; the others wait for it as torch's rendezvous does, in C
    say(launch, 0)
    if launch.rank == late:
        time.sleep(600)
    signal.signal(signal.SIGUSR2, lambda *_: None)
    mutex, c = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    for _ in range(2):
        c.pthread_mutex_lock(mutex)


def train(config, launch):
    asked = []
    signal.signal(signal.SIGUSR2, lambda *_: asked.append("preempted"))
    signal.signal(signal.SIGTERM, lambda *_: None)
    store = Store(launch.store)
    steps = [int(m[1]) for e in store.list("checkpoints") if (m := re.search(r"step-(\\d+)-a1/MANIFEST", e.path))]
    step = first = max(steps, default=0)
    together = meet(launch)
    say(launch, first)
    stop = False
    while step < config["steps"] and not stop:
        time.sleep(0.1)
        step += 1
        mine = (step, launch.rank) == (config.get("die_at"), config.get("die_rank"))
        if mine and config.get("die_from", first) == first:
            die(config["die_how"])
        if step % config["save_every"] == 0:
            save(store, launch, step)
        stop = together(bool(asked))
    if not stop:
        return "finished"
    save(store, launch, step)
    if (Path(launch.run_dir) / "cancel").exists():
        return "cancelled"
    together(False)
    if launch.requeue is not None:
        launch.requeue()
    return "preempted"


def meet(launch):
    """Returns a function that all ranks call together: whether any of them was given True."""
    if launch.rank == 0:
        server = socket.create_server((launch.master_addr, launch.master_port))
        server.settimeout(30)
        others = [server.accept()[0] for _ in range(launch.world_size - 1)]

        def collect(mine):
            told = max([bytes([mine])] + [receive(other) for other in others])
            for other in others:
                other.sendall(told)
            return told == b"\x01"

        return collect
    deadline = time.monotonic() + 30
    while True:
        try:
            first = socket.create_connection((launch.master_addr, launch.master_port), timeout=30)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)

    def exchange(mine):
        first.sendall(bytes([mine]))
        return receive(first) == b"\x01"

    return exchange


def receive(connection):
    byte = connection.recv(1)
    if not byte:
        raise RuntimeError("connection closed by peer")
    return byte


def say(launch, step):
    names = ("SECRET_THING", "OMP_NUM_THREADS", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK")
    line = {"step": step, "rank": launch.rank, "local_rank": launch.local_rank, "world": launch.world_size,
            "node": os.environ.get("SLURMD_NODENAME"), "code": __file__, **{n: os.environ.get(n) for n in names}}
    with open(Path(launch.run_dir) / f"said-{launch.rank}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")


def save(store, launch, step):
    if launch.rank == 0:
        store.put(f"checkpoints/step-{step:09d}-a1/MANIFEST.json", b"{}")


def die(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("conf/x.yaml: data.lanes: 3 does not divide") if how == "mendable" else RuntimeError("out of luck")
'''


def make(folder: Path) -> Path:
    """A copy of the code with the stand-in in the place of the trainer; give it to `launch` as `code`."""
    for package in ("data_shards", "jobs"):
        shutil.copytree(jobs.site.ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pipeline").mkdir()
    for name, text in (("__init__", ""), ("config", CONFIG), ("train", TRAIN)):
        (folder / "pipeline" / f"{name}.py").write_text(text)
    return folder
