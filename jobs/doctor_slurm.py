"""What SLURM would do with a job of this site, and what such a job finds on its nodes."""

import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import submitit

from data_shards.errors import one_line
from jobs import slurm
from jobs.daemons import wait_until
from jobs.doctor import Finding
from jobs.launch import script_text, slurm_executor
from jobs.probe import REDUCE_S, REDUCED_BYTES, Reduced, Seen, probe
from jobs.site import ROOT, Site
from jobs.start import read_all

START_S = 60.0  # for the probe to get its nodes
ANSWER_S = 20.0  # for it to have looked, and to notice a signal
CLOCKS_S = 2.0  # between nodes


def look_at_slurm(site: Site) -> Iterator[Finding]:
    """From the login node. Raises SlurmError when SLURM does not answer."""
    config = dict(re.findall(r"^(\w+)\s*= (.*)$", slurm.ask("scontrol", "show", "config"), re.MULTILINE))
    for name in slurm.check_partition(site.used_partition, site.nodes):
        yield from _look_at_partition(site, name, config)
    yield _accepted(site)


def _look_at_partition(site: Site, name: str, config: dict[str, str]) -> Iterator[Finding]:
    shown = slurm.ask("scontrol", "show", "partition", name, "--oneliner", "--all")
    partition = dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)
    up = partition["State"] == "UP"
    states = slurm.ask("sinfo", "--noheader", "--partition", name, "--format", "%D %T").splitlines()
    counted = ", ".join(line.strip() for line in states)
    yield Finding("partition", up, f"{name} is {partition['State']}: {counted} ({config['SLURM_VERSION']})")
    yield _time_limit(site, name, partition["MaxTime"])
    yield _preemption(site, name, partition, config)


def _time_limit(site: Site, name: str, limit: str) -> Finding:
    minutes = _minutes(limit)
    if minutes is None or site.time_limit_min <= minutes:
        return Finding("time limit", True, f"{site.time_limit_min} min, {name} allows {limit.lower()}")
    return Finding(
        "time limit", False, f"{site.time_limit_min} min; {name} allows {minutes}: time_limit_min: {minutes}"
    )


def _minutes(limit: str) -> int | None:
    """SLURM's 2-12:00:00 or 12:30:00; None without a limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", limit)
    return (int(found[1] or 0) * 24 + int(found[2])) * 60 + int(found[3]) if found else None


def _preemption(site: Site, name: str, partition: dict[str, str], config: dict[str, str]) -> Finding:
    mode = partition.get("PreemptMode", "OFF")
    if mode == "OFF":
        return Finding("preemption", True, f"jobs of {name} are not preempted")
    if "REQUEUE" not in mode:
        return Finding("preemption", False, f"{name} ends preempted jobs ({mode}); ask for PreemptMode=REQUEUE")
    if "preempt_send_user_signal" not in config.get("SlurmctldParameters", ""):
        return Finding("preemption", None, "no signal comes before it: the steps since the last checkpoint are lost; "
                       "ask for SlurmctldParameters=preempt_send_user_signal")  # fmt: skip
    grace = int(partition.get("GraceTime", "0"))
    if grace < site.signal_delay_s:
        return Finding("preemption", None, f"requeued {grace} s after the signal; signal_delay_s reckons with "
                       f"{site.signal_delay_s}: a save that takes longer than {grace} s is lost")  # fmt: skip
    return Finding("preemption", True, f"signalled, and requeued after {grace} s")


def _accepted(site: Site) -> Finding:
    """SLURM's own word on account, QOS, constraint, GPUs, memory and whatever else the site asks for."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(script_text(site, "doctor", "s3://runs/doctor"))
        script.flush()
        try:
            slurm.ask("sbatch", "--test-only", script.name)
        except slurm.SlurmError as error:
            return Finding("job", False, f"{error}; check account, qos, constraint, gpus_per_node, memory_gb, extra")
    return Finding("job", True, f"SLURM would take one of {site.nodes} nodes x {site.ranks_per_node} ranks")


