"""Packing goes on where it was, whatever ended it, and its memory does not grow with what there is to pack."""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards import files, work
from data_shards.errors import UserError
from data_shards.index import Manifest, ShardSet, shard_path
from data_shards.pack import PackSettings, Source, pack
from data_shards.store import Store
from data_shards.work import Stopped, Tally
from tests.photos import write_tiles
from tests.waiting import until

SMALL = PackSettings(shard_bytes=30_000)
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles"), 180)


@pytest.fixture(scope="module")
def straight(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is in the store when nothing disturbs the packing."""
    store = Store(f"file://{tmp_path_factory.mktemp('straight')}")
    pack(tiles, store, SMALL)
    return contents(store)


def contents(store: Store) -> dict[str, bytes]:
    return {entry.path: store.get(entry.path) for entry in store.list()}


def finished(folder: Path) -> dict[Path, int]:
    """When the objects of the shards with a commit record were written."""
    numbers = [path.stem for path in folder.glob("plans/1/commits/*.json")]
    found = [path for number in numbers for path in folder.glob(f"shards/*/{number}.*")]
    return {path: path.stat().st_mtime_ns for path in found}


def stop_when(reached: Callable[[int], bool]) -> Callable[..., None]:
    def progress(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        if what == "images" and reached(done):
            raise KeyboardInterrupt

    return progress


@pytest.mark.slow
def test_interrupted_at_any_moment_the_same_call_goes_on_and_no_finished_shard_is_written_again(
    tiles: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    store = Store(f"file://{tmp_path}")
    kept: dict[Path, int] = {}
    interrupted = 0
    for _ in range(50):
        began = len(kept)
        try:
            pack(tiles, store, SMALL, workers=1, progress=stop_when(lambda _: len(finished(tmp_path)) > began + 3))  # noqa: B023
            break
        except KeyboardInterrupt:
            interrupted += 1
            now = finished(tmp_path)
            assert {path: now[path] for path in kept} == kept
            assert not store.exists("MANIFEST.json")
            kept = now
    assert interrupted > 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(store) == straight


@pytest.mark.slow
def test_killed_with_all_its_processes_at_work_the_same_call_goes_on_to_the_same_bytes(
    tiles: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    program = f"""
        import time
        from data_shards import work
        from data_shards.pack import PackSettings, pack
        from data_shards.store import Store
        examine = work.examine
        work.examine = lambda *given: (time.sleep(0.03), examine(*given))[1]  # so that it is killed before its end
        if __name__ == "__main__":
            pack({str(tiles)!r}, Store("file://{tmp_path}/dst"), PackSettings(shard_bytes=30_000), workers=2)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, start_new_session=True)
    until(lambda: len(finished(tmp_path / "dst")) > 6 or process.poll() is not None)
    process.kill()
    process.wait()
    until(lambda: not running(process.pid))  # its workers leave with it
    kept = finished(tmp_path / "dst")
    store = Store(f"file://{tmp_path}/dst")
    assert not store.exists("MANIFEST.json")
    report = pack(tiles, store, SMALL, workers=2)
    assert (report.samples, report.already_there) == (180, False)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(store) == straight


def running(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def test_of_two_calls_that_pack_the_same_place_at_once_neither_harms_the_other(
    tiles: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    store = Store(f"file://{tmp_path}")
    begun = False

    def another(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        nonlocal begun
        if what == "images" and done and not begun:
            begun = True
            pack(tiles, Store(f"file://{tmp_path}"), SMALL, workers=1)

    assert pack(tiles, store, SMALL, workers=1, progress=another).samples == 180
    assert begun
    assert contents(store) == straight


class Deadly:
    """Ends the process that asks for its number."""

    def __int__(self) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_the_count_of_a_process_that_died_while_it_counted_holds_up_nobody() -> None:
    tally = Tally()
    tally.add(5, False)
    child = multiprocessing.get_context("fork").Process(target=tally.add, args=(7, Deadly()))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    counted: list[tuple[int, int, int]] = []

    def look_and_stop() -> None:
        counted.append(tally.read())
        tally.stop()
        counted.append(tally.read())

    looking = threading.Thread(target=look_and_stop, daemon=True)
    looking.start()
    looking.join(10)
    assert counted == [(1, 5, 0)] * 2


def test_nothing_is_counted_any_more_after_a_stop() -> None:
    tally = Tally()
    tally.stop()
    with pytest.raises(Stopped):
        tally.add(1, True)
    assert tally.read() == (0, 0, 0)


def test_a_process_that_dies_is_one_line_that_says_what_to_do(tiles: Path, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the pool ends the others meanwhile
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes() and what == "images":
                    os.kill(int(child), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a process died.*the same command goes on") as error:
        pack(tiles, Store(f"file://{tmp_path}"), SMALL, workers=2, progress=kill)
    assert "\n" not in str(error.value)
    assert pack(tiles, Store(f"file://{tmp_path}"), SMALL).samples == 180


def test_a_store_that_cannot_be_written_is_told_before_anything_is_listed(tiles: Path) -> None:
    with pytest.raises(UserError, match="file:///proc/farseer") as error:
        pack(tiles, Store("file:///proc/farseer"), SMALL, progress=lambda *_, **__: pytest.fail("it lists"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_of_large_sources_no_more_bytes_are_read_ahead_than_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "READ_AHEAD_BYTES", 6 * 2**20)
    size, photos = 2**20, Store("memory://large")
    for number in range(60):
        photos.put(f"{number:02d}", b"x" * size)
    (read, _), ahead = files.store_of(f"{photos.url}/00") or pytest.fail("none"), []
    before = read.counters.bytes_read

    def progress(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        if what == "images" and done:
            time.sleep(0.02)  # as examining takes, while others read
            ahead.append(read.counters.bytes_read - before - bytes)

    with pytest.raises(UserError, match="no image to pack"):
        pack(photos.url, Store(f"file://{tmp_path}"), PackSettings(), workers=1, progress=progress)
    assert len(ahead) >= 60
    assert 4 * size <= max(ahead) <= 6 * size + work.READERS * size


def test_a_shard_without_any_accepted_image_is_empty_and_its_set_can_be_read(tiles: Path, tmp_path: Path) -> None:
    data = next(tiles.rglob("*.jpg")).read_bytes()
    files = [tmp_path / f"{number:02d}.jpg" for number in range(40)]
    for number, file in enumerate(files):
        file.write_bytes(data if number == 7 else b"x" * len(data))
    store = Store(f"file://{tmp_path}/dst")
    pack([Source(str(file), size=len(data), name=file.name) for file in files], store, SMALL)
    manifest = Manifest.load(store)
    assert (manifest.samples, manifest.refused) == (1, {"not an image": 39})
    assert manifest.shard_samples.count(0) > 1
    (row,) = ShardSet.open(store).table().to_pylist()
    assert row["source"] == "07.jpg"
    with tarfile.open(fileobj=io.BytesIO(store.get(shard_path(manifest.shard_samples.index(0))))) as tar:
        assert tar.getmembers() == []
