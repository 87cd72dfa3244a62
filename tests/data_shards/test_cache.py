"""The cache on a node's disk: it gives what was put or nothing, keeps to its limit, and outlives what befalls it."""

import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest

from data_shards.cache import LEFTOVER_S, Cache, Part, cache_name
from data_shards.whole import HIDDEN

MB = 2**20
NAME = cache_name("s3://shards/set", "shards/3f/000012.tar", "layout", "contents", 1000)
SHARD = random.Random(0).randbytes(5000)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def joined(parts: list[Part]) -> bytes:
    return b"".join(part.data or b"?" * (part.end - part.start) for part in parts)


def test_any_range_is_pieced_together_from_what_overlaps_it(tmp_path: Path) -> None:
    cache, rng = Cache(tmp_path, MB), random.Random(1)
    here = bytearray(b"?" * len(SHARD))
    for _ in range(60):
        start, end = sorted(rng.sample(range(len(SHARD) + 1), 2))
        parts = cache.parts(NAME, start, end)
        assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
        assert (parts[0].start, parts[-1].end) == (start, end)
        assert joined(parts) == bytes(here[start:end])
        first, last = sorted(rng.sample(range(len(SHARD) + 1), 2))
        cache.put(NAME, first, SHARD[first:last])
        here[first:last] = SHARD[first:last]


@pytest.mark.parametrize(
    "other",
    [
        ("s3://shards/set2", "shards/3f/000012.tar", "layout", "contents", 1000),
        ("s3://shards/set", "shards/3f/000013.tar", "layout", "contents", 1000),
        ("s3://shards/set", "shards/3f/000012.tar", "layout2", "contents", 1000),
        ("s3://shards/set", "shards/3f/000012.tar", "layout", "contents2", 1000),
        ("s3://shards/set", "shards/3f/000012.tar", "layout", "contents", 1001),
    ],
)
def test_another_set_or_another_content_never_hits(tmp_path: Path, other: tuple[str | int, ...]) -> None:
    cache = Cache(tmp_path, MB)
    cache.put(NAME, 0, SHARD)
    assert cache.parts(NAME, 0, 10) == [Part(0, 10, SHARD[:10])]
    assert cache.parts(cache_name(*other), 0, 10) == [Part(0, 10, None)]


def test_what_is_dropped_and_what_is_short_is_gone_and_the_rest_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, MB)
    for start in (0, 1000, 2000, 3000):
        cache.put(NAME, start, SHARD[start : start + 1000])
    cache.drop(NAME, 1500, 2500)
    short = next(path for path in files(tmp_path) if "-3000-" in path.name)
    short.write_bytes(b"short")
    assert cache.parts(NAME, 0, 4000) == [Part(0, 1000, SHARD[:1000]), Part(1000, 4000, None)]
    assert not short.exists()


def test_the_oldest_entries_leave_first_and_files_of_others_never(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"." * 3000)
    cache = Cache(tmp_path, 64_000)
    for k in range(200):
        cache.put(NAME, k * 1000, bytes([k]) * 1000)
        for path in files(tmp_path):
            if f"-{k * 1000}-" in path.name:
                os.utime(path, (k, k))
    inside = tmp_path / "farseer-cache" / "notes"
    inside.mkdir()
    (inside / "x.bytes").write_bytes(b"." * 3000)
    cache.put(NAME, 200_000, bytes(1000))
    here = [k for k in range(200) if cache.parts(NAME, k * 1000, k * 1000 + 1)[0].data]
    assert here == list(range(200 - len(here), 200))
    assert 50 <= len(here) <= 64
    assert (tmp_path / "mine.txt").exists()
    assert (inside / "x.bytes").exists()


def write_many(folder: Path, seed: int, limit: int) -> None:
    cache, rng = Cache(folder, limit), random.Random(seed)
    for _ in range(150):
        cache.put(cache_name(rng.randrange(50)), rng.randrange(100) * 4096, rng.randbytes(4096))


@pytest.mark.slow
def test_several_writers_together_keep_near_the_limit(tmp_path: Path) -> None:
    limit = 512 * 1024
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, seed, limit)) for seed in range(4)]
    for writer in writers:
        writer.start()
    most = 0
    while any(writer.is_alive() for writer in writers):
        most = max(most, sum(size_of(path) for path in tmp_path.rglob("*.bytes")))
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert limit // 2 < held(tmp_path)
    assert most <= limit * 15 // 16 + 4 * (limit // 64) + 32 * 4096


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def write_for_ever(folder: Path) -> None:
    rng, data = random.Random(0), bytes(range(256)) * 4096
    cache = Cache(folder, 1000 * MB)
    while True:
        cache.put(cache_name(rng.randrange(20)), 0, data)


def test_a_writer_killed_in_the_middle_leaves_only_whole_entries_and_what_goes_by_its_age(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    for _ in range(5):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
        writer.start()
        end = time.monotonic() + 20
        while len(files(tmp_path)) < 3 and time.monotonic() < end:
            time.sleep(0.001)
        assert writer.pid
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    for k in range(20):
        assert all(part.data in (None, data) for part in Cache(tmp_path, MB).parts(cache_name(k), 0, len(data)))
    folder = next((tmp_path / "farseer-cache").iterdir())
    old, young = folder / f"{HIDDEN}{'0' * 12}", folder / f"{HIDDEN}{'1' * 12}"
    for path, age in ((old, LEFTOVER_S + 60), (young, LEFTOVER_S - 60)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    Cache(tmp_path, 1000 * MB).put(NAME, 0, b"next start")
    assert not old.exists()
    assert young.exists()


def fill(folder: Path, results: "multiprocessing.connection.Connection") -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cache = Cache(folder, MB)
    cache.put(NAME, 0, SHARD[:1000])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # the disk's end
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(3):
            cache.put(NAME, 1000 * (k + 1), SHARD[:2000])
    results.send(([str(warning.message) for warning in said], cache.parts(NAME, 0, 3000)))


def test_on_a_full_disk_it_says_so_once_leaves_no_half_and_still_reads(tmp_path: Path) -> None:
    end, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, theirs))
    child.start()
    assert end.poll(30)
    said, parts = end.recv()
    child.join()
    assert len(said) == 1
    assert "File too large; going on without new entries" in said[0]
    assert parts == [Part(0, 1000, SHARD[:1000]), Part(1000, 3000, None)]
    assert [path.name for path in files(tmp_path)] == [f"{NAME}-0-1000.bytes"]


def test_a_folder_that_cannot_be_made_is_said_once_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file", MB)
    with pytest.warns(UserWarning, match="Not a directory; going on without new entries"):
        cache.put(NAME, 0, b"1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(NAME, 0, b"1")
    assert cache.parts(NAME, 0, 1) == [Part(0, 1, None)]
