"""Trunks from files made elsewhere, against a network that is built and named as VISSL's."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_shards.errors import UserError
from data_shards.store import Store
from pipeline import pretrained
from pipeline.pretrained import check, fill, is_place, located, timm_name
from pipeline.regnet import ModelSettings, RegNet
from tests.pipeline.test_export import a_run, export_run
from tests.pipeline.test_regnet import import_timm

TINY = ModelSettings(trunk="custom", w_0=16, w_a=16, w_m=2.0, depth=8, group_width=8, stem_width=16)
SMALL = ModelSettings(trunk="regnety_002")


def normed(entering: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(entering, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Excitation(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        layers = (nn.Conv2d(width, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, width, 1), nn.Sigmoid())
        self.excitation = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excitation(x.mean((2, 3), keepdim=True))


class TheirBlock(nn.Module):
    def __init__(self, entering: int, width: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.f = nn.Sequential()
        self.f.add_module("a", normed(entering, width))
        self.f.add_module("b", normed(width, width, 3, stride, width // group_width))
        self.f.add_module("se", Excitation(width, round(entering / 4)))
        self.f.add_module("c", nn.Conv2d(width, width, 1, bias=False))
        self.f.add_module("final_bn", nn.BatchNorm2d(width))
        self.projected = stride != 1 or entering != width
        if self.projected:
            self.proj, self.bn = nn.Conv2d(entering, width, 1, stride, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.bn(self.proj(x)) if self.projected else x
        return torch.relu(shortcut + self.f(x))


class TheirTrunk(nn.Module):
    """A RegNetY as VISSL builds and names it; parts: as its FSDP variant does."""

    def __init__(self, model: ModelSettings, parts: bool = False) -> None:
        super().__init__()
        entering = model.shape().stem_width
        stem = nn.Sequential()
        stem.add_module("stem", normed(3, entering, 3, 2))
        self._feature_blocks = nn.ModuleDict({"conv1": stem})
        for number, stage in enumerate(model.shape().stages(), start=1):
            blocks = nn.Sequential()
            for index in range(stage.depth):
                block = TheirBlock(entering, stage.width, 1 if index else 2, stage.group_width)
                blocks.add_module(f"block{number}-{index}", block)
                entering = stage.width
            if parts:
                whole, blocks = blocks, nn.Sequential()
                blocks.add_module(f"block{number}-part0", whole)
            self._feature_blocks[f"res{number + 1}"] = blocks

    def forward(self, images: Tensor) -> Tensor:
        for blocks in self._feature_blocks.values():
            images = blocks(images)
        return images.mean((2, 3))


def their_trunk(model: ModelSettings = TINY, parts: bool = False) -> TheirTrunk:
    """With running statistics, and affine parameters of its norms, that are not those of a new one."""
    torch.manual_seed(3)
    trunk = TheirTrunk(model, parts)
    for norm in trunk.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.bias.data):
                tensor.normal_(0.0, 0.1)
            for tensor in (norm.running_var, norm.weight.data):
                tensor.uniform_(0.5, 1.5)
            norm.num_batches_tracked.fill_(7)
    return trunk.eval()


def released(trunk: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint as VISSL saves it, as far as it concerns us."""
    heads = {"0.prototypes0.weight": torch.ones(3, 4)}
    base = {"model": {"trunk": trunk, "heads": heads}, "meta": {"trunk": {}, "heads": {}}}
    return {"phase_idx": 0, "iteration": 9, "classy_state_dict": {"base_model": base, "losses": [1.5], "optimizer": {}}}


def file_of(folder: Path, content: Any, name: str = "seer.torch", **how: Any) -> str:
    torch.save(content, folder / name, **how)
    return f"file://{folder}/{name}"


def started(url: str, model: ModelSettings = TINY, beside: Path | None = None) -> RegNet:
    """A trunk that begins with what is there."""
    check(url, model, retry_seconds=1)
    trunk = RegNet(model)
    fill(url, trunk.state_dict(), model.trunk, beside or Path("/nonexistent"))
    return trunk.eval()


