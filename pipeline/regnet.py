"""RegNetY, from four numbers: images in, pooled features out.

Parameters and buffers bear timm's names, so that a trunk from here loads into `timm.create_model("regnety_...",
num_classes=0)` and back. Normalisation is plain `nn.BatchNorm2d`; pipeline.batchnorm puts groups of lanes in its place.
Sources: Designing Network Design Spaces (arXiv 2003.13678), SEER (arXiv 2103.01988 and 2202.08360).
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data_shards.section import Section


@dataclass(frozen=True)
class Stage:
    """Blocks of one resolution: how many, their channels, and the channels of a group in their 3x3 convolution."""

    depth: int
    width: int
    group_width: int


@dataclass(frozen=True)
class TrunkShape:
    """A RegNetY by its numbers: block j is w_0 + w_a j channels wide, rounded to a power of w_m times w_0."""

    w_0: int
    w_a: float
    w_m: float
    depth: int
    group_width: int
    stem_width: int = 32
    se_ratio: float = 0.25

    def stages(self) -> list[Stage]:
        """The stages in order of width; Python's round (half to even) is the rounding of the published trunks."""
        slope = (self.w_0 + self.w_a * block for block in range(self.depth))
        powers = (round(math.log(width / self.w_0) / math.log(self.w_m)) for width in slope)
        depths = Counter(round(self.w_0 * self.w_m**power / 8) * 8 for power in powers)
        return [_divisible(Stage(depth, width, self.group_width)) for width, depth in sorted(depths.items())]


def _divisible(stage: Stage) -> Stage:
    """The same stage with a width that its groups divide (how RegNetY-256GF gets 746 channels from 640)."""
    group = min(stage.group_width, stage.width)
    return Stage(stage.depth, round(stage.width / group) * group, group)


TRUNKS: dict[str, TrunkShape] = {
    "regnety_002": TrunkShape(24, 36.44, 2.49, 13, 8),
    "regnety_004": TrunkShape(48, 27.89, 2.09, 16, 8),
    "regnety_006": TrunkShape(48, 32.54, 2.32, 15, 16),
    "regnety_008": TrunkShape(56, 38.84, 2.4, 14, 16),
    "regnety_016": TrunkShape(48, 20.71, 2.65, 27, 24),
    "regnety_032": TrunkShape(80, 42.63, 2.66, 21, 24),
    "regnety_040": TrunkShape(96, 31.41, 2.24, 22, 64),
    "regnety_064": TrunkShape(112, 33.22, 2.27, 25, 72),
    "regnety_080": TrunkShape(192, 76.82, 2.19, 17, 56),
    "regnety_120": TrunkShape(168, 73.36, 2.37, 19, 112),
    "regnety_160": TrunkShape(200, 106.23, 2.48, 18, 112),
    "regnety_320": TrunkShape(232, 115.89, 2.53, 20, 232),
    "regnety_640": TrunkShape(352, 147.48, 2.4, 20, 328),
    "regnety_1280": TrunkShape(456, 160.83, 2.52, 27, 264),
    "regnety_2560": TrunkShape(640, 230.83, 2.53, 27, 373),  # SEER's 256GF, 1.3 billion parameters
    "regnety_10b": TrunkShape(1744, 620.83, 2.52, 27, 1010),  # SEER's 10 billion
}


class ModelSettings(Section):
    """Which trunk, and over which lanes its batch norms see."""

    trunk: str = "regnety_016"  # regnety_002 to regnety_2560, regnety_10b, or custom, which the five numbers make
    w_0: PositiveInt | None = Field(None, multiple_of=8)
    w_a: NonNegativeFloat | None = None
    w_m: float | None = Field(None, gt=1)
    depth: PositiveInt | None = None
    group_width: PositiveInt | None = None
    stem_width: PositiveInt = 32
    se_ratio: PositiveFloat = 0.25  # squeezed channels, as a share of the width that enters the block
    zero_init_last: bool = False  # start each block's last batch norm at zero, so that blocks begin as their shortcut
    batch_norm_lanes: PositiveInt | None = None  # lanes that share batch-norm statistics; None: all of them

    @field_validator("trunk")
    @classmethod
    def _known(cls, trunk: str) -> str:
        if trunk != "custom" and trunk not in TRUNKS:
            raise ValueError(
                f"no trunk {trunk!r}; there are {', '.join(TRUNKS)}, and custom with w_0, w_a, w_m, depth, group_width"
            )
        return trunk

    @model_validator(mode="after")
    def _numbers_fit_the_name(self) -> Self:
        numbers = {name: getattr(self, name) for name in ("w_0", "w_a", "w_m", "depth", "group_width")}
        missing = [name for name, number in numbers.items() if number is None]
        given = [name for name, number in numbers.items() if number is not None]
        if self.trunk == "custom" and missing:
            raise ValueError(f"trunk custom needs {', '.join(missing)} too; its widths follow from all five numbers")
        if self.trunk != "custom" and given:
            raise ValueError(f"{self.trunk} has numbers of its own; leave out {', '.join(given)}, or say trunk: custom")
        if self.trunk != "custom" and (self.stem_width, self.se_ratio) != (32, 0.25):
            raise ValueError(f"{self.trunk} has stem_width 32 and se_ratio 0.25; for others say trunk: custom")
        return self

    def shape(self) -> TrunkShape:
        """The numbers that the name stands for, or those given."""
        if self.trunk != "custom":
            return TRUNKS[self.trunk]
        return TrunkShape(**{name: getattr(self, name) for name in asdict(TRUNKS["regnety_016"])})


