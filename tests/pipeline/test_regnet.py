"""The trunks against the published table, timm's names and timm itself."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.regnet import TRUNKS, Block, ModelSettings, RegNet

# name: depths, widths, millions of parameters
PUBLISHED = {
    "regnety_002": ((1, 1, 4, 7), (24, 56, 152, 368), 2.79),
    "regnety_004": ((1, 3, 6, 6), (48, 104, 208, 440), 3.90),
    "regnety_006": ((1, 3, 7, 4), (48, 112, 256, 608), 5.45),
    "regnety_008": ((1, 3, 8, 2), (64, 128, 320, 768), 5.49),
    "regnety_016": ((2, 6, 17, 2), (48, 120, 336, 888), 10.31),
    "regnety_032": ((2, 5, 13, 1), (72, 216, 576, 1512), 17.92),
    "regnety_040": ((2, 6, 12, 2), (128, 192, 512, 1088), 19.56),
    "regnety_064": ((2, 7, 14, 2), (144, 288, 576, 1296), 29.29),
    "regnety_080": ((2, 4, 10, 1), (168, 448, 896, 2016), 37.16),
    "regnety_120": ((2, 5, 11, 1), (224, 448, 896, 2240), 49.58),
    "regnety_160": ((2, 4, 11, 1), (224, 448, 1232, 3024), 80.57),
    "regnety_320": ((2, 5, 12, 1), (232, 696, 1392, 3712), 141.33),
    "regnety_640": ((2, 5, 12, 1), (328, 984, 1968, 4920), 276.46),
    "regnety_1280": ((2, 7, 17, 1), (528, 1056, 2904, 7392), 637.42),
    "regnety_2560": ((2, 7, 17, 1), (746, 1492, 4103, 10444), 1272.16),
    "regnety_10b": ((2, 7, 17, 1), (2020, 4040, 11110, 28280), 9323.93),
}
# the first and last blocks of regnety_002 as timm names and shapes them; num_batches_tracked left out
NAMES_OF_002 = {
    "stem.conv.weight": (32, 3, 3, 3),
    "stem.bn.weight": (32,),
    "stem.bn.bias": (32,),
    "stem.bn.running_mean": (32,),
    "stem.bn.running_var": (32,),
    "s1.b1.conv1.conv.weight": (24, 32, 1, 1),
    "s1.b1.conv1.bn.weight": (24,),
    "s1.b1.conv2.conv.weight": (24, 8, 3, 3),
    "s1.b1.conv2.bn.bias": (24,),
    "s1.b1.se.fc1.weight": (8, 24, 1, 1),
    "s1.b1.se.fc1.bias": (8,),
    "s1.b1.se.fc2.weight": (24, 8, 1, 1),
    "s1.b1.se.fc2.bias": (24,),
    "s1.b1.conv3.conv.weight": (24, 24, 1, 1),
    "s1.b1.conv3.bn.running_var": (24,),
    "s1.b1.downsample.conv.weight": (24, 32, 1, 1),
    "s1.b1.downsample.bn.weight": (24,),
    "s2.b1.se.fc1.weight": (6, 56, 1, 1),
    "s3.b1.conv2.conv.weight": (152, 8, 3, 3),
    "s3.b1.se.fc1.weight": (14, 152, 1, 1),
    "s3.b2.se.fc1.weight": (38, 152, 1, 1),
    "s4.b1.downsample.conv.weight": (368, 152, 1, 1),
    "s4.b7.se.fc1.weight": (92, 368, 1, 1),
    "s4.b7.conv3.bn.running_mean": (368,),
}
PLACEHOLDERS: list[torch.library.Library] = []  # they live as long as the tests
TINY = {"trunk": "custom", "w_0": 16, "w_a": 16.0, "w_m": 2.0, "depth": 2, "group_width": 8}


@pytest.mark.parametrize("name", TRUNKS)
def test_every_trunk_has_the_published_depths_widths_and_parameters(name: str) -> None:
    depths, widths, millions = PUBLISHED[name]
    with torch.device("meta"):
        trunk = RegNet(ModelSettings(trunk=name))
    assert tuple(stage.depth for stage in trunk.stages) == depths
    assert tuple(stage.width for stage in trunk.stages) == widths
    assert sum(parameter.numel() for parameter in trunk.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_parameters_and_buffers_of_regnety_002_bear_timms_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in RegNet(ModelSettings(trunk="regnety_002")).state_dict().items()
        }
    assert len(shapes) == 316
    assert NAMES_OF_002.items() <= shapes.items()
    block = r"(conv[123]\.|downsample\.)(conv\.weight|bn\.(weight|bias|running_mean|running_var|num_batches_tracked))"
    legal = re.compile(rf"(stem\.|s[1-4]\.b\d+\.)(({block})|se\.fc[12]\.(weight|bias)|conv\.weight|bn\.\w+)")
    assert [name for name in shapes if not legal.fullmatch(name)] == []
    assert {name for name in shapes if "downsample" in name and ".b1." not in name} == set()


def test_features_have_one_row_an_image_whatever_the_size_and_layout() -> None:
    trunk = RegNet(ModelSettings(**TINY)).eval()
    images = torch.rand(3, 3, 40, 33, generator=torch.Generator().manual_seed(1))
    features = trunk(images)
    assert features.shape == (3, trunk.width) == (3, 32)
    torch.testing.assert_close(trunk(images.to(memory_format=torch.channels_last)), features)


def test_weights_start_by_hes_rule_over_what_leaves_a_convolution() -> None:
    torch.manual_seed(3)
    trunk = RegNet(ModelSettings(trunk="regnety_004"))
    grouped = trunk.get_parameter("s4.b2.conv2.conv.weight")  # 440 channels in 55 groups: 9 x 8 leave
    assert grouped.std().item() == pytest.approx((2 / (9 * 8)) ** 0.5, rel=0.03)
    pointwise = trunk.get_parameter("s4.b2.conv1.conv.weight")
    assert pointwise.std().item() == pytest.approx((2 / 440) ** 0.5, rel=0.03)


@pytest.mark.parametrize("zero", [False, True])
def test_the_last_batch_norms_of_blocks_start_at_zero_only_when_asked(zero: bool) -> None:
    trunk = RegNet(ModelSettings(**TINY, zero_init_last=zero))
    last = [block.conv3.bn.weight for block in trunk.modules() if isinstance(block, Block)]
    assert len(last) == 2
    assert all(bool((weight == 0).all()) == zero for weight in last)
    others = [
        m.weight for m in trunk.modules() if isinstance(m, nn.BatchNorm2d) and all(m.weight is not w for w in last)
    ]
    assert all(bool((weight == 1).all()) for weight in others)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"trunk": "regnety_017"}, "there are regnety_002, regnety_004"),
        ({"trunk": "custom", "w_0": 24, "depth": 3}, "needs w_a, w_m, group_width"),
        ({"trunk": "regnety_016", "w_a": 3.0}, "leave out w_a"),
        ({"trunk": "regnety_016", "stem_width": 16}, "say trunk: custom"),
        ({**TINY, "w_0": 12}, "multiple of 8"),
        ({**TINY, "w_m": 1.0}, "greater than 1"),
    ],
)
def test_a_mistake_in_the_settings_is_answered_with_what_is_right(mistake: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        ModelSettings.model_validate(mistake)


def import_timm() -> ModuleType:
    """timm; it imports torchvision, which may have been built for another torch and lack its operators."""
    found = importlib.util.find_spec("torchvision")
    if found is None or importlib.util.find_spec("timm") is None:
        pytest.skip("timm and torchvision are not installed (they serve this comparison only)")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        (folder,) = found.submodule_search_locations or [""]
        wanted = (Path(folder) / "_meta_registrations.py").read_text()
        for operator in set(re.findall(r'register_\w+\("(?:torchvision::)?(\w+)"', wanted)):
            PLACEHOLDERS.append(torch.library.Library("torchvision", "FRAGMENT"))
            PLACEHOLDERS[-1].define(f"{operator}(Tensor x) -> Tensor")
    return pytest.importorskip("timm", exc_type=ImportError)


@pytest.mark.slow
def test_timm_with_the_same_weights_gives_the_same_features() -> None:
    timm = import_timm()
    torch.manual_seed(5)
    trunk = RegNet(ModelSettings(trunk="regnety_002")).eval()
    twin = timm.create_model("regnety_002", num_classes=0).eval()
    twin.load_state_dict(trunk.state_dict(), strict=True)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(twin(images), trunk(images), rtol=1e-6, atol=1e-6)
    trunk.load_state_dict(twin.state_dict(), strict=True)
