"""Handing a run to SLURM, or to this machine alone, through submitit.

The job, and each of its requeues, runs from a snapshot of the code in the run's folder on the shared disk: an edit
afterwards changes nothing. Nothing about where to resume is handed over: each start finds it in the store.
"""

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
import yaml

from data_shards.errors import UserError, one_line
from jobs import daemons, rank, slurm
from jobs.blame import START_LINE, excluded
from jobs.runs import Job, end, owned
from jobs.site import CARRIED, INHERITED, ROOT, SECRETS, Site, export_lines
from jobs.start import cancel_marker, note
from jobs.supervise import BY_THE_SHELL

BASH = "/bin/bash"  # as submitit's scripts have it
PACKAGES = ("data_shards", "pipeline", "jobs")


def launch(
    site: Site, run: str, store: str, config: dict[str, Any], committed: int | None = None, code: Path = ROOT
) -> Job:
    """Snapshot the code, submit. Raises UserError, with no new folder left, when SLURM refuses the job.

    store: the run's folder in the store. config: resolved. committed: the newest checkpoint's step, from where the
    supervisor counts progress. code: the folder whose three packages the job will run.
    """
    run_dir = site.run_dir(run)
    with owned(run_dir):
        if not (run_dir / "job.json").exists() and run_dir.is_dir() and any(run_dir.iterdir()):
            raise UserError(
                f"RUN={run}: {run_dir} is there and no run of ours; choose another name, or another shared_dir"
            )
    with _undone_on_error(run_dir):
        try:
            with owned(run_dir):
                _write(run_dir, config, code)
        except OSError as error:
            raise UserError(f"SITE={site.name}: shared_dir: {site.shared_dir} cannot be written: {error}") from None
        cancel_marker(run_dir).unlink(missing_ok=True)
        job = (_on_this_machine if site.executor == "local" else _on_slurm)(site, run, store, config)
        _remember(job)
    code_version = (run_dir / "snapshot" / "VERSION").read_text().strip()
    version = None if job.local else slurm.version()
    note(run_dir, "submitted", job=job.id, committed=committed, code=code_version, slurm=version)
    return job


def _remember(job: Job) -> None:
    """Write down whose job it is; one that nothing tells of must not run."""
    try:
        job.save()
    except OSError as error:
        end(job)
        raise UserError(f"{job.run_dir}: cannot be written ({error.strerror}); job {job.id} was ended again") from error


def packed_code(run_dir: Path) -> Path:
    """The snapshot of the run's newest job, as it was before the job began."""
    return run_dir / "snapshot.tar.gz"


def batch_script(site: Site, run_dir: Path, store: str) -> tuple[list[str], list[str]]:
    """The shell lines before and after the ranks. They hold paths and names, never a secret: others can read them."""
    python = site.python or shlex.quote(sys.executable)
    head = exports(site, run_dir)
    supervise = f"{python} -m jobs.cli supervise"
    if site.executor == "local":
        told = f"--ranks {site.ranks} --gpus {site.gpus_per_node} --time-limit-min {site.time_limit_min}"
        told += f" --signal-delay-s {site.signal_delay_s} --max-cycles {site.max_cycles} --store {shlex.quote(store)}"
        at_once = f"--max-cycles 0 --store {shlex.quote(store)}"
        setup = guarded(site.setup, f'{supervise} after --exit "$1" --setup "$2" {at_once}', run_dir)
        return [*head, "export FARSEER_JOB=local-$$", *setup, f"exec {supervise} serve {told}"], []
    told = f"--max-cycles {site.max_cycles} --exclude-hours {_exclude_hours(site):g} --store {shlex.quote(store)}"
    told += f" --exclude {shlex.quote(kept_out)}" if (kept_out := _exclude_of(site)) else ""
    told += f" --constraint {shlex.quote(site.constraint)}" if site.constraint else ""
    slurm_head = [
        *head,
        "export FARSEER_JOB=$SLURM_JOB_ID FARSEER_START=${SLURM_RESTART_COUNT:-0}",
        *guarded(site.setup, f'{supervise} after --exit "$1" --setup "$2" {told}', run_dir),
        "export MASTER_ADDR=${MASTER_ADDR:-$SLURMD_NODENAME}",  # this script runs on the first node, as rank 0 does
        f'echo "{START_LINE} $FARSEER_START of job $FARSEER_JOB on $(scontrol show hostnames | paste -sd,)"',
        *_without_python(site.max_cycles),
        f"MASTER_PORT=$({supervise} before) || farseer_without_python $? begin",
        "export MASTER_PORT",
    ]
    return slurm_head, [f"{supervise} after --exit $? {told} || farseer_without_python $? judge"]


