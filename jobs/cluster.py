"""The local site: an S3 server and a SLURM of several nodes on this machine, for the demo, the tests and first tries.

    farseer cluster up|down|status

    DIR/s3, DIR/slurm  the two servers, each with its logs (jobs/local_s3.py, jobs/local_slurm.py)
    DIR/site.yaml      how to submit here: what SITE=local means; there while it is up
    DIR/env.sh         for a shell: `. DIR/env.sh`, then aws, sinfo, squeue and farseer find both

Where SLURM is not installed or does not start, the site is S3 and submitit's local executor.
"""

import shlex
from pathlib import Path
from typing import Any

import yaml

from data_shards.errors import UserError
from data_shards.whole import PRIVATE, write_whole
from jobs.local_s3 import S3, past_proxies, running_s3, start_s3, stop_s3
from jobs.local_slurm import OtherSettings, Slurm, call, running_slurm, start_slurm, stop_slurm, why_not
from jobs.slurm_conf import Settings


def up(directory: Path) -> list[str]:
    """Start both, or go on with what runs; returns lines that say what is there.

    Raises UserError when S3 cannot be started, or SLURM runs with other settings. SLURM itself can be done without.
    """
    directory = directory.resolve()
    slurm: Slurm | None = None
    s3 = start_s3(directory / "s3")
    try:
        slurm = start_slurm(directory / "slurm")
        said = f"SLURM: {slurm.nodes} nodes, logs in {directory / 'slurm' / 'log'}"
    except OtherSettings:
        raise
    except UserError as error:
        said = f"{error}; going on without it: jobs run through submitit's local executor"
    write_whole(directory / "site.yaml", yaml.safe_dump(_site(directory, s3, slurm), sort_keys=False), PRIVATE)
    parts = [f". {shlex.quote(f'{part}/env.sh')}" for part in (s3.directory, *([slurm.directory] if slurm else []))]
    write_whole(directory / "env.sh", "\n".join(parts) + "\n", PRIVATE)
    return [
        f"S3: {s3.url}, buckets {' and '.join(s3.buckets)}",
        said,
        f"for your shell: . {shlex.quote(str(directory / 'env.sh'))}",
    ]


def down(directory: Path) -> None:
    """Stop both and all jobs; what is stored in S3 stays."""
    for name in ("site.yaml", "env.sh"):
        (directory / name).unlink(missing_ok=True)
    if (directory / "slurm").is_dir():
        stop_slurm(directory / "slurm")
    if (directory / "s3").is_dir():
        stop_s3(directory / "s3")


def status(directory: Path) -> list[str]:
    """What runs, a line each; with SLURM also its nodes and its queue."""
    directory = directory.resolve()
    s3, slurm = running_s3(directory / "s3"), running_slurm(directory / "slurm")
    lines = [f"S3     {s3.url}, buckets {', '.join(s3.buckets)}" if s3 else "S3     does not run (make cluster-up)"]
    if slurm is None:
        return [*lines, f"SLURM  does not run{f': {why}' if (why := why_not()) else ''}"]
    lines.append(f"SLURM  {slurm.nodes} nodes; shell: . {directory / 'env.sh'}")
    return lines + [f"  {line}" for tool in ("sinfo", "squeue") for line in call(slurm.directory, tool).splitlines()]


def _site(directory: Path, s3: S3, slurm: Slurm | None) -> dict[str, Any]:
    """As jobs are submitted to it: paths and names by which programs find both, no secret."""
    return {
        "name": "local",
        "executor": "slurm" if slurm else "local",
        "partition": "main",
        "nodes": slurm.nodes if slurm else Settings().nodes,
        "shared_dir": str(directory.parent / "jobs"),
        "environment": s3.environment() | (slurm.environment() if slurm else {}) | past_proxies(),
    }
