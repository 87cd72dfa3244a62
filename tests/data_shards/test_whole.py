"""Files that appear whole or not at all."""

import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from data_shards.whole import PRIVATE, beside, write_whole


def test_a_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "aws" / "credentials"
    before = os.umask(0)
    try:
        write_whole(path, "secret", PRIVATE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_other_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "beat.json", "{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "beat.json").stat().st_mode) == 0o640


def test_the_older_file_stays_where_the_disk_takes_only_a_part_of_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_whole(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, "n" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_who_reads_meanwhile_finds_one_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    texts = {letter * 300_000 for letter in "ab"}
    write_whole(path, min(texts))
    writers = [
        threading.Thread(target=lambda text=text: [write_whole(path, text) for _ in range(20)]) for text in texts
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    for writer in writers:
        writer.join()


def test_of_what_was_not_given_its_place_nothing_is_left(tmp_path: Path) -> None:
    with beside(tmp_path / "part") as aside:
        aside.write_text("half")
    assert list(tmp_path.iterdir()) == []
