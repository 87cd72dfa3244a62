"""Starts the ranks of a run as processes of their own, without a cluster."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests import forking

DEADLINE_S = 240.0


@dataclass
class Ranks:
    """The processes of one attempt."""

    processes: list[ForkServerProcess]
    logs: list[Path]

    def wait(self) -> list[int]:
        """Exit codes, once all have left. Raises TimeoutError with the logs' ends."""
        deadline = time.monotonic() + DEADLINE_S
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        codes = [process.exitcode for process in self.processes if process.exitcode is not None]
        if len(codes) < len(self.processes):
            self.kill()
            raise TimeoutError(self.tails())
        return codes

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll until the condition holds. Raises TimeoutError, also when a rank leaves before."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline or any(p.exitcode is not None for p in self.processes):
                self.kill()
                raise TimeoutError(self.tails())
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None and process.pid:
                with suppress(ProcessLookupError):  # gone, and its exit code not yet here
                    os.kill(process.pid, number)

    def kill(self) -> None:
        """SIGKILL to all ranks at once."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def tails(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in self.logs)


def start(config: dict[str, Any], run_dir: Path, world_size: int, gpus: bool = False) -> Ranks:
    """Start `world_size` ranks of the run on this machine. gpus: one each; else they see none."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = Ranks([], [])
    for rank in range(world_size):
        file = run_dir / f"launch-{port}-{rank}.json"
        launch = {
            "run_dir": str(run_dir), "store": f"{config['store']}/{run_dir.name}", "rank": rank, "local_rank": rank,
            "local_world_size": world_size, "world_size": world_size, "master_addr": "127.0.0.1", "master_port": port,
        }  # fmt: skip
        file.write_text(json.dumps({"config": config, "launch": launch}))
        log = run_dir / f"launch-{port}-{rank}.log"
        log.touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
        process = forking.context().Process(target=_begin, args=(file, log, environment), daemon=True)
        process.start()
        ranks.processes.append(process)
        ranks.logs.append(log)
    return ranks


def _begin(file: Path, log: Path, environment: dict[str, str]) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(_main(file))


def _main(file: Path) -> int:
    from data_shards.errors import UserError
    from pipeline.config import Config
    from pipeline.train import Launch, run_rank

    given = json.loads(file.read_text())
    try:
        print("outcome:", run_rank(Config.model_validate(given["config"]), Launch(**given["launch"])))  # noqa: T201
    except UserError as error:
        print(f"farseer: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0