def assert_same_features(ours: nn.Module, theirs: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64)
    expected = theirs(images)
    assert (expected > 0.01).float().mean() > 0.5, "features of zeros would be equal whatever is loaded"
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [TINY, SMALL], ids=lambda model: model.trunk)
@pytest.mark.parametrize("parts", [False, True], ids=["DDP", "FSDP"])
def test_a_trunk_from_vissls_checkpoint_gives_its_features(model: ModelSettings, parts: bool, tmp_path: Path) -> None:
    theirs = their_trunk(model, parts)
    assert_same_features(started(file_of(tmp_path, released(theirs.state_dict())), model), theirs)


def test_the_state_dict_of_a_trunk_alone_is_enough_and_need_not_count_batches(tmp_path: Path) -> None:
    theirs = their_trunk()
    uncounted = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("batches_tracked")}
    ours = started(file_of(tmp_path, uncounted, "trunk.pth"))
    assert_same_features(ours, theirs)
    assert int(ours.stem.bn.num_batches_tracked) == 0
    ours = started(file_of(tmp_path, theirs.state_dict(), "trunk.pt"))
    assert int(ours.stem.bn.num_batches_tracked) == 7


def test_a_file_from_before_torch_1_6_is_read_too(tmp_path: Path) -> None:
    theirs = their_trunk()
    url = file_of(tmp_path, released(theirs.state_dict()), _use_new_zipfile_serialization=False)
    assert_same_features(started(url), theirs)


def test_numbers_of_half_precision_are_converted(tmp_path: Path) -> None:
    theirs = their_trunk()
    ours = started(file_of(tmp_path, released(theirs.half().state_dict())))
    assert ours.stem.conv.weight.dtype == torch.float32
    assert_same_features(ours, theirs.float())


def test_a_file_in_a_store_is_downloaded_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    theirs, url = their_trunk(), "memory://models/seer.torch"
    file_of(tmp_path, released(theirs.state_dict()))
    Store("memory://models").upload(tmp_path / "seer.torch", "seer.torch")
    beside = tmp_path / "beside"
    beside.mkdir()
    assert_same_features(started(url, beside=beside), theirs)
    assert list(beside.iterdir()) == []


def test_a_run_begins_with_the_export_of_another(tmp_path: Path) -> None:
    store, trunks = a_run(tmp_path, 3)
    export_run(store, Store(f"file://{tmp_path}/to"))
    assert_same_features(started(located(f"{tmp_path}/to")), trunks[3].eval())
    assert_same_features(started(f"file://{tmp_path}/to/model.safetensors"), trunks[3])


def safetensors(folder: Path, more: dict[str, Tensor], model: ModelSettings = TINY) -> tuple[str, RegNet]:
    """A file by timm's names, and the trunk that is in it."""
    trunk = RegNet(model)
    save_file({**trunk.state_dict(), **more}, folder / "timm.safetensors")
    return f"file://{folder}/timm.safetensors", trunk.eval()


def test_timms_classifier_is_left(tmp_path: Path) -> None:
    url, trunk = safetensors(tmp_path, {"head.fc.weight": torch.ones(2, 16), "head.fc.bias": torch.ones(2)})
    assert_same_features(started(url), trunk)


