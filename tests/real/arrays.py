"""Killing a task of a SLURM array."""

import os
import signal
from pathlib import Path

from jobs.daemons import processes


def kill_second_task(folder: Path) -> bool:
    """Kill, as the kernel would for want of memory, the processes that run the second task of an array.

    folder: the test's, in which the array works. Returns whether there were any.
    """
    ours, killed = f"FARSEER_RUN_DIR={folder}".encode(), False
    for process in processes():
        try:
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue
        is_task = b"SLURM_ARRAY_TASK_ID=1" in variables and b"submitit" in command and b"srun" not in command
        if is_task and any(one.startswith(ours) for one in variables):
            os.kill(process.pid, signal.SIGKILL)
            killed = True
    return killed
