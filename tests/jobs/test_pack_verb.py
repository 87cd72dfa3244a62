"""`farseer shards` as it is typed, and its progress line."""

import io
import json
from pathlib import Path

import pytest

from data_shards.index import Manifest
from data_shards.store import Store
from jobs.cli import main
from jobs.verbs import ProgressLine, duration
from tests.photos import write_tiles


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("jobs.site.LOCAL", tmp_path / "no-site.yaml")
    return write_tiles(tmp_path / "src", 30)


def test_it_packs_appends_and_says_when_all_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = f"file://{folder.parent}/dst"
    command = ["shards", str(folder), dst, "--set", "shard_bytes=40000 label=none"]
    assert main(command) == 0
    assert "30 images in" in capsys.readouterr().out
    assert main(command) == 0
    assert "they were there already; APPEND=1 adds what SRC has got since" in capsys.readouterr().out
    (folder / "new.jpg").write_bytes(next(folder.rglob("*.jpg")).read_bytes())
    assert main([*command, "--append", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 31
    settings = Manifest.load(Store(dst)).settings
    assert (settings["shard_bytes"], settings["label"], settings["source"]) == (40_000, "none", str(folder))


@pytest.mark.parametrize(
    ("src", "dst", "more", "found"),
    [
        ("gone", "dst", [], r"gone: no such file"),
        ("src", "src/photo-0/00000.jpg/dst", [], "Not a directory"),
        ("src", "dst", ["--set", "min_sid=3"], "found 'min_sid=3'; valid is name=value of: min_side, "),
        ("src", "dst", ["--set", "min_side=-3 shard_bytes=x"], "min_side: found -3; "),
        ("src", "dst", ["--set", "label=@x min_side=40"], "SET: label: found '@x'; "),
        ("src", "dst", ["--set", "label=["], "SET: label: found '['; "),
        ("src", "dst", ["--set", "label=2024-02-30"], "SET: label: found '2024-02-30'; "),
        ("src", "dst", ["--workers", "-1"], "argument --workers: '-1' is no whole number above 0"),
        ("src", "dst", ["--append"], "holds no finished shard set to append to"),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line_with_exit_code_2_and_nothing_is_written(
    folder: Path, src: str, dst: str, more: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", str(folder.parent / src), f"file://{folder.parent}/{dst}", *more]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert found in said.err
    assert Store(f"file://{folder.parent}/dst").list() == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "lines"), [(True, 1), (False, 3)])
def test_the_progress_line_says_how_far_how_fast_and_how_long(terminal: bool, lines: int) -> None:
    out, now = (Terminal if terminal else io.StringIO)(), [0.0]
    show = ProgressLine(out, lambda: now[0])
    show("listed", 500, 0)
    for tens in range(11):
        now[0] = 10.0 + 10 * tens
        # 200 of 1,200 were there before
        show("images", 200 + 100 * tens, 1200, bytes=5_000_000 * tens, refused=tens)
    text = out.getvalue()
    assert text.count("\n") == lines
    wanted = "images 800/1,200 (67%), 10/s, 0.5 MB/s, 6 refused, 40 s left"
    assert wanted in text
    if terminal:
        assert text.endswith("\r\x1b[2Kimages 1,200/1,200 (100%), 10/s, 0.5 MB/s, 10 refused\n")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min"), (3 * 3600 + 59, "3 h"), (90_000, "1 d 1 h"), (200, "3 min 20 s")],
)
def test_a_duration_is_told_to_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words
