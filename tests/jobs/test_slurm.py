"""SLURM's answers when it is busy, away or refuses; its own programs cannot be made to, so others stand in for them."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import slurm
from jobs.slurm import SlurmError

Fake = Callable[[str, str], Path]
SINFO = r"printf 'node1|gpu*|h200,ib|gpu:8\nnode2|gpu*|h200|gpu:8\nnode3|gpu*|(null)|(null)\nnode1|low|h200|gpu:8\n'"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Puts a program in the place of one of SLURM's; returns the file of its calls, a line each."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr(slurm, "AGAIN_S", 0.01)

    def make(name: str, script: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncalls=$(wc -l < {calls})\n{script}\n')
        (tmp_path / name).chmod(0o755)
        return calls

    terminated = signal.getsignal(signal.SIGTERM)
    yield make
    signal.signal(signal.SIGTERM, terminated)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_requeue_that_meets_a_busy_controller_is_asked_for_again(fake: Fake) -> None:
    calls = fake("scontrol", "[ $calls -gt 2 ] || { echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1; }")
    slurm.requeue("7", patience_s=60)
    assert lines(calls) == ["requeue 7"] * 3


def test_patience_ends_and_what_will_not_change_is_asked_once(fake: Fake) -> None:
    fake("scontrol", "echo 'Socket timed out' >&2; exit 1")
    with pytest.raises(SlurmError, match="Socket timed out"):
        slurm.requeue("7", patience_s=0.05)
    calls = fake("scontrol", "echo 'Requested operation is presently disabled for job 7' >&2; exit 1")
    before = len(lines(calls))
    with pytest.raises(SlurmError, match="presently disabled"):
        slurm.requeue("7", patience_s=60)
    assert len(lines(calls)) == before + 1


def test_which_nodes_are_spare_matters_less_than_the_requeue(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    fake("sinfo", "echo 'Socket timed out' >&2; exit 1")
    calls = fake("scontrol", "")
    slurm.requeue_without("7", ["node1"], ["node9"], None)
    assert lines(calls) == ["requeue 7", "update JobId=7 ExcNodeList=node9"]
    fake("sinfo", SINFO)
    slurm.requeue_without("7", ["node1", "node2"], ["node9"], None)
    assert lines(calls)[-1] == "update JobId=7 ExcNodeList=node9,node1"


def test_a_job_that_was_requeued_but_may_come_to_a_bad_host_again_says_so(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("scontrol", "[ $1 = requeue ] || { echo 'Socket timed out' >&2; exit 1; }")
    slurm.requeue_without("7", [], [], None)
    assert "requeued, but not kept off any host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("partition", "needed", "constraint", "spared"),
    [
        (None, 2, None, ["node1"]),
        ("gpu", 1, None, ["node1", "node3"]),
        ("gpu", 3, None, []),
        (None, 1, "h200", ["node1"]),
        ("gpu", 2, "h200", []),
        ("gpu", 1, "h200&ib", []),
    ],
)
def test_only_usable_nodes_that_have_what_the_job_needs_are_spared(
    fake: Fake, partition: str | None, needed: int, constraint: str | None, spared: list[str]
) -> None:
    calls = fake("sinfo", SINFO)
    assert slurm.spared(["node1", "node3"], partition, needed, constraint) == spared
    assert "--states=idle,alloc," in lines(calls)[0]
    for line in lines(calls):  # hidden partitions are shown to who asks for all, or for them; sinfo takes one of these
        assert ("--all" in line) != ("--partition" in line)


def test_a_host_that_the_site_keeps_its_jobs_off_takes_the_place_of_no_other(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("sinfo", r"printf 'node1|gpu*|a|x\nnode2|gpu*|a|x\nnode3|gpu*|a|x\nnode4|gpu*|a|x\n'")
    calls = fake("scontrol", r"[ $1 != show ] || printf 'node3\nnode4\n'")
    assert slurm.spared(["node1"], "gpu", 2, None, kept_off=["node[3-4]"]) == []
    assert lines(calls) == ["show hostnames node[3-4]"]
    assert slurm.spared(["node1", "node3"], "gpu", 1, None, kept_off=["node[3-4]"]) == ["node1"]
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    slurm.requeue_without("7", ["node1"], ["node[3-4]"], None)
    assert lines(calls)[-1] == "update JobId=7 ExcNodeList=node[3-4]"


def test_a_node_without_gpus_takes_the_place_of_none_with_them(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("sinfo", SINFO)
    assert slurm.spared(["node1"], "gpu", 2, None) == ["node1"]
    assert slurm.spared(["node1"], "gpu", 2, None, gpus=True) == []
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    calls = fake("scontrol", "")
    for per_node, off in (("0", "node1"), ("8", "")):
        monkeypatch.setenv("SLURM_GPUS_PER_NODE", per_node)
        slurm.requeue_without("7", ["node1"], [], None)
        assert lines(calls)[-1] == f"update JobId=7 ExcNodeList={off}"


def test_of_several_partitions_each_that_could_hold_the_job_still_can(fake: Fake) -> None:
    fake("sinfo", r"printf 'a1|a|x|x\na2|a|x|x\nb1|b|x|x\nb2|b|x|x\nb3|b|x|x\nc1|c|x|x\n'")
    assert slurm.spared(["a1", "b1", "b2", "c1"], "a,b,c", 2, None) == ["b1", "c1"]


def test_a_node_that_slurm_no_longer_knows_is_not_named_to_it_and_one_that_is_away_is(fake: Fake) -> None:
    others = r"printf 'node1|gpu*|a|x\nnode2|gpu*|a|x\n'"
    fake("sinfo", rf"case $* in *--states=*) {others} ;; *) {others}; printf 'node8|gpu*|a|x\nnode2|low|a|x\n' ;; esac")
    assert slurm.spared(["gone17", "node1", "node8"], "gpu", 1, None) == ["node1", "node8"]
    assert slurm.spared(["gone17", "node1", "node8"], "gpu", 2, None) == ["node8"]
    assert slurm.spared(["gone17", "node1", "node8"], "gpu", 3, None) == []  # it needs node8 to come back
    assert slurm.spared([], "gpu", 1, None) == []


def test_a_host_that_slurm_no_longer_knows_does_not_spoil_the_others_exclusion(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    fake("sinfo", SINFO)
    calls = fake("scontrol", "")
    slurm.requeue_without("7", ["gone17", "node2"], [], None)
    assert lines(calls)[-1] == "update JobId=7 ExcNodeList=node2"


def test_a_job_may_name_several_partitions(fake: Fake) -> None:
    fake("sinfo", r"printf 'gpu*|4\nlow|8\n'")
    slurm.check_partition("gpu,low", 6)
    with pytest.raises(SlurmError, match="partition: found gpu,nope; SLURM has gpu, low"):
        slurm.check_partition("gpu,nope", 1)
    with pytest.raises(SlurmError, match="nodes: found 9; partition gpu,low has 8"):
        slurm.check_partition("gpu,low", 9)
    slurm.check_partition("low", 8)


def test_a_job_that_names_no_partition_comes_into_the_default_one(fake: Fake) -> None:
    fake("sinfo", r"printf 'low|8\ngpu*|4\n'")
    slurm.check_partition(None, 4)
    with pytest.raises(SlurmError, match="nodes: found 5; partition gpu has 4"):
        slurm.check_partition(None, 5)
    fake("sinfo", r"printf 'low|8\n'")
    with pytest.raises(SlurmError, match="partition: found None; SLURM has low"):
        slurm.check_partition(None, 1)


def test_jobs_are_found_by_the_runs_name_whoever_submitted_them(fake: Fake) -> None:
    revoked = "echo '67108865|REVOKED||None|ada|s3://runs/big'"
    calls = fake("squeue", f"{revoked}; echo '12|RUNNING|node[1-2]|None|ada|s3://runs/big'")
    (found,) = slurm.queue(["big", "small"])
    assert (found.job, found.state, found.run, found.user) == ("12", "RUNNING", "s3://runs/big", "ada")
    assert lines(calls) == ["--all --noheader --name farseer-big,farseer-small --format %i|%T|%N|%r|%u|%k"]
    assert slurm.queue([]) == []
    assert len(lines(calls)) == 1


def test_more_runs_than_a_command_line_holds_are_asked_for_in_portions(fake: Fake) -> None:
    calls = fake("squeue", 'echo "$calls|RUNNING|node1|None|ada|s3://runs/big"')
    runs = [f"{number:05d}{'x' * 59}" for number in range(4000)]
    found = slurm.queue(runs)
    assert [entry.job for entry in found] == [str(number) for number in range(1, len(found) + 1)]
    asked = [line.split()[3].split(",") for line in lines(calls)]
    assert [name for portion in asked for name in portion] == [f"farseer-{run}" for run in runs]
    assert 1 < len(asked) == len(found) < 10


def test_a_job_that_slurm_has_forgotten_is_over(fake: Fake) -> None:
    fake("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.job_state("7") is None
    fake("squeue", "echo 'PENDING|Resources'")
    assert slurm.job_state("7") == ("PENDING", "Resources")
    fake("squeue", "")
    assert slurm.job_state("7") is None
    fake("squeue", "echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1")
    with pytest.raises(SlurmError, match="Socket timed out"):
        slurm.job_state("7")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "SLURM refused squeue: exit code 3"),
        ("echo some; echo 'on stdout'; exit 1", "SLURM refused squeue: on stdout"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", r"SLURM does not answer \(Unable to contact"),
        ("exec sleep 60", r"SLURM does not answer \(squeue, 0 s\)"),
    ],
)
def test_what_slurm_says_in_the_place_of_an_answer_is_told(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.4 if "sleep" in script else 60.0)
    fake("squeue", script)
    with pytest.raises(SlurmError, match=said):
        slurm.ask("squeue")


def test_a_slurm_that_is_not_there_is_told_at_once(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match=r"SLURM is not installed here \(squeue-of-mars not found\): make cluster-up"):
        slurm.ask("squeue-of-mars")
    calls = fake("squeue", "")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(SlurmError, match=f"SLURM_CONF: no {tmp_path}/slurm.conf"):
        slurm.ask("squeue")
    assert lines(calls) == []


def test_the_version_is_slurms_own_word_and_none_where_it_says_nothing(fake: Fake) -> None:
    fake("sinfo", "echo 'slurm-wlm 22.05.8'")
    assert slurm.version() == "slurm-wlm 22.05.8"
    fake("sinfo", "exit 1")
    assert slurm.version() is None