def exports(site: Site, run_dir: Path) -> list[str]:
    """The shell lines that lead the ranks to code, run and store, and keep from them what a login profile has set."""
    threads = {"OMP_NUM_THREADS": str(site.cpus_per_rank)}
    network = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), site.interface) if site.interface else {}
    hidden = {} if site.gpus_per_node else {"CUDA_VISIBLE_DEVICES": ""}  # a site without GPUs, whatever its nodes have
    fixed = {"PYTHONPATH": str(run_dir / "snapshot"), "FARSEER_RUN_DIR": str(run_dir)}
    # srun hands on what is set here, not only what sbatch was told to take along
    handed = {"SLURM_EXPORT_ENV": "ALL"} if site.executor == "slurm" else {}
    store_at = {name: os.environ[name] for name in CARRIED if name in os.environ}
    clean = [f"unset {' '.join(SECRETS)}"] if site.executor == "slurm" else []  # a job's keys come from files
    return [*clean, *export_lines({**handed, **fixed, **threads, **hidden, **network, **store_at, **site.environment})]


def guarded(setup: Sequence[str], failed: str, folder: Path) -> list[str]:
    """A site's shell lines, for bash; the first command of them that fails ends the script with exit code 2.

    failed: what is run then, with the command's exit code as $1 and its line as $2. folder: the job's, to whose
    snapshot the shell returns, with the options that it had: an exit code other than 0 must not end it later.
    """
    if not setup:
        return []
    function = f"farseer_setup() {{ {failed}; exit 2; }}"
    told = 'farseer_setup $? "$(sed -n ${LINENO}p "$0")"'
    # of what a line sources, only the last command counts
    trap = f"trap '[ ${{#BASH_SOURCE[@]}} -gt 1 ] || {told}' ERR"
    return [function, trap, *setup, "trap - ERR; set +eu", f"cd {shlex.quote(str(folder / 'snapshot'))}"]


def _without_python(max_cycles: int) -> list[str]:
    """The shell's own requeue, for where Python before or after the ranks gives no answer, or has no SLURM.

    Its exit code 2 is an answer: a cancel, or what a user can mend; with 3 it has judged and written, and cannot ask
    SLURM. Anything else may be this node's, or the shared disk's of this moment, and no one but the shell is left to
    say so and to start again: max_cycles times in a row. A controller that is away is asked for half an hour.
    """
    event = '{"time": %s, "attempt": 0, "job": "%s", "start": %s, "event": "%s", "reason": "%s"}\\n'
    told = '"$(date +%s)" "$FARSEER_JOB" "$FARSEER_START" "$1" "$2"'
    final = "|".join(f"*{shlex.quote(sign)}*" for sign in slurm.FINAL)
    file, again, patience = '"$FARSEER_RUN_DIR/jobs.jsonl"', max_cycles - 1, round(slurm.PATIENCE_S / slurm.AGAIN_S)
    return [
        f"farseer_note() {{ printf '{event}' {told} >> {file}; }}",
        "farseer_without_python() {",
        '  [ "$1" -ne 2 ] && [ ! -e "$FARSEER_RUN_DIR/cancel" ] || exit 2',
        f'  if [ "$1" -ne {BY_THE_SHELL} ]; then',
        '    reason="Python did not $2 on $SLURMD_NODENAME (exit code $1)"',
        "    times=$FARSEER_START",
        f'    [ ! -r {file} ] || times=$(tail -n {again} {file} | grep -c "Python did not")',
        f'    [ "$times" -lt {again} ] || {{ farseer_note failed "$reason"; exit "$1"; }}',
        '    farseer_note requeued "$reason"',
        "  fi",
        f"  for _ in $(seq {patience}); do",
        '    said=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && exit "$1"',
        f"    case $said in {final}) break ;; esac",
        f"    sleep {slurm.AGAIN_S:g}",
        "  done",
        """  farseer_note failed "it is not started again: $(printf %s "$said" | tr -cd '[:alnum:] .,:_-')\"""",
        '  exit "$1"',
        "}",
    ]


