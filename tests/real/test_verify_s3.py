"""Verifying a set in a real S3 store, in full, over processes, and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_shards.index import MANIFEST, Manifest, shard_path
from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from data_shards.verify import verify
from tests.photos import photographs
from tests.waiting import until

VERIFY = """
import sys
import time
from pathlib import Path
from data_shards import verify as module
from data_shards.store import Store
from data_shards.verify import verify
examine = module.examine
module.examine = lambda *given: (time.sleep(0.03), examine(*given))[1]  # so that it is killed before its end
if __name__ == "__main__":
    verify(Store(sys.argv[1]), full=True, workers=2, notes=Path(sys.argv[2]))
"""


@pytest.fixture
def photos(s3: Any, tmp_path: Path) -> Store:
    """120 cuts of real photographs, large enough that it takes a while to decode them, in some 30 shards."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for n, photo in enumerate(photographs() * 20):
        width, height = photo.size
        photo.crop((n % 40, n % 30, width, height)).save(folder / f"{n:04d}.jpg", quality=85)
    store = Store(s3.bucket("shards"))
    pack(folder, store, PackSettings(shard_bytes=sum(f.stat().st_size for f in folder.iterdir()) // 30))
    return store


@pytest.mark.slow
def test_a_full_check_that_was_killed_reads_finished_shards_no_more(photos: Store, tmp_path: Path) -> None:
    script, notes = tmp_path / "verify.py", tmp_path / "notes"
    script.write_text(VERIFY)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen([sys.executable, str(script), photos.url, str(notes)], env=environment)
    until(lambda: len(noted(notes)) >= 3 or running.poll() is not None)
    workers = children(running.pid)
    running.send_signal(signal.SIGKILL)
    running.wait()
    until(lambda: not any(not dead(pid) for pid in workers))
    done = noted(notes)
    manifest = Manifest.load(photos)
    assert 3 <= len(done) < len(manifest.shard_samples)

    photos.put(shard_path(done[0]), bytes(manifest.shard_bytes[done[0]]))  # nobody looks there again
    store = Store(photos.url)
    report = verify(store, full=True, workers=1, notes=notes)
    assert report.faults == ()
    assert report.resumed == len(done)
    beside = sum(entry.size for entry in photos.list("shards") if not entry.path.endswith(".tar"))
    left = sum(size for number, size in enumerate(manifest.shard_bytes) if number not in done)
    assert store.counters.bytes_read <= left + 2 * beside + 3 * photos.size(MANIFEST)
    assert noted(notes) == []
    assert verify(Store(photos.url), full=True, notes=notes, workers=2).faults != ()


@pytest.mark.slow
def test_a_full_check_can_be_begun_afresh(photos: Store, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int, **_: int) -> None:
        if what == "images" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(photos, full=True, workers=2, notes=tmp_path / "notes", progress=interrupt)
    done = noted(tmp_path / "notes")
    assert done
    photos.put(shard_path(done[0]), bytes(photos.size(shard_path(done[0]))))
    report = verify(photos, full=True, workers=2, notes=tmp_path / "notes", afresh=True)
    assert report.resumed == 0
    assert {fault.object for fault in report.faults} == {shard_path(done[0])}


def noted(folder: Path) -> list[int]:
    """Shards of which the notes say that they are done."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines() if line.endswith("]")]
    return [json.loads(line)[0] for line in lines]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def dead(pid: int) -> bool:
    """Gone, or a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
