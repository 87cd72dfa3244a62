import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_shards.errors import UserError
from jobs import launch as launching
from jobs.blame import blame
from jobs.launch import batch_script, guarded, launch, slurm_executor
from jobs.runs import Job
from jobs.site import CARRIED, Site
from jobs.start import events
from jobs.supervise import BY_THE_SHELL

SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --chdir=/shared/first/snapshot
#SBATCH --comment=s3://runs/first
#SBATCH --constraint=h200
#SBATCH --cpus-per-task=12
#SBATCH --exclude=node9
#SBATCH --exclusive
#SBATCH --export=HOME,LANG,LOGNAME,PATH,SHELL,TERM,USER
#SBATCH --gpus-per-node=8
#SBATCH --job-name=farseer-first
#SBATCH --mem=1024000MB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/first/logs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN WANDB_API_KEY
export SLURM_EXPORT_ENV=ALL
export PYTHONPATH=/shared/first/snapshot
export FARSEER_RUN_DIR=/shared/first
export OMP_NUM_THREADS=12
export GLOO_SOCKET_IFNAME=ib0
export NCCL_SOCKET_IFNAME=ib0
export AWS_PROFILE=farseer
export FARSEER_JOB=$SLURM_JOB_ID FARSEER_START=${SLURM_RESTART_COUNT:-0}
farseer_setup() { /env/bin/python -m jobs.cli supervise after --exit "$1" --setup "$2" --max-cycles 3 \
--exclude-hours 12 --store s3://runs/first --exclude node9 --constraint h200; exit 2; }
trap '[ ${#BASH_SOURCE[@]} -gt 1 ] || farseer_setup $? "$(sed -n ${LINENO}p "$0")"' ERR
module load cuda/13
trap - ERR; set +eu
cd /shared/first/snapshot
export MASTER_ADDR=${MASTER_ADDR:-$SLURMD_NODENAME}
echo "farseer: start $FARSEER_START of job $FARSEER_JOB on $(scontrol show hostnames | paste -sd,)"
farseer_note() { printf '{"time": %s, "attempt": 0, "job": "%s", "start": %s, "event": "%s", "reason": "%s"}\\n' \
"$(date +%s)" "$FARSEER_JOB" "$FARSEER_START" "$1" "$2" >> "$FARSEER_RUN_DIR/jobs.jsonl"; }
farseer_without_python() {
  [ "$1" -ne 2 ] && [ ! -e "$FARSEER_RUN_DIR/cancel" ] || exit 2
  if [ "$1" -ne 3 ]; then
    reason="Python did not $2 on $SLURMD_NODENAME (exit code $1)"
    times=$FARSEER_START
    [ ! -r "$FARSEER_RUN_DIR/jobs.jsonl" ] || \
times=$(tail -n 2 "$FARSEER_RUN_DIR/jobs.jsonl" | grep -c "Python did not")
    [ "$times" -lt 2 ] || { farseer_note failed "$reason"; exit "$1"; }
    farseer_note requeued "$reason"
  fi
  for _ in $(seq 360); do
    said=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && exit "$1"
    case $said in *disabled*|*'Invalid job id'*|*'ermission denied'*) break ;; esac
    sleep 5
  done
  farseer_note failed "it is not started again: $(printf %s "$said" | tr -cd '[:alnum:] .,:_-')"
  exit "$1"
}
MASTER_PORT=$(/env/bin/python -m jobs.cli supervise before) || farseer_without_python $? begin
export MASTER_PORT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/first/logs/%j_%t_log.out --kill-on-bad-exit=1 --open-mode=append --cpus-per-task=12 \
/env/bin/python -u -m submitit.core._submit /shared/first/logs


