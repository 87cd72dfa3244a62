"""What is asked about: drawn once, by the training's own decoder, in pixels that a plain decoder confirms."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import AugmentSettings
from pipeline.evaluate import views as views_module
from pipeline.evaluate.baselines import colours
from pipeline.evaluate.tiles import Tiles
from pipeline.evaluate.views import SIZE, Views, render_distorted, render_views
from pipeline.loader import render
from tests.photos import write_tiles

pytestmark = pytest.mark.slow  # starts DALI
AUGMENT = AugmentSettings()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    files = sorted(write_tiles(tmp_path_factory.mktemp("photos"), 12, side=96).glob("*/*.jpg"))
    labels = [path.parent.name if i % 4 else "stamp-birds" for i, path in enumerate(files)]
    return Tiles([path.read_bytes() for path in files], labels, np.full((12, 2), 96))


@pytest.fixture(scope="module")
def views(held_out: Tiles) -> Views:
    return render_views(held_out, held_out, AUGMENT)


def test_a_clean_tile_is_the_picture_itself(held_out: Tiles, views: Views) -> None:
    shown = colours(views.held_out, AUGMENT.mean, AUGMENT.std)
    for image, data in zip(shown, held_out.images, strict=True):
        plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) / 255
        assert np.abs(image.permute(1, 2, 0).numpy() - plain).mean() < 0.01
    assert torch.equal(views.bank, views.held_out)


def test_a_grey_tile_is_the_picture_without_its_colours(held_out: Tiles, views: Views) -> None:
    grey = colours(views.grey, AUGMENT.mean, AUGMENT.std)
    assert (grey.amax(1) - grey.amin(1)).max() < 0.02
    clean = colours(views.held_out[held_out.photographs()], AUGMENT.mean, AUGMENT.std)
    luminance = (clean * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    assert (grey.mean(1) - luminance).abs().mean() < 0.01


def test_distortions_are_the_same_each_time_and_change_every_tile(held_out: Tiles, views: Views) -> None:
    again = render_views(held_out, held_out, AUGMENT)
    assert torch.equal(again.distorted, views.distorted)
    assert views.distorted.shape == (len(held_out.photographs()), 3, SIZE, SIZE)
    moved = (views.distorted - views.held_out[held_out.photographs()]).abs().flatten(1).mean(1)
    assert moved.min() > 0.05


def test_some_distorted_tiles_alone_are_those_of_the_whole_set(held_out: Tiles, views: Views) -> None:
    assert torch.equal(render_distorted(held_out, AUGMENT, np.array([5, 2])), views.distorted[[5, 2]])


def test_parts_of_a_set_give_the_views_of_the_whole(
    held_out: Tiles, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views_module, "PART", 5)
    parted = render_views(held_out, held_out, AUGMENT)
    for name in ("bank", "held_out", "distorted", "grey"):
        assert torch.equal(getattr(parted, name), getattr(views, name)), name
        assert getattr(parted, name).is_contiguous(memory_format=torch.channels_last)


def test_no_more_than_a_part_of_a_set_is_decoded_at_once(held_out: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def watched(images: Sequence[bytes], *rest: Any) -> list[torch.Tensor]:
        decoded.append(len(images))
        return render(images, *rest)

    monkeypatch.setattr(views_module, "render", watched)
    monkeypatch.setattr(views_module, "PART", 5)
    render_distorted(held_out, AUGMENT, np.arange(len(held_out.photographs())))
    assert decoded == [5, 4]
