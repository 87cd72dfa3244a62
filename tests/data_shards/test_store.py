"""Stores without a server. What S3 does is in tests/real/test_store_s3.py."""

import asyncio
import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_shards import local
from data_shards.errors import UserError
from data_shards.store import AlreadyExists, Entry, NotFound, Store, StoreError, Truncated


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/a" if request.param == "file" else f"memory://{tmp_path.name}/a")


def test_what_was_put_is_what_is_read_whole_and_in_ranges(store: Store) -> None:
    store.put("x/y.bin", bytes(range(256)))
    assert store.get("x/y.bin") == bytes(range(256))
    assert store.get("x/y.bin", 10, 20) == bytes(range(10, 20))
    assert store.get("x/y.bin", 250) == bytes(range(250, 256))
    assert store.get("x/y.bin", 0, 0) == b""
    assert store.size("x/y.bin") == 256


def test_a_range_past_the_end_is_an_error_and_never_a_short_answer(store: Store) -> None:
    store.put("x", b"12345")
    with pytest.raises(Truncated, match="ends at byte 5, bytes 3 to 9"):
        store.get("x", 3, 9)


def test_a_missing_object_is_not_found_and_does_not_exist(store: Store) -> None:
    assert not store.exists("none")
    for call in (store.get, store.size):
        with pytest.raises(NotFound, match="a/none: no such"):
            call("none")
    store.delete(["none"])


def test_the_second_writer_of_a_create_only_put_loses(store: Store) -> None:
    store.put("claim", b"first", create_only=True)
    with pytest.raises(AlreadyExists, match="claim: is there already"):
        store.put("claim", b"second", create_only=True)
    assert store.get("claim") == b"first"
    store.put("claim", b"third")
    assert store.get("claim") == b"third"


def test_one_of_many_threads_wins_a_create_only_put(store: Store) -> None:
    won = []

    def claim(number: int) -> None:
        try:
            store.put("claim", b"%d" % number, create_only=True)
        except AlreadyExists:
            return
        won.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [store.get("claim")]


def test_a_listing_has_all_depths_sorted_relative_to_the_url_and_no_neighbours(store: Store) -> None:
    for path in ("b/2", "b/1/z", "a", "bb/1"):
        store.put(path, b"." * len(path))
    assert store.list() == [Entry("a", 1), Entry("b/1/z", 5), Entry("b/2", 3), Entry("bb/1", 4)]
    assert store.list("b") == [Entry("b/1/z", 5), Entry("b/2", 3)]
    assert store.at("b").list() == [Entry("1/z", 5), Entry("2", 3)]
    assert store.list("c") == []


def test_the_folders_right_below_are_named_once_each_and_without_what_they_hold(store: Store) -> None:
    for path in ("b/1", "b/deep/2", "a/x/3", "file", "c-d/4"):
        store.put(path, b"x")
    assert store.folders() == ("a", "b", "c-d")
    assert store.folders("b") == ("deep",)
    assert store.folders("nowhere") == ()


@pytest.mark.parametrize(("number", "passing"), [(errno.ESTALE, True), (errno.EIO, True), (errno.EROFS, False)])
def test_a_shared_disk_that_is_away_may_be_back_for_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passing: bool
) -> None:
    def away(*_: object) -> bytes:
        with local._named("shared/runs/x"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local.Folder, "_read", away)
    with pytest.raises(StoreError, match=f"file:///shared/runs/x: {os.strerror(number)}") as error:
        Store(tmp_path.as_uri()).get("x")
    assert error.value.passing == passing


def test_a_deeper_store_is_the_same_place_and_counts_together(store: Store) -> None:
    store.at("b").at("c").put("d", b"123")
    assert store.get("b/c/d") == b"123"
    assert store.at("b/c").url == f"{store.url}/b/c"
    assert store.counters.bytes_written == store.at("b").counters.bytes_read == 3


def test_files_go_up_and_down_unchanged_and_leave_nothing_beside_them(store: Store, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(100_000))
    store.upload(local, "up/file")
    store.download("up/file", tmp_path / "down" / "file")
    assert (tmp_path / "down" / "file").read_bytes() == local.read_bytes()
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["file"]
    assert [entry.path for entry in store.list()] == ["up/file"]
    with pytest.raises(NotFound):
        store.download("none", tmp_path / "down" / "none")
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EACCES, "Permission denied"), (errno.ESTALE, "Stale file handle")]
)
def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Lists of removed images may be in it. Root may read any, so the system's answer is made up."""
    store, scandir = Store(f"file://{tmp_path}/a"), os.scandir
    store.put("removed/000001.txt", b"1")

    def refused(path: str) -> object:
        if str(path).endswith("/removed"):
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    for ask in (store.list, lambda: store.list("removed"), lambda: store.abandon("removed")):
        with pytest.raises(StoreError, match=f"a/removed: {words}"):
            ask()
    monkeypatch.setattr(os, "scandir", scandir)
    assert [entry.path for entry in store.list("removed")] == ["removed/000001.txt"]
    assert store.list("gone") == store.list("removed/000001.txt/x") == []


