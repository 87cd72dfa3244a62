"""Features of whole sets: the pixels that a classifier sees, a file a group, made once, going on after any end."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_shards.compact import compact
from data_shards.errors import UserError
from data_shards.index import ShardSet, shard_path
from data_shards.pack import Source
from data_shards.removed import remove
from data_shards.store import Store
from pipeline.augment import AugmentSettings
from pipeline.evaluate import extract as extracting
from pipeline.evaluate.extract import Features, extract
from pipeline.regnet import ModelSettings, RegNet
from tests.pipeline.evaluate.sets import labelled, packed

CPU = torch.device("cpu")
AUGMENT = AugmentSettings(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Pixels(nn.Module):
    """A trunk that gives back what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extracting, "GROUP", 20)
    monkeypatch.setattr(extracting, "BATCH", 7)


def features_of(folder: Path, shards: ShardSet, size: int = 32) -> Features:
    return Features(Store(f"file://{folder}/run"), 5, shards, size)


def encoded(shards: ShardSet, row: dict[str, Any]) -> bytes:
    tar = shards.store.get(shard_path(int(row["key"].partition("-")[0])))
    return tar[row["offset"] : row["offset"] + row["size"]]


def as_classifiers_see(data: bytes, size: int) -> np.ndarray:
    """The middle of the image, 7/8 of its shorter side, resized by PIL."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        side = 0.875 * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        seen = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
    return ((np.asarray(seen, np.float32) / 255 - 0.5) / 0.25).transpose(2, 0, 1)


def test_an_image_is_seen_as_classifiers_see_it(tmp_path: Path) -> None:
    from tests.photos import photographs

    files = []
    for n, photo in enumerate(photographs()):
        files.append(tmp_path / f"{n}.png")
        photo.save(files[-1])
    made = features_of(tmp_path, packed(tmp_path / "set", [Source(str(file), name=file.name) for file in files]), 64)
    extract(made, made.left(), Pixels(), AUGMENT)
    ids, features = made.read(CPU)
    rows = made.shards.table().to_pylist()
    assert {(row["width"], row["height"]) for row in rows} >= {(512, 512), (640, 427)}
    assert len(rows) == 6
    for row, seen in zip(rows, features.view(-1, 3, 64, 64).float().numpy(), strict=True):
        data = encoded(made.shards, row)
        difference = np.abs(seen - as_classifiers_see(data, 64))
        assert difference.mean() * 0.25 * 255 < 2  # levels: here, boxes are of whole pixels
    assert ids.tolist() == list(range(len(rows)))


def test_each_group_is_a_file_of_consecutive_ids_and_none_is_made_twice(tmp_path: Path) -> None:
    made = features_of(tmp_path, labelled(tmp_path, 90)[0])
    assert [group.start for group in made.groups[1:]] == [group.stop for group in made.groups[:-1]]
    assert (made.groups[0].start, made.groups[-1].stop) == (0, 60)
    assert len(made.groups) == 3
    assert all(len(group) >= 20 for group in made.groups[:-1])
    told: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int, *, bytes: int = 0, refused: int = 0) -> None:
        told.append((done, total))

    extract(made, [1], Pixels(), AUGMENT, progress=progress)
    assert told[-1] == (len(made.groups[1]), len(made.groups[1]))
    assert made.left() == [0, 2]
    extract(made, made.left(), Pixels(), AUGMENT, threads=2)
    assert made.left() == []
    together = features_of(tmp_path / "other", made.shards)
    extract(together, together.left(), Pixels(), AUGMENT)
    assert torch.equal(made.read(CPU)[1], together.read(CPU)[1])
    made.release("one")
    assert made.left() == [0, 1, 2]


def test_groups_need_no_more_than_the_manifest_and_end_with_a_shard(tmp_path: Path) -> None:
    shards = labelled(tmp_path, 90)[0]
    ends = set(shards.starts.tolist())
    assert all(group.stop in ends for group in features_of(tmp_path, shards).groups)
    shards.starts = np.array([0, 0, 45, 45, 60, 60])  # empty shards among them
    assert features_of(tmp_path, shards).groups == [range(45), range(45, 60)]


def test_removed_images_are_left_out_also_when_they_leave_after_their_features_were_made(tmp_path: Path) -> None:
    shards = labelled(tmp_path, 90)[0]
    whole = features_of(tmp_path, shards)
    extract(whole, whole.left(), Pixels(), AUGMENT)
    keys = [row["key"] for row in shards.table().to_pylist()]
    gone = [0, 33, *whole.groups[1]]
    remove(shards, [keys[n] for n in gone], force=True)
    kept = [n for n in range(60) if n not in gone]
    compact(shards.store)
    later, anew = features_of(tmp_path, shards), features_of(tmp_path / "anew", shards)
    extract(anew, anew.left(), Pixels(), AUGMENT)
    for one in (later, anew):
        ids, features = one.read(CPU)
        assert ids.tolist() == kept
        assert torch.equal(features, whole.read(CPU)[1][kept])


def test_an_image_that_cannot_be_had_ends_it_by_name_and_the_groups_before_it_stay(tmp_path: Path) -> None:
    made = features_of(tmp_path, labelled(tmp_path, 90)[0])
    sample = made.groups[1].stop - 1
    row = made.shards.table().to_pylist()[sample]
    shard = tmp_path / "bank" / shard_path(made.shards.locate(sample)[0])
    data = bytearray(shard.read_bytes())
    data[row["offset"] + 40] ^= 255
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"image {row['key']}: .*; make verify DST=file://.* FULL=1"):
        extract(made, made.left(), Pixels(), AUGMENT)
    assert made.left() == [1, 2]


def test_an_image_that_does_not_decode_is_found_in_its_batch_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shards = labelled(tmp_path, 12)[0]
    files = sorted(folder.glob("*/*.jpg"))
    whole = files[4].read_bytes()
    files[4].write_bytes(whole[: len(whole) // 2])  # its header is whole
    shards = packed(tmp_path / "set", [Source(str(file), name=file.name) for file in files], decode="header")
    (broken,) = [row["key"] for row in shards.table().to_pylist() if row["size"] == len(whole) // 2]
    made = features_of(tmp_path, shards)
    with pytest.raises(UserError, match=f"image {broken}: does not decode"):
        extract(made, made.left(), Pixels(), AUGMENT)


def test_a_trunk_that_has_diverged_is_told(tmp_path: Path) -> None:
    class Diverged(Pixels):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * float("nan")

    made = features_of(tmp_path, labelled(tmp_path, 12)[0])
    with pytest.raises(UserError, match="features are not finite"):
        extract(made, made.left(), Diverged(), AUGMENT)


def test_features_that_a_gpu_has_no_room_for_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24_000_000_000, 25_000_000_000))
    gpu = torch.device("cuda", 0)
    extracting._refuse_too_large("s3://imagenet/train", (1_281_167, 3024), gpu)
    with pytest.raises(UserError, match=r"1,281,167 images, 10,444 numbers each, take 26.8 GB, .* 24.0 GB free"):
        extracting._refuse_too_large("s3://imagenet/train", (1_281_167, 10444), gpu)
    extracting._refuse_too_large("s3://imagenet/train", (1_281_167, 10444), CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_features_that_point_the_same_way(tmp_path: Path) -> None:
    made = {device: features_of(tmp_path / device, labelled(tmp_path / device, 90)[0]) for device in ("cpu", "cuda")}
    torch.manual_seed(0)
    trunk = RegNet(ModelSettings(trunk="regnety_002")).eval()
    for device, one in made.items():
        extract(one, one.left(), trunk.to(device), AUGMENT)
    cpu, gpu = (one.read(CPU)[1].float() for one in made.values())
    alike = torch.cosine_similarity(cpu - cpu.mean(0), gpu - gpu.mean(0))
    assert alike.mean() > 0.99
    assert alike.min() > 0.95
