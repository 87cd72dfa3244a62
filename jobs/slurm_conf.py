"""The configuration of the local SLURM: settings in, text of slurm.conf, cgroup.conf and /etc/hosts out."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONTROLLER = "controller"
LOOPBACK = "127.0.0.1"  # of all daemons: their ports tell them apart


@dataclass(frozen=True)
class Settings:
    """What one may want different; the times are short, because a demo and tests wait for them."""

    nodes: int = 2
    cpus: int = 8  # a node's, whatever this machine has: nodes share its cores
    slurmd_timeout_s: int = 10  # without a word from a node for so long, it is down and its jobs are requeued
    grace_s: int = 30  # from the signal to the end, for a job of partition `low` that is preempted
    kill_wait_s: int = 5  # from SIGTERM to SIGKILL
    cred_expire_s: int = 5  # a requeued job waits for so long; 5 is the least that works


def node_names(settings: Settings) -> list[str]:
    return [f"node{number}" for number in range(1, settings.nodes + 1)]


@dataclass(frozen=True)
class Place:
    """Where a cluster lives: its folder, the one for its unix sockets, its ports (the controller's, the nodes')."""

    directory: Path
    sockets: Path
    ports: Sequence[int]
    hostnames: bool  # controller and nodes have names of their own, which lead to the loopback


def slurm_conf(settings: Settings, place: Place, user: str) -> str:
    """slurm.conf, in the words of SLURM 22.05, which 23.11 understands too."""
    nodes = [
        f"NodeName={name} NodeHostname=localhost NodeAddr={LOOPBACK} Port={place.ports[number]}"
        f" CPUs={settings.cpus} RealMemory={memory_mb()} State=UNKNOWN"
        for number, name in enumerate(node_names(settings), start=1)
    ]
    return f"""ClusterName=local
SlurmctldHost=localhost({LOOPBACK})
SlurmctldPort={place.ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={place.sockets}/munge.sock,cred_expire={settings.cred_expire_s}
{listening(place.hostnames)}
StateSaveLocation="{place.directory}/state"
SlurmdSpoolDir={place.sockets}/spool/%n
SlurmctldPidFile="{place.directory}/run/slurmctld.pid"
SlurmdPidFile="{place.directory}/run/slurmd.%n.pid"
SlurmctldLogFile="{place.directory}/log/slurmctld.log"
SlurmdLogFile="{place.directory}/log/%n.log"
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
FirstJobId={first_job_id()}
MinJobAge=86400
KillWait={settings.kill_wait_s}
SlurmctldTimeout=60
SlurmdTimeout={settings.slurmd_timeout_s}
BatchStartTimeout=30
MessageTimeout=10
TCPTimeout=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{chr(10).join(nodes)}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace_s} State=UP
"""  # noqa: E501  (SLURM wants a partition on one line)


def listening(hostnames: bool) -> str:
    """Listen on the loopback alone, as far as names allow it: SLURM listens where the name of its host leads.

    Controller and nodes with names of their own are led there. An srun started outside of them goes by this machine's
    name, and is waited for at 127.0.0.1. What listens everywhere still takes only messages signed with our munge key.
    """
    try:
        everything = socket.gethostbyname(socket.gethostname()) == LOOPBACK
    except OSError:
        everything = False
    parameters = ["NoCtldInAddrAny"] * (everything or hostnames) + ["NoInAddrAny"] * everything
    return f"CommunicationParameters={','.join(parameters)}" if parameters else ""


def cgroup_conf(version: tuple[int, int]) -> str:
    """No control groups: they need root and systemd. Before 24.05 SLURM cannot be told so, but leaves version 1 alone.

    Seen with 22.05, 23.11 and 24.11, also where a machine has version 2 only.
    """
    return "CgroupPlugin=disabled\n" if version >= (24, 5) else "CgroupPlugin=cgroup/v1\n"


def hosts(settings: Settings) -> str:
    """The controller, the nodes, and this machine's /etc/hosts."""
    return f"{LOOPBACK} {CONTROLLER} {' '.join(node_names(settings))}\n" + Path("/etc/hosts").read_text()


def first_job_id() -> int:
    """From the clock: never the ids, so the log folders, of an earlier cluster."""
    return int(time.time() * 100) % 60_000_000 + 1


def memory_mb() -> int:
    """All of this machine's for each node: it is not counted out to jobs."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