# teardown
/env/bin/python -m jobs.cli supervise after --exit $? --max-cycles 3 --exclude-hours 12 --store s3://runs/first \
--exclude node9 --constraint h200 || farseer_without_python $? judge"""


@pytest.fixture(autouse=True)
def no_store_of_ours(monkeypatch):
    for name in CARRIED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Site:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").touch(mode=0o755)  # submitit asks only whether it is there
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Site(
        name="mine",
        shared_dir="/shared",
        nodes=2,
        ranks_per_node=8,
        cpus_per_rank=12,
        gpus_per_node=8,
        memory_gb=1000,
        partition="gpu",
        account="vision",
        qos="high",
        constraint="h200",
        signal_delay_s=300,
        interface="ib0",
        python="/env/bin/python",
        setup=("module load cuda/13",),
        environment={"AWS_PROFILE": "farseer"},
        extra={"exclusive": True, "exclude": "node9", "oversubscribe": False},
    )


def test_the_batch_script_is_this_one(site):
    executor = slurm_executor(site, "first", "s3://runs/first")
    assert executor._make_submission_file_text(executor._submitit_command_str, "0") == SCRIPT


def test_the_workload_key_is_the_sites_or_none(site):
    keyed = site.model_copy(update={"extra": {"wckey": "vision"}})
    executor = slurm_executor(keyed, "first", "s3://runs/first")
    text = executor._make_submission_file_text(executor._submitit_command_str, "0")
    assert re.findall("wckey.*", text) == ["wckey=vision"]


def test_a_host_that_was_to_blame_is_kept_out_and_one_that_slurm_no_longer_knows_is_not_named(site, tmp_path):
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.write_text("#!/bin/sh\nprintf 'node1|gpu|h200|gpu:8\\nnode2|gpu|h200|gpu:8\\nnode3|gpu|h200|gpu:8\\n'\n")
    sinfo.chmod(0o755)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho node9\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    for _ in range(2):
        blame(tmp_path, "a", {"node2": "x", "gone17": "GPU 3 does not work"})
    site = site.model_copy(update={"shared_dir": str(tmp_path)})
    assert slurm_executor(site, "first", "s3://runs/first").parameters["exclude"] == "node9,node2"


def test_hosts_are_spared_in_the_partition_of_who_submits_where_the_site_leaves_it_open(site, tmp_path, monkeypatch):
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.write_text("#!/bin/sh\nprintf 'node1|gpu*|x|gpu:8\\nnode2|low|x|gpu:8\\nnode3|low|x|gpu:8\\n'\n")
    sinfo.chmod(0o755)
    for _ in range(2):
        blame(tmp_path, "a", {"node2": "x"})
    monkeypatch.setenv("SBATCH_PARTITION", "low")
    open_one = {"shared_dir": str(tmp_path), "partition": None, "constraint": None, "extra": {}, "nodes": 1}
    executor = slurm_executor(site.model_copy(update=open_one), "first", "s3://runs/first")
    assert executor.parameters["exclude"] == "node2"


def test_an_exclude_that_is_off_keeps_no_host_out(site):
    executor = slurm_executor(site.model_copy(update={"extra": {"exclude": False}}), "first", "s3://runs/first")
    assert "exclude" not in executor.parameters
    assert "--exclude " not in executor.parameters["teardown"][0]


@pytest.mark.parametrize("option", ["nodelist", "reservation"])
def test_of_nodes_that_the_site_itself_names_none_is_kept_out(site, tmp_path, option):
    for _ in range(2):
        blame(tmp_path, "a", {"node2": "x"})
    site = site.model_copy(update={"shared_dir": str(tmp_path), "extra": {option: "ours"}})
    executor = slurm_executor(site, "first", "s3://runs/first")
    assert "exclude" not in executor.parameters
    assert "--exclude-hours 0 " in executor.parameters["teardown"][0]


def test_the_batch_script_is_valid_shell(site):
    executor = slurm_executor(site, "first", "s3://runs/first")
    text = executor._make_submission_file_text(executor._submitit_command_str, "0")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("setup", "failing"),
    [
        (("true", "module load cuda"), "module load cuda"),
        (("cd /", "test -d /nowhere || exit_is_not_needed", "touch reached"), "test -d /nowhere || exit_is_not_needed"),
        (("source sourced", "source sourced 5"), "source sourced 5"),
        (("if true", "then false 'it is'", "fi"), "then false 'it is'"),
    ],
)
def test_the_first_command_of_a_setup_that_fails_ends_the_script_and_is_told(tmp_path, setup, failing):
    told = guarded(setup, f'printf "%s %s" "$1" "$2" > {tmp_path}/told', tmp_path)
    script, sourced = tmp_path / "script", tmp_path / "sourced"
    sourced.write_text("false\nreturn ${1:-0}\n")
    script.write_text("\n".join(["module() { echo unknown; return 7; }", *told, f"touch {tmp_path}/started"]))
    assert subprocess.run(["bash", script], cwd=tmp_path, check=False).returncode == 2
    assert (tmp_path / "told").read_text().partition(" ")[2] == failing
    assert files(tmp_path) == ["script", "sourced", "told"]


def test_a_setup_that_succeeds_changes_nothing_of_what_follows(tmp_path):
    setup = ("false || true", "if false; then exit 9; fi", "export A=1", "set -euo pipefail", "cd /")
    (tmp_path / "snapshot").mkdir()
    script = "\n".join([*guarded(setup, "touch told", tmp_path), "false", 'echo "$A $UNKNOWN" > after'])
    subprocess.run(["bash"], input=script, text=True, check=True)
    assert (tmp_path / "snapshot" / "after").read_text() == "1 \n"
    assert files(tmp_path) == ["snapshot/after"]
    assert guarded((), "touch told", tmp_path) == []


@pytest.mark.parametrize(
    ("before", "start", "earlier", "event"),
    [
        ("exit 127", 0, [], "requeued"),
        ("exit 127", 2, ["went well", "did not begin", "did not judge"], "failed"),  # the third one in a row
        ("exit 127", 11, ["did not begin", "went well", "did not begin"], "requeued"),
        ("exit 127", 1, None, "requeued"),  # nothing can be read
        ("exit 127", 2, None, "failed"),
        ("exit 2", 0, [], None),  # a cancel was asked for
    ],
)
def test_a_start_whose_python_does_not_begin_is_told_and_made_again(run_script, before, start, earlier, event):
    (code, told), folder = run_script(before, "", start, earlier), run_script.folder
    assert code != 0
    assert told == ([("7", start, event, "Python did not begin on node1 (exit code 127)")] if event else [])
    assert run_script.asked() == ([["requeue", "7"]] if event == "requeued" else [])
    assert not (folder / "ranks").exists()


@pytest.mark.parametrize(
    ("after", "event"),
    [
        ("exit 0", None),
        ("exit 2", None),  # it is over
        ("exit 1", "requeued"),  # a traceback
        ("kill -9 $$", "requeued"),
    ],
)
def test_a_start_that_python_cannot_judge_is_told_and_made_again(run_script, after, event):
    code, told = run_script("echo 5", after, 0, [])
    assert (run_script.folder / "ranks").exists()
    exits = {"exit 1": 1, "kill -9 $$": 137}.get(after, 0)
    assert told == ([("7", 0, event, f"Python did not judge on node1 (exit code {exits})")] if event else [])
    assert run_script.asked() == ([["requeue", "7"]] if event else [])
    assert code == (2 if after == "exit 2" else exits)


def test_where_python_has_no_slurm_the_shell_requeues_what_it_has_judged_and_asks_again(run_script, tmp_path):
    """In an image without SLURM's commands; the controller is away once."""
    run_script.scontrol(f"[ -e {tmp_path}/away ] || {{ touch {tmp_path}/away; echo 'Unable to contact' >&2; exit 1; }}")
    code, told = run_script("echo 5", f"exit {BY_THE_SHELL}", 0, ["went well"])
    assert (code, told) == (BY_THE_SHELL, [])
    assert run_script.asked() == [["requeue", "7"]] * 2