def slurm_executor(site: Site, run: str, store: str) -> submitit.SlurmExecutor:
    """submitit's executor, set so that a requeue, a preemption and a dead rank end as jobs.supervise says."""
    run_dir = site.run_dir(run)
    before, after = batch_script(site, run_dir, store)
    return job_executor(
        site,
        run_dir,
        ranks=site.ranks_per_node,
        without="exclude",  # it comes with the hosts that were to blame
        srun_args=["--kill-on-bad-exit=1"],
        job_name=slurm.job_name(run),
        comment=store,
        nodes=site.nodes,
        gpus_per_node=site.gpus_per_node,
        exclude=",".join(filter(None, (_exclude_of(site), *_excluded(site)))),
        setup=before,
        teardown=after,
    )


def job_executor(
    site: Site, folder: Path, *, ranks: int, without: str, srun_args: Sequence[str] = (), **of_job: Any
) -> submitit.SlurmExecutor:
    """submitit's executor for a job of any kind, which runs from the snapshot in its folder.

    ranks: of the job on a node, of whose memory they get their share. without: which of the site's `extra` options the
    job does not take. of_job: more of it in submitit's words; what is None, 0 or empty is not asked for.
    submitit's own cap on time-outs is out of the way: it would end a run that makes progress.
    """
    executor = submitit.SlurmExecutor(folder / "logs", max_num_timeout=1_000_000, python=site.python)
    where = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
    memory_mb = round((site.memory_gb or 0) * 1024 * ranks / site.ranks_per_node)
    optional = {**where, "mem": f"{memory_mb}MB" if memory_mb else None, **of_job}
    executor.update_parameters(
        ntasks_per_node=ranks,
        cpus_per_task=site.cpus_per_rank,
        time=site.time_limit_min,
        signal_delay_s=site.signal_delay_s,
        stderr_to_stdout=True,
        wckey=None,  # submitit's is its own name, which clusters that know their keys refuse
        # srun takes neither the open mode nor, since SLURM 22.05, the CPUs from sbatch
        srun_args=[*srun_args, "--open-mode=append", f"--cpus-per-task={site.cpus_per_rank}"],
        additional_parameters={
            "requeue": True,
            "chdir": str(folder / "snapshot"),  # python -m looks there first
            "export": ",".join(INHERITED),
            # as submitit spells them, whose own would stand beside them else, and be the last word
            **{key.replace("-", "_"): value for key, value in switched_on(site).items() if key != without},
        },
        **{name: value for name, value in optional.items() if value},
    )
    return executor


def switched_on(site: Site) -> dict[str, str | int | bool]:
    """The site's `extra` options; of one that is off SLURM hears nothing."""
    return {name: value for name, value in site.extra.items() if value is not False}


def _exclude_of(site: Site) -> str:
    """Hosts that the site keeps its jobs off, as SLURM reads them."""
    return str(switched_on(site).get("exclude", ""))


def _excluded(site: Site) -> list[str]:
    """Hosts that were to blame, as long as enough others are left."""
    hosts, gpus = excluded(Path(site.shared_dir), _exclude_hours(site)), site.gpus_per_node > 0
    kept_off = [*filter(None, [_exclude_of(site)])]
    return slurm.spared(hosts, site.used_partition, site.nodes, site.constraint, kept_off=kept_off, gpus=gpus)


def _exclude_hours(site: Site) -> float:
    """For how long a host to blame is kept out; not at all where the site names the nodes, and has no others."""
    return 0.0 if {"nodelist", "reservation"} & switched_on(site).keys() else site.exclude_hours


