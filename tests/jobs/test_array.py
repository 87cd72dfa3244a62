"""What a task of an array asks SLURM for, and what it leaves behind when a user can mend what stopped it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from data_shards.errors import UserError
from data_shards.progress import quiet
from jobs import array as arrays
from jobs.array import Array, Task
from jobs.site import Site
from jobs.slurm import SlurmError


def parameters(gpus: int, **of_site: int) -> dict[str, object]:
    site = Site(name="here", shared_dir="/nowhere", nodes=4, ranks_per_node=8, cpus_per_rank=6, memory_gb=80, **of_site)
    found: dict[str, object] = Array(site, "pack", "1", "parts", "s3://x", gpus)._executor(3).parameters
    return found


def test_a_task_has_the_cores_and_the_memory_of_a_rank() -> None:
    asked = parameters(gpus=0)
    assert (asked["nodes"], asked["ntasks_per_node"], asked["cpus_per_task"]) == (1, 1, 6)
    assert (asked["mem"], asked["array_parallelism"], asked["job_name"]) == ("10240MB", 3, "farseer-pack")


def test_a_task_has_a_gpu_when_it_needs_one_and_the_site_has_any() -> None:
    assert parameters(gpus=1, gpus_per_node=8)["gpus_per_node"] == 1
    assert "gpus_per_node" not in parameters(gpus=0, gpus_per_node=8)
    assert "gpus_per_node" not in parameters(gpus=1)


def test_a_task_has_no_workload_key_that_the_cluster_would_have_to_know() -> None:
    assert parameters(gpus=0)["wckey"] is None  # submitit's default is its own name


@dataclass(frozen=True)
class Failing(Task):
    error: Exception

    def work(self, worker: int) -> None:
        raise self.error


def test_what_a_user_can_mend_is_left_for_who_submitted_and_the_task_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        Failing(str(tmp_path), UserError("no such bucket"))(7)
    assert (tmp_path / "0007").read_text() == "no such bucket"
    assert capsys.readouterr().err == "farseer: no such bucket\n"
    with pytest.raises(ZeroDivisionError):
        Failing(str(tmp_path), ZeroDivisionError())(8)
    assert not (tmp_path / "0008").exists()


def test_a_task_s_script_has_no_secret_of_a_login_profile_and_no_option_that_is_switched_off() -> None:
    site = Site(name="here", shared_dir="/nowhere", extra={"hold": False, "mail-type": "END"})
    asked = Array(site, "pack", "1", "parts", "s3://x")._executor(3).parameters
    assert asked["setup"][0].startswith("unset AWS_ACCESS_KEY_ID ")
    assert "hold" not in asked["additional_parameters"]
    assert asked["additional_parameters"]["mail_type"] == "END"


def test_a_task_takes_no_node_for_itself_as_a_run_may() -> None:
    site = Site(name="here", shared_dir="/nowhere", extra={"exclusive": True})
    asked = Array(site, "evaluate", "1", "parts", "s3://x")._executor(3).parameters
    assert "exclusive" not in asked["additional_parameters"]


def test_work_whose_state_slurm_does_not_tell_is_not_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = Array(Site(name="here", shared_dir=str(tmp_path)), "pack", "1", "parts", "s3://x")
    asked, left = list[str](), [2, 1, 0]

    def silent(job: str) -> str | None:
        asked.append(job)
        raise SlurmError("SLURM does not answer")

    monkeypatch.setattr(arrays.slurm, "job_state", silent)
    monkeypatch.setattr(arrays, "POLL_S", 0.0)
    monkeypatch.setattr(Array, "_at_work", lambda _: "7")
    array.run(Failing("", Exception()), 1, lambda: left.pop(0), quiet)
    assert asked == ["7"] * 2
