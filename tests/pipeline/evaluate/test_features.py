"""Batch-norm statistics are measured anew; the trunk that was handed in stays as it is."""

import torch
from torch import Tensor, nn

from pipeline.evaluate.features import features, with_statistics_of


class TinyTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu().mean((2, 3))


def made() -> tuple[TinyTrunk, Tensor]:
    torch.manual_seed(0)
    return TinyTrunk(), torch.randn(60, 3, 10, 10) * 3 + 1


def test_statistics_are_the_mean_over_batches_that_mix_the_whole_bank() -> None:
    trunk, images = made()
    bn = with_statistics_of(trunk, images, batch=20).bn
    batches = [trunk.conv(images[first::3]).double() for first in range(3)]
    means = torch.stack([b.mean((0, 2, 3)) for b in batches])
    variances = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches])
    assert torch.allclose(bn.running_mean.double(), means.mean(0), atol=1e-5)
    assert torch.allclose(bn.running_var.double(), variances.mean(0), rtol=1e-5)


def test_what_the_running_statistics_were_before_makes_no_difference() -> None:
    trunk, images = made()
    before = features(with_statistics_of(trunk, images), images)
    trunk.bn.running_mean.fill_(50.0)
    trunk.bn.running_var.fill_(1e-3)
    assert torch.equal(features(with_statistics_of(trunk, images), images), before)


def test_the_trunk_itself_is_left_alone() -> None:
    trunk, images = made()
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    with_statistics_of(trunk, images)
    assert trunk.training
    assert trunk.bn.momentum == 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    trunk, images = made()
    measured = with_statistics_of(trunk, images)
    assert torch.allclose(features(measured, images, batch=7), features(measured, images, batch=60), atol=1e-6)
    assert features(measured, images).shape == (60, 4)