class RegNet(nn.Module):
    """A trunk. Attributes: `width`, the channels of its features; `stages`, what it was built from.

    activation_checkpointing: backward computes each block again from what entered it, as SEER did: another forward's
    time for less memory, and the same gradients to the bit.
    """

    def __init__(self, settings: ModelSettings, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        shape = settings.shape()
        self.stages = shape.stages()
        self.width = self.stages[-1].width
        self.stem = ConvNorm(3, shape.stem_width, kernel=3, stride=2)
        entering = shape.stem_width
        for number, stage in enumerate(self.stages, start=1):
            self.add_module(f"s{number}", _blocks(entering, stage, shape.se_ratio))
            entering = stage.width
        _initialise(self, settings.zero_init_last)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W), any size; channels_last is faster. Returns (N, width), the mean over all places."""
        features = functional.relu(self.stem(images), inplace=True)
        for block in self.blocks():
            features = self._through(block, features)
        return features.mean((2, 3))

    def blocks(self) -> Iterator[nn.Module]:
        """In the order of the way through them."""
        for number in range(1, len(self.stages) + 1):
            yield from self.get_submodule(f"s{number}").children()

    def _through(self, block: nn.Module, features: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # it draws no random numbers whose state would have to be put back
            left: Tensor = checkpoint(block, features, use_reentrant=False, preserve_rng_state=False)
        else:
            left = block(features)
        return left


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm. (N, C, H, W) -> (N, width, H / stride, W / stride)."""

    def __init__(self, entering: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(entering, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.bn(self.conv(x))
        return normalised


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate between 0 and 1 that sees the means of all channels."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.fc2(functional.relu(self.fc1(x.mean((2, 3), keepdim=True)), inplace=True))
        return x * gate.sigmoid()


class Block(nn.Module):
    """1x1, grouped 3x3, squeeze and excitation, 1x1, plus a shortcut; a bottleneck that does not narrow."""

    def __init__(self, entering: int, stage: Stage, stride: int, se_ratio: float) -> None:
        super().__init__()
        width = stage.width
        self.conv1 = ConvNorm(entering, width)
        self.conv2 = ConvNorm(width, width, kernel=3, stride=stride, groups=width // stage.group_width)
        self.se = SqueezeExcite(width, max(1, round(entering * se_ratio)))
        self.conv3 = ConvNorm(width, width)
        same = stride == 1 and entering == width
        self.downsample: nn.Module = nn.Identity() if same else ConvNorm(entering, width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.conv1(x), inplace=True)
        inner = self.se(functional.relu(self.conv2(inner), inplace=True))
        inner = self.conv3(inner) + self.downsample(x)
        return functional.relu(inner, inplace=True)


def _blocks(entering: int, stage: Stage, se_ratio: float) -> nn.Sequential:
    """The blocks b1, b2, ... of a stage; the first halves the resolution."""
    blocks = nn.Sequential()
    for number in range(1, stage.depth + 1):
        first = number == 1
        block = Block(entering if first else stage.width, stage, 2 if first else 1, se_ratio)
        blocks.add_module(f"b{number}", block)
    return blocks


@torch.no_grad()
def _initialise(trunk: nn.Module, zero_init_last: bool) -> None:
    """He's normal rule over what leaves a group of a convolution, as timm's; batch norm starts as the identity."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            leaving = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / leaving))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif zero_init_last and isinstance(module, Block):
            nn.init.zeros_(module.get_parameter("conv3.bn.weight"))
