"""What doctor's job does on a node: look at the store, the clock and the GPUs, then wait for a signal."""

import json
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.store import Store
from jobs.doctor_store import ahead_of_store_s, put_and_get
from jobs.start import this_host, write_json


@dataclass(frozen=True)
class Seen:
    """store: what is wrong with it, None when nothing is. ahead_s: of the store's clock."""

    host: str
    store: str | None
    ahead_s: float | None
    gpus: int


def probe(folder: str, url: str, wait_s: float) -> None:
    """Leave `seen-<host>.json` in the folder, and `signalled-<host>.json` when USR2 comes within `wait_s`."""
    signalled: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: signalled.append(number))
    host = this_host()
    seen = Seen(host, _store(url), _clock(url), _gpus())
    write_json(Path(folder) / f"seen-{host}.json", asdict(seen))
    deadline = time.monotonic() + wait_s
    while not signalled and time.monotonic() < deadline:
        time.sleep(0.1)
    if signalled:
        write_json(Path(folder) / f"signalled-{host}.json", asdict(seen))


def read_all(folder: Path, what: str) -> list[Seen]:
    return [Seen(**json.loads(path.read_text())) for path in sorted(folder.glob(f"{what}-*.json"))]


def _store(url: str) -> str | None:
    """Tried as this node, with the job's keys."""
    try:
        put_and_get(Store(url, retry_seconds=5.0))
    except UserError as error:
        return str(error)
    return None


def _clock(url: str) -> float | None:
    try:
        return ahead_of_store_s(url)
    except Exception:  # noqa: BLE001 - `store` says what is wrong with it
        return None


def _gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=15, check=False)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
