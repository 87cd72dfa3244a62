"""The demo's photographs: cut, split by place, filtered, credited; broken files planted."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_shards.errors import UserError
from jobs import photos
from jobs.packages import Packages, credit

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2014 The Upstream Group http://example.org/
License: GPL-2+

Files: debian/*
Copyright: 2014, A Packager <packager@example.org>
License: Expat

Files: nature/Dune.jpg
       nature/Sea.jpg
Copyright: 2007-2009, Jane Doe <jane@example.org>
           2008, John Roe <john@example.org>;
License: CC-BY-4.0
Comment: both hold it

License: GPL-2+
 This package is free software.
"""


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise at several scales: detail everywhere, and no two places are alike."""
    draw = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for side in (8, 32, 128):
        small = draw.integers(0, 80, (height // side + 1, width // side + 1, 3))
        pixels += np.kron(small, np.ones((side, side, 1)))[:height, :width]
    return Image.fromarray(pixels.astype(np.uint8))


def test_no_pixel_of_a_photograph_is_both_in_a_training_tile_and_in_a_held_out_one() -> None:
    width, height = 8 * 192, 6 * 192
    across = np.broadcast_to(np.arange(width) / width * 200, (height, width))
    grain = np.random.default_rng(0).integers(0, 50, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1)
    train, test = photos.cut(Image.fromarray((across + grain).astype(np.uint8)))
    # Grey tells the column, to within a fifth of a column once the grain is averaged away.
    columns = [[round((np.asarray(tile).mean() - 24.5) / 25 - 0.5) for _, tile in part] for part in (train, test)]
    assert set(columns[0]) == {0, 1, 2, 3, 4}
    assert set(columns[1]) == {6, 7}  # column 5 is dropped
    assert len(train) == 30
    assert len(test) == 12


def test_out_of_focus_tiles_are_dropped_and_a_photograph_with_too_few_others_gives_none() -> None:
    photo = photograph(8 * 192, 6 * 192)
    blurred = photo.filter(ImageFilter.GaussianBlur(40))
    half = photo.copy()
    half.paste(blurred.crop((0, 0, 8 * 192, 3 * 192)), (0, 0))
    train, test = photos.cut(half)
    assert {place[:2] for place, _ in train + test} == {"03", "04", "05"}
    assert photos.cut(blurred) == ([], [])
    nearly = photo.copy()
    nearly.paste(blurred.crop((0, 0, 8 * 192, 5 * 192)), (0, 0))  # one row: five train tiles and two held out
    assert photos.cut(nearly) == ([], [])


def test_detail_is_the_mean_step_between_neighbours_of_the_halved_grey_image() -> None:
    tile = photograph(128, 128, seed=3)
    grey = [[float(tile.convert("L").getpixel((x, y))) for x in range(128)] for y in range(128)]  # type: ignore[arg-type]
    small = [
        [sum(grey[2 * y + b][2 * x + a] for a in (0, 1) for b in (0, 1)) / 4 for x in range(64)] for y in range(64)
    ]
    down = [abs(small[y + 1][x] - small[y][x]) for y in range(63) for x in range(64)]
    right = [abs(small[y][x + 1] - small[y][x]) for y in range(64) for x in range(63)]
    assert photos.detail(tile) == pytest.approx((sum(down) / len(down) + sum(right) / len(right)) / 2)


def test_a_large_photograph_is_scaled_to_the_area_and_a_small_one_is_left_alone() -> None:
    large = sum(map(len, photos.cut(photograph(960, 600).resize((3840, 2400), Image.Resampling.NEAREST))))
    assert large == 10 * 6 - 6  # 1920 x 1200, less one column
    small = sum(map(len, photos.cut(photograph(960, 960))))
    assert small == 5 * 5 - 5


def test_a_photograph_that_its_camera_turned_is_cut_upright() -> None:
    photo = photograph(8 * 192, 6 * 192)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    upright, expected = photos.cut(turned)[0], photos.cut(photo)[0]
    assert [place for place, _ in upright] == [place for place, _ in expected]
    assert np.array_equal(np.asarray(upright[0][1]), np.asarray(expected[0][1]))


def test_a_stamp_lies_in_the_middle_of_grey_with_its_long_side_at_112_pixels() -> None:
    stamp = Image.new("RGBA", (400, 200), (255, 0, 0, 255))
    red = np.asarray(photos.paste(stamp))[..., 1] < 100
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert (columns[0], columns[-1]) == (8, 119)
    assert (rows[0], rows[-1]) == (36, 91)
    assert np.asarray(photos.paste(Image.new("RGBA", (50, 80), (0, 0, 0, 0)))).min() == 200


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(photos, "LEAST_SET", 30)
    folder = tmp_path / "mine"
    (folder / "holiday").mkdir(parents=True)
    for number in range(2):
        photograph(6 * 192, 5 * 192, seed=number).save(folder / "holiday" / f"Beach {number}.png")
    (folder / "notes.txt").write_text("not a photograph")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    return folder


def test_a_users_folder_becomes_a_set_and_the_second_call_finds_it(own: Path, tmp_path: Path) -> None:
    made = photos.prepare(tmp_path / "photos", own)
    assert (made.photographs, made.train_tiles, made.test_tiles) == (2, 40, 10)
    assert sorted(path.name for path in made.train.iterdir()) == sorted(path.name for path in made.test.iterdir())
    times = {path: path.stat().st_mtime_ns for path in made.train.rglob("*.jpg")}
    assert photos.prepare(tmp_path / "photos", own) == made
    assert {path: path.stat().st_mtime_ns for path in made.train.rglob("*.jpg")} == times


def test_a_photograph_whose_name_is_no_utf_8_is_taken_like_any_other(own: Path, tmp_path: Path) -> None:
    (own / "one more.png").write_bytes((own / "holiday" / "Beach 0.png").read_bytes())
    (own / "one more.png").rename(own / os.fsdecode(b"caf\xe9.png"))
    made = photos.prepare(tmp_path / "photos", own)
    assert made.photographs == 3
    assert photos.prepare(tmp_path / "photos", own) == made


def test_a_changed_folder_makes_another_set_under_another_name(own: Path, tmp_path: Path) -> None:
    before = photos.prepare(tmp_path / "photos", own)
    photograph(6 * 192, 5 * 192, seed=9).save(own / "one more.png")
    after = photos.prepare(tmp_path / "photos", own)
    assert (after.photographs, after.name != before.name) == (3, True)


def test_too_few_photographs_are_told_in_one_line(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "LEAST_SET", 512)
    with pytest.raises(UserError, match=r"SRC=.*mine: 2 of 4 files are photographs .* 40 tiles in all; .* 512"):
        photos.prepare(tmp_path / "photos", own)
    with pytest.raises(UserError, match=r"^SRC=/nowhere: no such folder$"):
        photos.prepare(tmp_path / "photos", Path("/nowhere"))
    assert not (tmp_path / "photos" / "own" / "set.json").exists()


def test_planted_files_do_not_decode_and_are_the_same_each_time(own: Path, tmp_path: Path) -> None:
    made = photos.prepare(tmp_path / "photos", own)
    planted = photos.plant_corrupt(made.train, seed=1)
    assert len(planted) == 5
    contents = {path: path.read_bytes() for path in planted}
    for path in planted:
        with pytest.raises((OSError, SyntaxError)), Image.open(path) as image:
            image.load()
    assert {path: path.read_bytes() for path in photos.plant_corrupt(made.train, seed=1)} == contents


def test_the_last_paragraph_that_names_a_file_says_whose_it_is(tmp_path: Path) -> None:
    unpacked = tmp_path / "nice-backgrounds"
    (unpacked / "usr/share/doc/nice").mkdir(parents=True)
    (unpacked / "usr/share/doc/nice/copyright").write_text(COPYRIGHT)
    sea = credit(unpacked, unpacked / "usr/share/backgrounds/Sea.jpg", "sea")
    assert str(sea) == "sea: Jane Doe; John Roe (CC-BY-4.0, nice-backgrounds)"
    hill = credit(unpacked, unpacked / "usr/share/backgrounds/Hill.jpg", "hill")
    assert str(hill) == "hill: The Upstream Group http://example.org/ (GPL-2+, nice-backgrounds)"


@pytest.mark.slow
def test_a_package_that_is_not_to_be_had_is_told_with_its_reason(tmp_path: Path) -> None:
    packages = Packages(tmp_path)
    assert packages.fetch("no-such-package-of-photographs") is None
    assert packages.missing["no-such-package-of-photographs"]
    assert [path.name for path in tmp_path.iterdir() if path.name != ".apt"] == []  # nothing half unpacked


@pytest.mark.slow
def test_the_packages_give_the_set_on_which_the_demo_was_tuned(tmp_path: Path) -> None:
    mirror = subprocess.run(["apt-get", "download", "--print-uris", photos.STAMPS], capture_output=True, text=True)
    try:
        made = photos.prepare(tmp_path)
    except UserError as error:
        pytest.skip(f"no packages here ({mirror.stderr.strip()}): {error}")
    stamps = [len(list(part.glob("stamp-*/*.jpg"))) for part in (made.train, made.test)]
    assert made.notes == ()
    assert made.photographs == 28
    assert (made.train_tiles - stamps[0], made.test_tiles - stamps[1]) == (595, 294)
    assert stamps in ([201, 85], [237, 101])  # of Debian 12, of Debian 13
    assert len(made.authors) == 29
    assert "| aitzgorri | Aitzol Berasategi | CC-BY-4.0 | lomiri-wallpapers-16.04 |" in (
        (tmp_path / "AUTHORS.md").read_text()
    )
    assert not (tmp_path / "packages").exists()
