"""What a doctor says of this machine, of folders and of a site whose SLURM answers as told; real ones in tests/real."""

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import daemons, doctor, doctor_slurm, probe
from jobs.cli import main
from jobs.doctor import Finding, examine
from jobs.probe import Reduced
from jobs.site import Site


@pytest.fixture(autouse=True)
def no_key_of_ours(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "shared").mkdir()
    return Site(name="here", executor="local", shared_dir=str(tmp_path / "shared"))


def found(site: Site, what: str, folder: Path) -> Finding:
    return next(one for one in examine(site, f"file://{folder}/store") if one.what == what)


def test_a_folder_that_works_is_ok_and_nothing_is_left_in_it(site, tmp_path):
    said = {one.what: one.ok for one in examine(site, f"file://{tmp_path}/store")}
    assert {said[what] for what in ("store", "store speed", "conditions", "shared disk", "hosts")} == {True}
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two partitions, `a` of which is the default one, in the place of SLURM."""
    answers = {
        "sinfo": r"""case "$*" in
            *%P\|%D*) printf 'a*|4\nb|8\n' ;;
            *) echo '4 idle' ;;
            esac""",
        "scontrol": r"""case "$*" in
            "show partition a "*) echo 'PartitionName=a State=UP MaxTime=1-00:00:00 PreemptMode=OFF' ;;
            "show partition b "*) echo 'PartitionName=b State=DOWN MaxTime=01:00:00 PreemptMode=OFF' ;;
            "show config") printf 'SlurmctldParameters = (null)\nSLURM_VERSION = 23.11\n' ;;
            *) echo 'not found' >&2; exit 1 ;;
            esac""",
        "sbatch": "",
        "srun": "",
    }
    for name, script in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_CONF", raising=False)


def looks(site: Site) -> list[tuple[str, str]]:
    """What is found of partitions, and which one it is about."""
    found = [one for one in doctor_slurm.look_at_slurm(site) if one.what in ("partition", "time limit")]
    return [(one.what, "b" if re.search(r"\bb\b", one.says) else "a") for one in found]


@pytest.mark.usefixtures("slurm")
def test_the_partition_of_who_submits_is_looked_at_where_the_site_leaves_it_open(tmp_path, monkeypatch):
    site = Site(shared_dir=str(tmp_path), nodes=2)
    assert looks(site) == [("partition", "a"), ("time limit", "a")]
    monkeypatch.setenv("SBATCH_PARTITION", "b")
    assert looks(site) == [("partition", "b"), ("time limit", "b")]
    assert looks(site.model_copy(update={"nodes": 8})) == [("partition", "b"), ("time limit", "b")]
    assert looks(site.model_copy(update={"partition": "a"})) == [("partition", "a"), ("time limit", "a")]


@pytest.mark.usefixtures("slurm")
def test_of_several_partitions_each_is_looked_at(tmp_path):
    both = [("partition", "a"), ("time limit", "a"), ("partition", "b"), ("time limit", "b")]
    assert looks(Site(shared_dir=str(tmp_path), partition="a,b")) == both


def test_a_shared_folder_that_is_not_yet_there_is_looked_at_where_it_will_be(site, tmp_path):
    site = site.model_copy(update={"shared_dir": str(tmp_path / "not" / "yet")})
    said = found(site, "shared disk", tmp_path)
    assert said.ok
    assert f"it is yet to be made, in {tmp_path}: see that this is a disk that all nodes share" in said.says
    assert not (tmp_path / "not").exists()


def test_a_shared_folder_that_cannot_be_written_is_bad_and_says_what_to_set(site, tmp_path):
    site = site.model_copy(update={"shared_dir": "/proc/nowhere"})
    said = found(site, "shared disk", tmp_path)
    assert said.ok is False
    assert "shared_dir" in said.says


@pytest.mark.slow
def test_a_disk_that_does_not_answer_is_a_finding_and_holds_up_no_other(site, tmp_path, monkeypatch):
    there = threading.Event()
    monkeypatch.setattr(doctor, "_disk", lambda site: iter(there.wait, True))
    monkeypatch.setattr(doctor, "LOOK_S", 5.0)
    said = {one.what: one for one in examine(site, f"file://{tmp_path}/store")}
    there.set()
    assert said["shared disk"].line().split(maxsplit=3)[3] == "no answer for 5 s"
    assert said["hosts"].ok


def test_a_look_with_an_error_that_nobody_thought_of_is_a_finding(site, tmp_path, monkeypatch):
    def broken(site: Site) -> None:
        raise TypeError("no number")

    monkeypatch.setattr(doctor, "_disk", broken)
    said = found(site, "cannot look", tmp_path)
    assert (said.ok, said.says) == (False, "no number")


def test_too_little_room_is_bad(site, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "FREE_BYTES", 1e18)
    assert found(site, "disk room", tmp_path).says.startswith("only ")


def test_a_wandb_key_is_noticed_and_never_shown(site, tmp_path, monkeypatch):
    assert found(site, "W&B", tmp_path).ok is None
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password planted-secret\n")
    said = found(site, "W&B", tmp_path)
    assert said.ok
    assert "planted" not in said.says


def test_a_wandb_key_in_the_environment_alone_does_not_reach_the_job(site, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    assert found(site, "W&B", tmp_path).ok
    (said,) = doctor._wandb(site.model_copy(update={"executor": "slurm"}))
    assert said.ok is False
    assert "netrc" in said.says
    assert "planted" not in said.says


def test_hosts_that_failed_lately_are_listed_with_what_becomes_of_them(site, tmp_path):
    now = time.time()
    blamed = [("node3", 60, "signal 9"), ("node3", 50, "Bus error"), ("node5", 40, "ECC"), ("node7", 999_999, "old")]
    lines = [{"host": host, "time": now - ago, "run": "first", "reason": why} for host, ago, why in blamed]
    for user, own in ((1, lines[:1]), (2, lines[1:])):
        text = "".join(json.dumps(line) + "\n" for line in own)
        (tmp_path / "shared" / f"hosts-{user}.jsonl").write_text(text)
    said = [one.says for one in examine(site, f"file://{tmp_path}/store") if one.what == "host"]
    assert len(said) == 2
    assert said[0].startswith("node3: to blame 2x, 0.0 h ago in first (Bus error); kept out of the next start")
    assert said[1].endswith("kept out if it fails once more")


def test_a_card_that_is_missing_is_bad_where_the_site_counts_on_it(site, tmp_path, monkeypatch):
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 570.1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    one = site.model_copy(update={"gpus_per_node": 1})
    assert found(one, "GPUs", tmp_path) == Finding("GPUs", True, "1 x NVIDIA H200, 143771 MiB, 570.1")
    said = found(site.model_copy(update={"gpus_per_node": 8}), "GPUs", tmp_path)
    assert (said.ok, said.says.endswith("gpus_per_node says 8")) == (False, True)


def test_a_machine_without_gpus_is_bad_where_the_site_counts_on_some(site, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(site, "GPUs", tmp_path) == Finding("GPUs", None, "none here: runs go on the CPU")
    counting = site.model_copy(update={"gpus_per_node": 8})
    assert found(counting, "GPUs", tmp_path) == Finding("GPUs", False, "none here; the site's gpus_per_node is 8")


def test_a_store_that_is_away_is_one_bad_line_and_exit_code_1(tmp_path, capsys):
    conf, place = tmp_path / "mine.yaml", tmp_path / "here.yaml"
    conf.write_text(
        "store: file:///proc/nowhere\ndata: {url: 'file:///proc/set', batch: 4, lanes: 4}\ntrain: {steps: 1}\n"
    )
    place.write_text(f"shared_dir: {tmp_path}/shared\nexecutor: local\n")
    assert main(["doctor", str(conf), "--site", str(place)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("BAD   store ") for line in lines) == 1
    assert any(line.startswith("ok    shared disk") for line in lines)


@pytest.mark.parametrize(("limit", "minutes"), [("UNLIMITED", None), ("1-02:30:00", 1590), ("12:05:00", 725)])
def test_slurms_time_limits_are_understood(limit, minutes):
    assert doctor_slurm._minutes(limit) == minutes


def preemption(partition: dict[str, Any], config: dict[str, str], **changed: Any) -> Finding:
    site = Site(shared_dir="/x", **changed)
    return doctor_slurm._preemption(site, "low", partition, config)


def test_a_partition_that_would_lose_preempted_jobs_is_bad_and_one_without_a_signal_worth_a_note():
    signalled = {"SlurmctldParameters": "a,preempt_send_user_signal"}
    assert preemption({"PreemptMode": "OFF"}, {}).ok
    assert preemption({"PreemptMode": "CANCEL"}, signalled).ok is False
    assert preemption({"PreemptMode": "REQUEUE", "GraceTime": "300"}, {}).ok is None
    assert preemption({"PreemptMode": "REQUEUE", "GraceTime": "30"}, signalled, signal_delay_s=120).ok is None
    assert preemption({"PreemptMode": "REQUEUE", "GraceTime": "300"}, signalled, signal_delay_s=120).ok


def test_nodes_that_do_not_reach_each_other_are_bad_and_say_why(monkeypatch):
    port = daemons.free_ports(1)[0]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(probe, "REDUCE_S", 1.0)
    alone = probe.reduce("node2", 1, 2, gpu=False)  # the first one never comes
    for thread in threading.enumerate():
        if thread.name == "all-reduce":
            thread.join(30)  # or the end of this process meets it in torch's code, and aborts
    assert (alone.gb_s, alone.backend) == (None, "gloo")
    site = Site(shared_dir="/x", nodes=2)
    said = doctor_slurm._network(site, [Reduced("node1", "gloo", 1.5, None), alone])
    assert said.ok is False
    assert said.says.startswith("no all-reduce over 2 nodes (node2: ")
    assert "interface" in said.says
    assert doctor_slurm._network(site, []).ok is False


def test_a_probe_that_slurm_refuses_is_a_finding_and_leaves_nothing_behind(site, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, script in {"srun": "", "sbatch": "echo 'sbatch: error: Invalid account' >&2; exit 1"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (said,) = doctor_slurm.look_at_nodes(site, f"file://{tmp_path}/store")
    assert (said.what, said.ok) == ("nodes", False)
    assert said.says == "SLURM refused the probe: sbatch: error: Invalid account"
    assert list((tmp_path / "shared").iterdir()) == []


def test_the_slowest_node_is_the_speed_of_all():
    told = [Reduced("node1", "nccl", 40.0, None), Reduced("node2", "nccl", 20.0, None)]
    said = doctor_slurm._network(Site(shared_dir="/x", nodes=2), told)
    assert said == Finding("network", True, "all-reduce of 64 MiB over 2 nodes (nccl, a rank each): 20.00 GB/s")