def look_at_nodes(site: Site, url: str) -> Iterator[Finding]:
    """Through a job of one rank a node, which looks around, waits for a signal, and is gone in half a minute."""
    name = f"doctor-{secrets.token_hex(4)}"
    folder = site.run_dir(name)
    folder.mkdir(parents=True)
    (folder / "snapshot").symlink_to(ROOT)
    try:
        job = _submitted(site, name, url)
        try:
            yield from _probed(site, folder, job)
        finally:
            slurm.cancel(job)
            wait_until(lambda: slurm.job_state(job) is None, ANSWER_S, 0.5)
    except submitit.core.utils.FailedJobError as error:
        yield Finding("nodes", False, f"SLURM refused the probe: {one_line(error)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _submitted(site: Site, name: str, url: str) -> str:
    alone = site.model_copy(update={"ranks_per_node": 1, "time_limit_min": 5, "signal_delay_s": 60})
    executor = slurm_executor(alone, name, url)
    executor.update_parameters(teardown=[])
    return str(executor.submit(probe, str(site.run_dir(name)), url, START_S + ANSWER_S).job_id)


def _probed(site: Site, folder: Path, job: str) -> Iterator[Finding]:
    def told(what: str, within_s: float) -> bool:
        return wait_until(lambda: len(list(folder.glob(f"{what}-*.json"))) == site.nodes, within_s, 0.2)

    if not told("seen", START_S):
        missing = site.nodes - len(read_all(folder, "seen-*", Seen))
        state, reason = slurm.job_state(job) or ("GONE", "it ended")
        says = f"{missing} of {site.nodes} nodes have not answered in {START_S:.0f} s ({state.lower()}, {reason})"
        yield Finding("nodes", None if state == "PENDING" else False, says)  # other jobs may have them
        return
    seen = read_all(folder, "seen-*", Seen)
    told("reduced", REDUCE_S + ANSWER_S)
    reduced = read_all(folder, "reduced-*", Reduced)
    slurm.signal_ranks(job)
    reached = told("signalled", ANSWER_S)
    says = f"reaches the ranks of all {site.nodes} nodes"
    yield Finding("signal", reached, says if reached else "does not reach all ranks: they cannot save before the end")
    yield from _told(site, seen)
    yield _network(site, reduced)


def _network(site: Site, reduced: list[Reduced]) -> Finding:
    """What the slowest says: they all wait for each other."""
    broken = [f"{one.host}: {one.error}" for one in reduced if one.error]
    if broken or len(reduced) < site.nodes:
        hint = "set the site's `interface` to the network that the nodes share, and open it between them"
        return Finding("network", False, f"no all-reduce over {site.nodes} nodes ({'; '.join(broken[:3])}); {hint}")
    if site.nodes == 1:
        return Finding("network", True, "one node: nothing crosses it")
    gb_s = min(one.gb_s or 0.0 for one in reduced)
    size = f"{REDUCED_BYTES >> 20} MiB over {site.nodes} nodes ({reduced[0].backend}, a rank each)"
    return Finding("network", True, f"all-reduce of {size}: {gb_s:.2f} GB/s")


def _told(site: Site, seen: list[Seen]) -> Iterator[Finding]:
    broken = [f"{one.host}: {one.store}" for one in seen if one.store]
    yield Finding(
        "nodes' store", not broken, "; ".join(broken) or f"put and read on {len(seen)} nodes, with the job's keys"
    )
    clocks = [one.ahead_s for one in seen if one.ahead_s is not None]
    apart = max(clocks) - min(clocks) if clocks else 0.0
    worst = max(seen, key=lambda one: abs(one.ahead_s or 0.0)).host
    near = apart <= CLOCKS_S
    yield Finding("nodes' clocks", near, f"{apart:.1f} s apart" + ("" if near else f"; start chrony on {worst}"))
    few = [f"{one.host} has {one.gpus}" for one in seen if one.gpus < site.gpus_per_node]
    says = f"{min(one.gpus for one in seen)} on each, gpus_per_node is {site.gpus_per_node}"
    yield Finding("nodes' GPUs", not few, "; ".join(few) or says)