def script_text(site: Site, run: str, store: str) -> str:
    """The batch script as it would be submitted; for a site without SLURM, what starts the ranks here."""
    if site.executor == "local":
        return "\n".join(batch_script(site, site.run_dir(run), store)[0])
    if shutil.which("srun") is None:
        return "# no SLURM on this machine: submitit writes the script where srun is"
    executor = slurm_executor(site, run, store)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "0"))


def _on_slurm(site: Site, run: str, store: str, config: dict[str, Any]) -> Job:
    executor = slurm_executor(site, run, store)
    try:
        arguments = (config, store, site.signal_delay_s, site.gpus_per_node, site.time_limit_min)
        submitted = executor.submit(rank.run, *arguments)
    except submitit.core.utils.FailedJobError as error:
        kept_off = f" (kept off {hosts})" if (hosts := executor.parameters.get("exclude")) else ""
        raise UserError(f"SITE={site.name}: SLURM refused the job{kept_off}: {one_line(error)}") from None
    return Job(run, site.run_dir(run), store, submitted.job_id, option=site.option)


def _on_this_machine(site: Site, run: str, store: str, config: dict[str, Any]) -> Job:
    run_dir = site.run_dir(run)
    lines, _ = batch_script(site, run_dir, store)
    script = run_dir / "logs" / "local.sh"
    script.write_text("\n".join([f"cd {shlex.quote(str(run_dir / 'snapshot'))}", *lines]) + "\n")
    process = daemons.spawn([BASH, str(script)], os.environ, run_dir / "logs" / "local.log")
    return Job(run, run_dir, store, f"local-{process.pid}", process, platform.node(), site.option)


@contextlib.contextmanager
def _undone_on_error(run_dir: Path) -> Iterator[None]:
    """When the submission fails, leave no folder of a new run, and an old one its config and its cancel marker."""
    config, marker = run_dir / "config.yaml", cancel_marker(run_dir)
    existed, cancelled = (run_dir / "job.json").exists(), marker.exists()
    before = config.read_bytes() if config.exists() else None
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(run_dir, ignore_errors=True)
        with contextlib.suppress(OSError):  # a disk that took nothing before takes nothing now
            if existed and before is not None:
                config.write_bytes(before)
            if existed and cancelled:
                marker.touch()
        raise


def _write(run_dir: Path, config: dict[str, Any], code: Path) -> None:
    write_snapshot(run_dir, code)
    with tarfile.open(packed_code(run_dir), "w:gz") as archive:  # now: the job will compile what it runs from
        archive.add(run_dir / "snapshot", "snapshot")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def write_snapshot(run_dir: Path, code: Path) -> None:
    """Copy the packages into run_dir/snapshot, whole or not at all, and make the folder of the logs."""
    beside = run_dir / f"snapshot.{os.getpid()}"
    for name in _code_files(code):
        target = beside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(code / name, target)
    (beside / "VERSION").write_text(_version(code) + "\n")
    (beside / "uncommitted.diff").write_text(_git(code, "diff", "--binary", "HEAD", "--", *PACKAGES) or "")
    shutil.rmtree(run_dir / "snapshot", ignore_errors=True)
    beside.rename(run_dir / "snapshot")
    (run_dir / "logs").mkdir(exist_ok=True)


def _code_files(code: Path) -> list[Path]:
    """The files of the packages: those that git tracks or would, or all of them where git is not used."""
    listed = _git(code, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    if listed is not None:
        return [Path(name) for name in listed.split("\0") if name and (code / name).is_file()]
    found = (path for package in PACKAGES for path in (code / package).rglob("*") if path.is_file())
    return [path.relative_to(code) for path in found if "__pycache__" not in path.parts]


def _version(code: Path) -> str:
    described = _git(code, "describe", "--always", "--dirty", "--abbrev=40")
    return described.strip() if described else "no git"


def _git(code: Path, *arguments: str) -> str | None:
    """git's answer; None where it is not installed or `code` is not the root of a working tree of its own."""
    if not (code / ".git").exists() or (program := shutil.which("git")) is None:
        return None
    done = subprocess.run([program, "-C", str(code), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None
