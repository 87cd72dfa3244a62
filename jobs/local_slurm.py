"""A real SLURM of several nodes on this machine: munged, slurmctld and a slurmd a node, everything in one folder.

    DIR/etc           slurm.conf and what belongs to it
    DIR/env.sh        for a shell: `. DIR/env.sh`, then sinfo, squeue, sbatch work
    DIR/log, state    what the daemons wrote and remember: jobs are known after a stop and a start
    DIR/cluster.json  settings, ports and processes

Works as root, where each node gets a hostname of its own that resolves, and as any user, where all nodes share
this machine's and MASTER_ADDR says where rank 0 is. It needs Debian's or Ubuntu's packages (PACKAGES). Unix sockets
want short paths that all can enter: where DIR is not so, they lie in a folder below /tmp, which `stop` removes.
"""

import json
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_shards.errors import UserError
from data_shards.whole import PRIVATE, write_whole
from jobs import daemons, slurm_conf
from jobs.daemons import Process
from jobs.site import export_lines
from jobs.slurm_conf import Settings

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
LONGEST_SOCKET = 107  # bytes of a path that the kernel takes
LONGEST_STEP_SOCKET = len("/spool/node99/node99_60000000.4294967291")


class OtherSettings(UserError):
    """It runs already, and not as asked for; its jobs would have to die for that."""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. `stop()` cancels its jobs and leaves no process."""

    directory: Path
    nodes: int
    hostnames: bool  # each node has a name of its own

    def environment(self) -> dict[str, str]:
        """What a program needs to submit to it and, without hostnames, to meet rank 0."""
        where = {} if self.hostnames else {"MASTER_ADDR": "127.0.0.1"}
        return {"SLURM_CONF": str(self.directory / "etc" / "slurm.conf")} | where

    def stop(self) -> None:
        stop_slurm(self.directory)


@dataclass
class Record:
    """What cluster.json holds."""

    settings: Settings
    sockets: Path
    ports: list[int]
    hostnames: bool
    running: dict[str, Process] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "Record | None":
        try:
            found = json.loads((directory / "cluster.json").read_text())
            running = {name: Process(**process) for name, process in found["running"].items()}
            sockets, settings = Path(found["sockets"]), Settings(**found["settings"])
            return cls(settings, sockets, found["ports"], found["hostnames"], running)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def save(self, directory: Path) -> None:
        write_whole(directory / "cluster.json", json.dumps(asdict(self), default=str), PRIVATE)

    def alive(self) -> dict[str, Process]:
        return {name: process for name, process in self.running.items() if not daemons.gone(process)}


def missing_programs() -> list[str]:
    """The programs of SLURM that are not installed here."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def why_not() -> str | None:
    """What keeps SLURM from running on this machine, and what to do about it; None where nothing does."""
    if missing := missing_programs():
        return f"SLURM is not installed here ({', '.join(missing)}); apt install {' '.join(PACKAGES)}"
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:  # its daemons would stand still for ten seconds at each look
        hint = f"as root: echo 127.0.1.1 {name} >> /etc/hosts"
        return f"SLURM looks up this machine's name, {name}, which has no address; {hint}"
    return None


def start_slurm(directory: Path, settings: Settings | None = None, timeout_s: float = 60.0) -> Slurm:
    """Start the cluster, or what of it does not run; returns when all nodes take jobs.

    Raises UserError when it cannot run here or does not come up, OtherSettings when it runs with others.
    """
    directory, settings = directory.resolve(), settings or Settings()
    if (why := why_not()) is not None:
        raise UserError(why)
    with daemons.exclusively(directory / "lock"):
        record = Record.load(directory)
        if record and record.alive() and record.settings != settings:
            raise OtherSettings(f"{directory}: {_difference(record.settings, settings)}; make cluster-down first")
        for _ in range(2):  # a port may be taken by another process between the look and its use
            if not (record and record.alive()):
                record = _prepare(directory, settings, record)
            if _bring_up(directory, record, timeout_s):
                return Slurm(directory, settings.nodes, record.hostnames)
            why = _complaint(directory)
            _stop(directory, record)
    raise UserError(f"{directory}: the local SLURM does not come up: {why} (see {directory / 'log'})")