def refusal(url: str, model: ModelSettings = TINY, asked: bool = True) -> str:
    """The line with which it is refused, by `check` too (asked) or only when it is read; and nothing is filled."""
    trunk = RegNet(model)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    with pytest.raises(UserError) as refused:
        fill(url, trunk.state_dict(), model.trunk, Path("/nonexistent"))
    if asked:
        with pytest.raises(UserError, match=re.escape(str(refused.value))):
            check(url, model, retry_seconds=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.slow
def test_the_file_of_another_trunk_says_which_it_is(tmp_path: Path) -> None:
    url = file_of(tmp_path, released(their_trunk(ModelSettings(trunk="regnety_004")).state_dict()))
    said = refusal(url, SMALL)
    assert said.startswith(f"{url}: does not fit model.trunk regnety_002: ")
    assert "the first stem.conv.weight" not in said  # which all trunks have alike
    assert re.search(r"\d+ of another shape, the first s1\.b1\.conv1\.conv\.weight, \(48, 32, 1, 1\) in the ", said)
    assert re.search(r"\d+ not of it, the first s2\.b2\.", said)
    assert said.endswith('; it is a regnety_004 (SET="model.trunk=regnety_004")')
    url, _ = safetensors(tmp_path, {"head.fc.bias": torch.ones(2)}, SMALL)
    assert refusal(url).endswith('; it is a regnety_002 (SET="model.trunk=regnety_002")')
    assert "it is a" not in refusal(file_of(tmp_path, their_trunk().state_dict()), SMALL)  # a trunk without a name


@pytest.mark.slow
def test_a_file_that_lacks_tensors_says_how_many_and_which_is_the_first(tmp_path: Path) -> None:
    trunk = their_trunk().state_dict()
    del trunk["_feature_blocks.res2.block1-0.f.c.weight"], trunk["_feature_blocks.res2.block1-0.bn.running_mean"]
    said = refusal(file_of(tmp_path, released(trunk)))
    lacks = f"2 of its {len(trunk) + 2} tensors missing, the first s1.b1.conv3.conv.weight"
    assert said.endswith(f"seer.torch: does not fit model.trunk custom: {lacks}")


@pytest.mark.slow
def test_a_file_with_other_blocks_than_the_trunk_is_not_taken_for_its_beginning(tmp_path: Path) -> None:
    url, _ = safetensors(tmp_path, {"s1.b9.conv1.conv.weight": torch.ones(1)})
    assert refusal(url).endswith("does not fit model.trunk custom: 1 not of it, the first s1.b9.conv1.conv.weight")


@pytest.mark.parametrize("content", [{"fc.weight": torch.ones(2)}, [1, 2], {}], ids=str)
def test_a_file_without_a_regnet_says_so(content: Any, tmp_path: Path) -> None:
    assert refusal(file_of(tmp_path, content)).endswith("; it holds no RegNet by the names of timm or VISSL")


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_single_numbers_of_numpy_beside_the_weights_are_no_hindrance(module: bytes, tmp_path: Path) -> None:
    """As numpy 2 names what makes them, and as numpy 1 did."""
    theirs = their_trunk()
    meters = {"top_1": np.float64(1.5), "samples": np.int64(3), "done": np.bool_(True), "loss": np.float32(0.5)}
    url = file_of(tmp_path, released(theirs.state_dict()) | {"meters": meters}, _use_new_zipfile_serialization=False)
    file = tmp_path / "seer.torch"
    assert b"numpy._core.multiarray\nscalar" in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", module))
    assert_same_features(started(url), theirs)


class Bomb:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(zipped: bool, tmp_path: Path) -> None:
    content = released(their_trunk().state_dict()) | {"config": Bomb(tmp_path / "called")}
    said = refusal(file_of(tmp_path, content, _use_new_zipfile_serialization=zipped))
    assert re.search(r"it asks for (posix|os)\.mkdir to be called .* write its tensors alone to a \.safetensors$", said)
    assert not (tmp_path / "called").exists()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def page(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>" * 100)


@pytest.mark.parametrize("damage", [cut, empty, page])
@pytest.mark.parametrize("kind", ["zip", "before 1.6", "safetensors"])
def test_what_is_cut_off_or_something_else_is_told_in_a_line(
    damage: Callable[[Path], None], kind: str, tmp_path: Path
) -> None:
    if kind == "safetensors":
        url, _ = safetensors(tmp_path, {})
    else:
        trunk = their_trunk().state_dict()
        url = file_of(tmp_path, trunk, _use_new_zipfile_serialization=kind == "zip")
    damage(Path(url.removeprefix("file://")))
    asked = (damage, kind) != (cut, "before 1.6")  # whose numbers lie behind the shapes
    assert refusal(url, asked=asked) == f"{url}: cut off, damaged, or no file of weights; download or write it again"


@pytest.mark.parametrize("name", ["gone.torch", "gone.safetensors", "gone"])
def test_a_file_that_is_not_there_says_what_could_be(name: str, tmp_path: Path) -> None:
    said = refusal(f"file://{tmp_path}/{name}")
    assert said.startswith(f"file://{tmp_path}/{name}")
    assert "no such file; valid is a file .torch, .pth, .pt, .safetensors, or a folder with model.safetensors" in said


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "folder.torch").mkdir()
    assert "directory" in refusal(f"file://{tmp_path}/folder.torch").lower()


def test_asking_reads_headers_and_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Store] = []

    class Noted(Store):
        def __init__(self, url: str, **options: Any) -> None:
            super().__init__(url, **options)
            opened.append(self)

    monkeypatch.setattr(pretrained, "Store", Noted)
    file_of(tmp_path, released(their_trunk(SMALL).state_dict()))
    safetensors(tmp_path, {}, SMALL)
    for name, most in (("seer.torch", 2), ("timm.safetensors", 60_000)):
        Store("memory://asked").upload(tmp_path / name, name)
        assert (tmp_path / name).stat().st_size > 10_000_000
        check(f"memory://asked/{name}", SMALL, retry_seconds=1)
        assert 0 < opened[-1].counters.bytes_read <= most
    with pytest.raises(UserError, match=r'memory://asked/timm.safetensors: .* it is a regnety_002 \(SET="model'):
        check("memory://asked/timm.safetensors", TINY, retry_seconds=1)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert "cut off, damaged" in refusal(f"file://{file}")