def test_an_upload_to_a_folder_whose_process_was_killed_is_given_up(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/a")
    (tmp_path / "file").write_bytes(b"1")
    for path in ("dead/whole", "dead/deep/whole", "deadly/whole"):
        store.put(path, b"1")
    for folder in ("dead", "dead/deep", "deadly"):
        child = os.fork()
        if not child:
            local._sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # written, and not yet in its place
            try:
                store.upload(tmp_path / "file", f"{folder}/x")
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert store.abandon("dead") == 2
    assert store.abandon("dead") == store.abandon("nowhere") == 0
    assert sorted(path.name[:6] for path in (tmp_path / "a").rglob("*") if path.is_file()) == [".part-", *3 * ["whole"]]
    assert len(store.list()) == 3


def test_deleted_objects_are_gone(store: Store) -> None:
    for path in "abc":
        store.put(path, b"")
    store.delete(["a", "c"])
    assert [entry.path for entry in store.list()] == ["b"]


def test_a_store_survives_pickling_and_closing(store: Store) -> None:
    store.put("a", b"1")
    store.close()
    assert store.get("a") == pickle.loads(pickle.dumps(store)).get("a") == b"1"  # noqa: S301


def test_a_store_that_is_forgotten_holds_up_nobody_while_it_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    go, closed = threading.Event(), threading.Event()

    async def close(self: object) -> None:
        await asyncio.to_thread(go.wait)
        closed.set()

    monkeypatch.setattr(local.Memory, "close", close)
    monkeypatch.setattr("data_shards.store.END_S", 60.0)
    forgetting = threading.Thread(target=lambda: Store("memory://forgotten").put("a", b"1"))
    forgetting.start()
    forgetting.join(30)
    held_up = forgetting.is_alive()
    go.set()
    assert not held_up
    assert closed.wait(30)


AT_THE_END = """
import asyncio
from data_shards import local
from data_shards.store import Store

async def close(self):
    await asyncio.sleep(0.1)
    print("closed")

local.Memory.close = close
store = Store("memory://open")
store.put("a", b"1")
"""


def test_a_store_that_is_still_open_is_closed_before_the_interpreter_ends() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("closed\n", "")


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_a_store_that_could_begin_no_thread_is_none_the_worse(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="new thread"):
            store.put("a", b"1")
    store.put("a", b"1")
    assert store.get("a") == b"1"


NO_KEY = """
from data_shards import s3_bucket
from data_shards.store import Denied, Store

s3_bucket.KEY_S = 1.0
try:
    Store("s3://runs/mine").check()
except Denied as error:
    print(error)
"""


@pytest.mark.slow
def test_what_gives_a_key_and_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which ends before what gives the key."""
    (tmp_path / "config").write_text("[default]\nregion = somewhere\ncredential_process = sleep 30\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", NO_KEY], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.startswith("s3://runs: no key after 1 s; look at what gives it (credential_process")


def test_a_forked_child_reads_and_the_parent_goes_on(store: Store) -> None:
    store.put("a", b"1")
    child = os.fork()
    if not child:
        try:
            os._exit(0 if store.get("a") == b"1" else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("a") == b"1"


@pytest.mark.parametrize("url", ["", "shards", "s3://", "s3:///shards", "ftp://host/x", "file://relative/x"])
def test_what_is_not_a_stores_url_is_refused_with_the_forms_that_are(url: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/folder or file:///folder"):
        Store(url)


def test_of_a_path_the_url_is_said() -> None:
    with pytest.raises(UserError, match=r"^/data/shards: not the url of a store; file:///data/shards is$"):
        Store("/data/shards")


def test_a_path_cannot_lead_out_of_the_store(store: Store) -> None:
    for path in ("../x", "a/../../x"):
        with pytest.raises(StoreError, match="leads out of the store"):
            store.put(path, b"")
        for look in (store.get, store.size, store.at, store.list, lambda path: store.delete([path])):
            with pytest.raises(StoreError, match="leads out of the store"):
                look(path)


def test_the_name_of_a_folder_cannot_lead_out_of_another_in_a_bucket() -> None:
    for path in ("../x", "a/../../x"):
        with pytest.raises(StoreError, match="leads out of the store"):
            Store("s3://runs/mine").at(path)