def stop_slurm(directory: Path) -> None:
    """Cancel all jobs, end the daemons and whatever the jobs left running. Logs and the memory of jobs stay."""
    directory = directory.resolve()
    with daemons.exclusively(directory / "lock"):
        if record := Record.load(directory):
            _stop(directory, record)


def running_slurm(directory: Path) -> Slurm | None:
    """The cluster of this folder if all its daemons run; starts nothing."""
    directory = directory.resolve()
    record = Record.load(directory)
    if record and len(record.alive()) == record.settings.nodes + 2:
        return Slurm(directory, record.settings.nodes, record.hostnames)
    return None


def call(directory: Path, *command: str) -> str:
    """The output of a SLURM command on this cluster; empty when it fails or takes too long."""
    try:
        done = subprocess.run(command, env=_environment(directory), capture_output=True, text=True, timeout=15)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _difference(running: Settings, wanted: Settings) -> str:
    pairs = ((name, value, asdict(wanted)[name]) for name, value in asdict(running).items())
    return "SLURM runs with " + ", ".join(f"{name} {now}, not {then}" for name, now, then in pairs if now != then)


def _prepare(directory: Path, settings: Settings, before: Record | None) -> Record:
    """Folders, key and configuration of a cluster of which nothing runs; ports as before where they are free."""
    for name in ("etc", "run", "log", "state"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    ports = before.ports if before else []
    if len(ports) != settings.nodes + 1 or not all(map(daemons.is_free, ports)):
        ports = daemons.free_ports(settings.nodes + 1)
    record = Record(settings, _socket_folder(directory / "run"), ports, _can_name_hosts())
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise UserError(f"user {os.getuid()} has no name here, and SLURM wants one") from None
    etc = directory / "etc"
    place = slurm_conf.Place(directory, record.sockets, ports, record.hostnames)
    (etc / "slurm.conf").write_text(slurm_conf.slurm_conf(settings, place, user))
    (etc / "cgroup.conf").write_text(slurm_conf.cgroup_conf(_version()))
    (etc / "hosts").write_text(slurm_conf.hosts(settings))
    shell = Slurm(directory, settings.nodes, record.hostnames).environment()
    (directory / "env.sh").write_text("".join(f"{line}\n" for line in export_lines(shell)))
    record.save(directory)
    return record


def _bring_up(directory: Path, record: Record, timeout_s: float) -> bool:
    """Start what does not run; whether all nodes answer before the time is up or a daemon is dead."""
    _make_key(record.sockets / "key")
    running = record.alive()
    for name, command in _commands(directory, record):
        if name not in running:
            record.running[name] = daemons.spawn(command, _environment(directory), directory / "log" / f"{name}.out")
            record.save(directory)
        if name == "munged" and not daemons.wait_until((record.sockets / "munge.sock").is_socket, 10):
            return False
    wanted = set(slurm_conf.node_names(record.settings))

    def settled() -> bool:
        return _ready_nodes(directory) >= wanted or len(record.alive()) < len(record.running)

    return daemons.wait_until(settled, timeout_s) and len(record.alive()) == len(record.running)


def _commands(directory: Path, record: Record) -> Iterator[tuple[str, list[str]]]:
    sockets, key = record.sockets, record.sockets / "key"
    yield (
        "munged",
        [
            _found("munged"),
            "--foreground",
            f"--socket={sockets}/munge.sock",
            f"--key-file={key}/munge.key",
            f"--pid-file={sockets}/munged.pid",
            f"--log-file={key}/munged.log",
            f"--seed-file={key}/munged.seed",
            "--num-threads=4",
        ],
    )
    controller = [_found("slurmctld"), "-D"]
    yield "slurmctld", _named(slurm_conf.CONTROLLER, controller, directory) if record.hostnames else controller
    for name in slurm_conf.node_names(record.settings):
        (sockets / "spool" / name).mkdir(parents=True, exist_ok=True)
        node = [_found("slurmd"), "-D", "-N", name]
        yield name, _named(name, node, directory) if record.hostnames else node


def _named(name: str, command: list[str], directory: Path) -> list[str]:
    """The command in a view of the machine in which the hostname is `name` and /etc/hosts knows the whole cluster."""
    script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
    namespaces = [_found("unshare"), "--uts", "--mount", "--propagation", "slave"]
    return [*namespaces, "sh", "-c", script, "sh", name, str(directory / "etc" / "hosts"), *command]


def _ready_nodes(directory: Path) -> set[str]:
    rows = [line.split() for line in call(directory, "sinfo", "-h", "-N", "-o", "%N %t").splitlines()]
    return {row[0] for row in rows if len(row) == 2 and row[1] in ("idle", "mix", "alloc", "comp")}


def _stop(directory: Path, record: Record) -> None:
    running = record.alive()
    if "slurmctld" in running and _ready_nodes(directory):
        call(directory, "scancel", "--quiet", f"--user={os.getuid()}")
        most = record.settings.kill_wait_s + 5.0
        daemons.wait_until(lambda: not call(directory, "squeue", "-h").strip(), most, every_s=0.2)
    for process in reversed(running.values()):
        daemons.stop(process)
    for process in _leftovers(directory):
        daemons.stop(process, timeout_s=1.0)
    record.running.clear()
    record.save(directory)
    if record.sockets != directory / "run":
        shutil.rmtree(record.sockets, ignore_errors=True)


def _leftovers(directory: Path) -> list[Process]:
    """What outlives a slurmd: its step daemons, and the tasks of steps whose daemon was killed."""
    conf = str(directory / "etc" / "slurm.conf")

    def ours(process: Process) -> bool:
        variables = process.environment()
        return variables.get("SLURM_CONF") == conf and ("SLURM_JOB_ID" in variables or process.name() == "slurmstepd")

    return with_step_daemons(process for process in daemons.processes() if process.pid != os.getpid() and ours(process))


def with_step_daemons(tasks: Iterable[Process]) -> list[Process]:
    """The tasks and, each once, their parents among SLURM's step daemons: since 24.11 these show no environment."""
    found: dict[Process, None] = {}
    for task in tasks:
        parent = task.parent()
        daemon = [parent] if parent is not None and parent.name() == "slurmstepd" else []
        found |= dict.fromkeys([task, *daemon])
    return list(found)


def _environment(directory: Path) -> dict[str, str]:
    """Little, and nothing of a job inside which we may run ourselves."""
    return {"PATH": PATH, "HOME": str(directory), "LANG": "C", "SLURM_CONF": str(directory / "etc" / "slurm.conf")}


def _found(program: str) -> str:
    found = shutil.which(program, path=PATH)
    if not found:
        raise UserError(f"{program} is not installed here")
    return found


def _version() -> tuple[int, int]:
    """SLURM's, as (year, month)."""
    said = subprocess.run([_found("slurmctld"), "-V"], capture_output=True, text=True, env={"PATH": PATH}).stdout
    match = re.search(r"(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _can_name_hosts() -> bool:
    if os.getuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0


def _make_key(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / "munge.key").exists():
        write_whole(folder / "munge.key", secrets.token_hex(64), PRIVATE)


def _socket_folder(inside: Path) -> Path:
    """The folder for sockets and munge's key: the one inside DIR when sockets work there, else one below /tmp."""
    inside.chmod(0o755)
    if _takes_sockets(inside):
        return inside
    outside = Path(tempfile.mkdtemp(prefix="farseer-slurm-", dir="/tmp"))  # TMPDIR may be long
    outside.chmod(0o755)
    return outside


def _takes_sockets(folder: Path) -> bool:
    """Short, no blanks; all can enter and nobody else can write, all the way, as munge demands; and it works."""
    if len(os.fsencode(folder)) + LONGEST_STEP_SOCKET > LONGEST_SOCKET or re.search(r"[\s,=]", str(folder)):
        return False
    for place in (folder, *folder.parents):
        found = place.stat()
        writable = found.st_mode & 0o022 and not found.st_mode & 0o1000
        if writable or not found.st_mode & 0o001 or found.st_uid not in (0, os.getuid()):
            return False
    probe = folder / "probe.sock"
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.bind(str(probe))
        except OSError:
            return False
    probe.unlink()
    return True


def _complaint(directory: Path) -> str:
    """The last error that a daemon wrote, but for those that only say that it failed."""
    logs = sorted((directory / "log").iterdir(), key=lambda path: path.stat().st_mtime)
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()[-20:]]
    errors = [line for line in lines if re.search(r"error|fatal", line, re.IGNORECASE)]
    errors = [line for line in errors if not re.search(r"initialization failed|Unable to initialize", line)] or errors
    return (errors or lines or ["no daemon wrote a word"])[-1].strip()