@pytest.mark.parametrize("entries", [[], {"a": 3}, {"a": {"shape": [1]}}, {"a": {"data_offsets": []}}], ids=str)
def test_a_header_of_another_form_is_told_in_a_line(entries: Any, tmp_path: Path) -> None:
    file, header = tmp_path / "x.safetensors", json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "cut off, damaged" in refusal(f"file://{file}")


def test_files_are_named_by_urls_and_paths_and_runs_by_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(is_place(text) for text in ("seer.torch", "a/b", "s3://models/seer", "/x.pt", "w.safetensors"))
    assert not any(is_place(text) for text in ("old", "old@20000", "v1.2"))
    assert located("seer.torch") == f"file://{tmp_path}/seer.torch"
    assert located("/data/export/") == "file:///data/export"
    assert located("s3://models/export/") == "s3://models/export"
    with pytest.raises(UserError, match=r"^https://a/b\.torch: .* download it first: curl -LO https://a/b\.torch$"):
        located("https://a/b.torch")
    with pytest.raises(UserError, match=r"RegNetY64_bgr\.torch: by its name its trunk takes blue before red"):
        located("s3://models/RegNetY64_bgr.torch")


def test_other_names_stay_as_they_are() -> None:
    for name in ("stem.conv.weight", "head.fc.bias", "_feature_blocks.res2.block1-0.f.d.weight", "weight"):
        assert timm_name(name) == name


@pytest.mark.slow
def test_timms_own_converter_gives_the_same_names(tmp_path: Path) -> None:
    timm = import_timm()
    theirs = their_trunk(SMALL)
    converted = timm.models.regnet._filter_fn(released(theirs.state_dict()))
    assert set(converted) - {"0.prototypes0.weight"} == {timm_name(name) for name in theirs.state_dict()}
    assert all(torch.equal(converted[timm_name(name)], tensor) for name, tensor in theirs.state_dict().items())
    twin = timm.create_model("regnety_002", num_classes=0).eval()
    twin.load_state_dict({name: tensor for name, tensor in converted.items() if not name.startswith("0.")}, strict=True)
    assert_same_features(started(file_of(tmp_path, released(theirs.state_dict())), SMALL), twin)
