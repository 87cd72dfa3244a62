"""`farseer shards --in-place`: what a user sees of it."""

import json
from pathlib import Path

import pytest

from jobs.cli import main
from tests.data_shards.test_archives import tar_of
from tests.photos import write_tiles


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    tiles = sorted(write_tiles(tmp_path / "tiles", 6).rglob("*.jpg"))
    return tar_of(tmp_path / "a.tar", {tile.name: tile.read_bytes() for tile in tiles})


def test_tars_are_indexed_and_a_sentence_says_what_their_order_means(
    tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = f"file://{tmp_path}/dst"
    assert main(["shards", str(tar), dst, "--in-place"]) == 0
    summary, about = capsys.readouterr().out.splitlines()
    assert summary.startswith(f"{dst}: 6 images in 1 shards, 0.0 MB; none refused")
    assert "batches are less mixed" in about
    assert main(["shards", str(tar), dst, "--in-place", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["already_there"], found["about"]) == (6, True, about)


def test_a_tar_may_be_named_from_the_folder_above(
    tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path / "tiles")
    assert main(["shards", f"../{tar.name}", f"file://{tmp_path}/dst", "--in-place"]) == 0
    assert "6 images in 1 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [["--append"], ["--dali-index"], ["--set", "drop_exif=true"], ["--set", "longest_side=9"]]
)
def test_what_would_have_to_write_tars_is_refused(
    option: list[str], tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", str(tar), f"file://{tmp_path}/dst", "--in-place", *option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leave out" in line
    assert not (tmp_path / "dst").exists()