def test_a_requeue_that_slurm_refuses_the_shell_is_told(run_script):
    run_script.scontrol("echo 'Requested operation is \"presently\" disabled' >&2; exit 1")
    _, told = run_script("echo 5", "exit 1", 0, [])
    assert [event for _, _, event, _ in told] == ["requeued", "failed"]
    assert told[-1][-1] == "it is not started again: Requested operation is presently disabled"


@pytest.fixture
def run_script(tmp_path):
    """Runs a batch script of whose Python one says what it does before and after the ranks."""
    return ScriptRun(tmp_path)


class ScriptRun:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scontrol("")

    def scontrol(self, does: str) -> None:
        self._program("scontrol", f"[ $1 = show ] && exit; echo $@ >> {self.folder}/asked; {does}")

    def _program(self, name: str, does: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (self.folder / name).chmod(0o755)

    def __call__(self, before: str, after: str, start: int, earlier: list[str] | None) -> tuple[int, list[Any]]:
        """Exit code, and what was noted. earlier: of the events before this start, None where there is no file."""
        if earlier is not None:
            lines = [json.dumps({"event": "requeued", "reason": f"Python {said}"}) + "\n" for said in earlier]
            (self.folder / "jobs.jsonl").write_text("".join(lines))
        self._program("python", f"case $4 in before) {before} ;; *) {after} ;; esac")
        self._program("sleep", "")
        site = Site(shared_dir="/shared", python=str(self.folder / "python"))
        head, end = batch_script(site, self.folder, "s3://runs/first")
        script = "\n".join([*head, f"touch {self.folder}/ranks", *end])
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start), "SLURMD_NODENAME": "node1"}
        own = {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        done = subprocess.run(["bash"], input=script, text=True, env=own | slurm, check=False)
        told = events(self.folder)[len(earlier or []) :]
        return done.returncode, [(e["job"], e["start"], e["event"], e["reason"]) for e in told]

    def asked(self) -> list[list[str]]:
        path = self.folder / "asked"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_an_option_of_the_sites_extra_takes_the_place_of_the_one_that_follows_from_its_keys(site):
    typed = site.model_copy(update={"extra": {"gpus-per-node": "a100:8"}})
    executor = slurm_executor(typed, "first", "s3://runs/first")
    text = executor._make_submission_file_text(executor._submitit_command_str, "0")
    assert re.findall(r"--gpus-per-node=.*", text) == ["--gpus-per-node=a100:8"]


def test_only_named_variables_of_the_submitter_travel_and_no_secret_stands_in_the_script(site, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    executor = slurm_executor(site, "first", "s3://runs/first")
    text = executor._make_submission_file_text(executor._submitit_command_str, "0")
    assert "planted-secret" not in text
    assert "#SBATCH --export=HOME,LANG,LOGNAME,PATH,SHELL,TERM,USER\n" in text


def test_where_the_store_is_travels_and_the_site_has_the_last_word(site, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    lines, _ = batch_script(site, Path("/shared/first"), "s3://runs/first")
    assert "export AWS_ENDPOINT_URL=http://store:9000" in lines
    assert "export AWS_PROFILE=farseer" in lines
    assert "export AWS_PROFILE=mine" not in lines


def test_a_local_job_is_served_by_the_snapshot_too():
    site = Site(name="local", executor="local", shared_dir="/shared", ranks_per_node=2, python="/env/bin/python")
    lines, after = batch_script(site, Path("/shared/first"), "s3://runs/first")
    assert lines == [
        "export PYTHONPATH=/shared/first/snapshot",
        "export FARSEER_RUN_DIR=/shared/first",
        "export OMP_NUM_THREADS=1",
        "export CUDA_VISIBLE_DEVICES=''",
        "export FARSEER_JOB=local-$$",
        "exec /env/bin/python -m jobs.cli supervise serve --ranks 2 --gpus 0 --time-limit-min 1440 "
        "--signal-delay-s 120 --max-cycles 3 --store s3://runs/first",
    ]
    assert after == []


def write(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


RECORDED = ["VERSION", "uncommitted.diff"]
CODE = ["jobs/a.py", "pipeline/b.py", "pipeline/deep/c.py", "data_shards/d.py"]


def test_a_snapshot_outside_git_is_the_three_packages(tmp_path, monkeypatch):
    code = write(tmp_path / "code", [*CODE, "jobs/__pycache__/a.pyc", "tests/t.py", "var/big"])
    monkeypatch.setattr(launching, "_on_slurm", lambda site, run, store, config: FakeJob(site, run))
    launch(Site(shared_dir=str(tmp_path / "shared")), "first", "s3://runs/first", {"a": 1}, code=code)
    assert files(tmp_path / "shared/first/snapshot") == sorted([*CODE, *RECORDED])
    assert (tmp_path / "shared/first/snapshot/VERSION").read_text() == "no git\n"
    assert yaml.safe_load((tmp_path / "shared/first/config.yaml").read_text()) == {"a": 1}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed: apt install git")
def test_a_snapshot_in_git_takes_new_files_along_and_leaves_ignored_ones(tmp_path, monkeypatch):
    code = write(tmp_path / "code", [*CODE, "tests/t.py"])
    (code / ".gitignore").write_text("*.log\n")
    git = ["git", "-C", str(code), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    write(code, ["jobs/new.py", "jobs/ignored.log"])
    (code / "jobs/a.py").unlink()
    monkeypatch.setattr(launching, "_on_slurm", lambda site, run, store, config: FakeJob(site, run))
    launch(Site(shared_dir=str(tmp_path / "shared")), "first", "s3://runs/first", {}, code=code)
    expected = sorted({*CODE, "jobs/new.py", *RECORDED} - {"jobs/a.py"})
    assert files(tmp_path / "shared/first/snapshot") == expected
    assert (tmp_path / "shared/first/snapshot/VERSION").read_text().endswith("-dirty\n")
    diff = (tmp_path / "shared/first/snapshot/uncommitted.diff").read_text()
    assert "deleted file" in diff
    assert "-jobs/a.py" in diff
    assert events(tmp_path / "shared/first")[-1]["code"].endswith("-dirty")


def test_an_edit_after_the_submission_changes_nothing_in_the_snapshot(tmp_path, monkeypatch):
    code = write(tmp_path / "code", CODE)
    monkeypatch.setattr(launching, "_on_slurm", lambda site, run, store, config: FakeJob(site, run))
    launch(Site(shared_dir=str(tmp_path / "shared")), "first", "s3://runs/first", {}, code=code)
    (code / "jobs/a.py").write_text("edited")
    (code / "jobs/late.py").write_text("new")
    snapshot = tmp_path / "shared/first/snapshot"
    assert (snapshot / "jobs/a.py").read_text() == "jobs/a.py"
    assert not (snapshot / "jobs/late.py").exists()


def test_a_second_submission_of_a_run_replaces_its_snapshot_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "_on_slurm", lambda site, run, store, config: FakeJob(site, run))
    site = Site(shared_dir=str(tmp_path / "shared"))
    launch(site, "first", "s3://runs/first", {}, code=write(tmp_path / "old", ["jobs/old.py"]))
    launch(site, "first", "s3://runs/first", {}, code=write(tmp_path / "new", ["jobs/new.py"]))
    assert files(tmp_path / "shared/first/snapshot") == ["VERSION", "jobs/new.py", "uncommitted.diff"]


def test_a_submission_is_noted_with_its_job_and_the_checkpoint_from_which_progress_counts(tmp_path, monkeypatch):
    def submitted(site, run, store, config):
        return Job(run, site.run_dir(run), store, "42")

    monkeypatch.setattr(launching, "_on_slurm", submitted)
    site = Site(shared_dir=str(tmp_path / "shared"))
    job = launch(site, "first", "s3://runs/first", {}, committed=60, code=write(tmp_path / "code", CODE))
    assert job == Job.of(site, "first")
    (noted,) = events(job.run_dir)
    assert (noted["event"], noted["job"], noted["committed"]) == ("submitted", "42", 60)


def test_a_refused_submission_of_a_new_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("SLURM refused the job")

    monkeypatch.setattr(launching, "_on_slurm", refuse)
    with pytest.raises(UserError, match="refused"):
        launch(
            Site(shared_dir=str(tmp_path / "shared")), "first", "s3://runs/first", {}, code=write(tmp_path / "c", CODE)
        )
    assert files(tmp_path / "shared") == []


def test_a_job_that_cannot_be_written_down_is_ended_again(tmp_path, monkeypatch):
    site = Site(name="x", shared_dir=str(tmp_path / "shared"))
    ended = []

    def full(job):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        launching, "_on_slurm", lambda site, run, store, config: Job(run, site.run_dir(run), store, "7")
    )
    monkeypatch.setattr(Job, "save", full)
    monkeypatch.setattr(launching, "end", ended.append)
    with pytest.raises(UserError, match=r"shared/first: cannot be written \(No space left .*\); job 7 was ended again"):
        launch(site, "first", "file:///store/first", {})
    assert [job.id for job in ended] == ["7"]
    assert not site.run_dir("first").exists()


def test_a_refused_submission_leaves_an_old_run_its_config_and_a_cancel_that_was_asked_for(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("SLURM refused the job")

    site, code = Site(shared_dir=str(tmp_path / "shared")), write(tmp_path / "c", CODE)
    monkeypatch.setattr(launching, "_on_slurm", lambda site, run, store, config: FakeJob(site, run))
    launch(site, "first", "s3://runs/first", {"lr": 1}, code=code)
    (tmp_path / "shared/first/cancel").touch()
    monkeypatch.setattr(launching, "_on_slurm", refuse)
    with pytest.raises(UserError, match="refused"):
        launch(site, "first", "s3://runs/first", {"lr": 30}, code=code)
    assert (tmp_path / "shared/first/config.yaml").read_text() == "lr: 1\n"
    assert (tmp_path / "shared/first/cancel").exists()
    (tmp_path / "shared/first/config.yaml").unlink()
    with pytest.raises(UserError, match="refused"):
        launch(site, "first", "s3://runs/first", {"lr": 30}, code=code)
    assert (tmp_path / "shared/first/job.json").exists()


def test_a_folder_that_is_no_run_is_never_taken_for_one(tmp_path):
    write(tmp_path / "home/photos", ["a.jpg"])
    site = Site(shared_dir=str(tmp_path / "home"))
    with pytest.raises(UserError, match="photos is there and no run of ours; choose another name"):
        launch(site, "photos", "s3://runs/photos", {}, code=write(tmp_path / "c", CODE))
    assert files(tmp_path / "home") == ["photos/a.jpg"]


def test_a_python_of_several_words_is_a_command(site):
    lines, after = batch_script(site.model_copy(update={"python": "apptainer exec img python"}), Path("/s"), "s3://r")
    begin = "MASTER_PORT=$(apptainer exec img python -m jobs.cli supervise before) || farseer_without_python $? begin"
    assert begin in lines
    assert after[0].startswith("apptainer exec img python -m jobs.cli supervise after ")


class FakeJob:
    """Stands for a submitted job where only what is written before is looked at."""

    def __init__(self, site: Site, run: str) -> None:
        self.id, self.local, self._folder = "1", False, site.run_dir(run)

    def save(self) -> None:
        (self._folder / "job.json").write_text("{}")
