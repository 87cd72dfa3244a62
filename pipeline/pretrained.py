"""A trunk trained elsewhere, as the beginning of a run: SEER's released weights, timm's, an export of another run.

In: the url of a file, or of a folder with model.safetensors.

    .safetensors          timm's names, as timm, the Hugging Face Hub and `make export` write them
    .torch  .pth  .pt     what torch.save wrote: a checkpoint of VISSL, or the state dict of a trunk alone

Out: the tensors of a trunk, filled. Heads, prototypes and optimizers in the file are left. A pickle is read by torch's
unpickler for weights, which builds tensors and plain values and calls nothing; one that needs more is refused.
Sources of VISSL's names: vissl/models/trunks/regnet.py and regnet_fsdp.py, classy_vision/models/anynet.py.
"""

import contextlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data_shards.errors import UserError
from data_shards.store import NotFound, Store, Truncated, split
from pipeline.regnet import TRUNKS, ModelSettings, RegNet

IN_FOLDER = "model.safetensors"
SAFE = ".safetensors"
SUFFIXES = (".torch", ".pth", ".pt", SAFE)
ACCEPTED = f"a file {', '.join(SUFFIXES)}, or a folder with {IN_FOLDER}, by its url or path"
HEADER_BYTES = 100_000_000  # safetensors allows no longer header
COUNTER = ".num_batches_tracked"  # read by nothing, and left out by some who write weights

Shapes = dict[str, torch.Size]  # of the tensors, by timm's names

# Single numbers of numpy's, as meters leave them beside the weights.
_NUMBERS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)),
    *((multiarray.scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
]

_WHERE_VISSL_KEEPS_IT = ("classy_state_dict", "base_model", "model", "trunk")
_STEM = {"_feature_blocks.conv1.stem.0": "stem.conv", "_feature_blocks.conv1.stem.1": "stem.bn"}
_BLOCK = re.compile(  # of stage s, counted from 1, block b, from 0; FSDP's trunk has its blocks in parts
    r"_feature_blocks\.res\d+\.(?:block\d+-part\d+\.)?block(?P<s>\d+)-(?P<b>\d+)\.(?P<inner>.+)"
)
_IN_BLOCK = {
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
    "f.se.excitation.0": "se.fc1",
    "f.se.excitation.2": "se.fc2",
    "f.c": "conv3.conv",
    "f.final_bn": "conv3.bn",
    "proj": "downsample.conv",
    "bn": "downsample.bn",
}


def is_place(text: str) -> bool:
    """Whether a text is the url or path of a file or folder; the name of a run does not look like one."""
    return "/" in text or text.endswith(SUFFIXES)


def located(text: str) -> str:
    """The url of a file or folder given by its url or path, relative to the working folder. Reads nothing.

    Raises UserError for a url that no store has, and for VISSL's trunks of exchanged channels.
    """
    if text.startswith(("http://", "https://")):
        raise UserError(f"{text}: weights are read from s3://, file:// and paths; download it first: curl -LO {text}")
    if "bgr" in Path(text).name:
        raise UserError(
            f"{text}: by its name its trunk takes blue before red, and images come as red, green, blue here"
        )
    return text.rstrip("/") if "://" in text else f"file://{Path(text).expanduser().absolute()}"


def fill(url: str, state: Mapping[str, Tensor], trunk: str, beside: Path) -> None:
    """Fill a trunk in place; numbers of another type are converted.

    state: its tensors by timm's names, wherever they live; trunk: what the config calls it, for errors; beside: a
    folder with room for the file, should it have to be downloaded.
    Raises UserError, with nothing filled, unless the file has every tensor in its shape, and no other trunk's.
    """
    with _on_disk(url, beside) as file:
        found = _tensors(url, file)
        _refuse_another(url, shapes(found), shapes(state), trunk)
        for name in state.keys() & found.keys():
            state[name].copy_(found[name].detach())


def check(url: str, model: ModelSettings, retry_seconds: float) -> None:
    """Raise UserError where little reading shows that `fill` would: no such file, no such format, another trunk.

    Shapes are in the header of safetensors, and in a pickle that lies on a disk. Of one in a bucket only the first
    bytes are read: they would be all over its gigabytes.
    """
    store, path = _place(url, retry_seconds)
    if path.endswith(SAFE):
        found = _header(url, store, path)
    elif not _get(url, store, path, 0, 2).startswith((b"PK", b"\x80")):  # a zip archive, or as before torch 1.6
        raise _unreadable(url)
    elif (file := _disk(store, path)) is not None:
        with FakeTensorMode():  # torch.load then leaves the numbers where they are
            found = shapes(_unpickled(url, file))
    else:
        return
    _refuse_another(url, found, trunk_shapes(model), model.trunk)


def timm_name(name: str) -> str:
    """The name that timm has for a tensor of VISSL's trunk; any other name as it is."""
    module, _, tensor = name.rpartition(".")
    if module in _STEM:
        return f"{_STEM[module]}.{tensor}"
    block = _BLOCK.fullmatch(module)
    if block is None or block["inner"] not in _IN_BLOCK:
        return name
    return f"s{block['s']}.b{int(block['b']) + 1}.{_IN_BLOCK[block['inner']]}.{tensor}"


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Of named tensors."""
    return {name: tensor.shape for name, tensor in tensors.items()}


@cache
def trunk_shapes(model: ModelSettings) -> Shapes:
    """Of the tensors of a trunk, which takes no memory for it; all that have a name take seconds."""
    with torch.device("meta"):
        return shapes(RegNet(model).state_dict())


def _place(url: str, retry_seconds: float = 60.0) -> tuple[Store, str]:
    """The store, and the path of the file in it."""
    root, path = split(url if url.endswith(SUFFIXES) else f"{url}/{IN_FOLDER}")
    return Store(root, retry_seconds=retry_seconds), path


def _disk(store: Store, path: str) -> Path | None:
    """Where the file lies, if its store is a disk."""
    return Path("/", path) if store.url.startswith("file:") else None


@contextlib.contextmanager
def _on_disk(url: str, beside: Path) -> Iterator[Path]:
    """The file, or a copy of it for the time being."""
    store, path = _place(url)
    if (file := _disk(store, path)) is not None:
        yield file
        return
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        copy = Path(folder) / Path(path).name
        try:
            store.download(path, copy)
        except NotFound as error:
            raise _missing(str(error)) from None
        yield copy


def _get(url: str, store: Store, path: str, start: int, end: int) -> bytes:
    """Bytes of an object that must have them."""
    try:
        return store.get(path, start, end)
    except NotFound as error:
        raise _missing(str(error)) from None
    except Truncated:
        raise _unreadable(url) from None


def _tensors(url: str, file: Path) -> dict[str, Tensor]:
    """By timm's names. They are mapped from the file where its format allows it, and read when they are used."""
    try:
        return load_file(file) if file.suffix == SAFE else _unpickled(url, file)
    except FileNotFoundError:
        raise _missing(f"file://{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{url}: {error.strerror}") from None
    except SafetensorError:
        raise _unreadable(url) from None


def _unpickled(url: str, file: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises is not to be foreseen
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise _unreadable(url) from error
        raise UserError(
            f"{url}: it asks for {code[1]} to be called as it is read, and nothing in a file of weights is; where you "
            f"trust it, write its tensors alone to a {SAFE}"
        ) from None
    return _trunk_in(loaded)


def _trunk_in(loaded: Any) -> dict[str, Tensor]:
    """The trunk's tensors in what torch.save wrote: as deep as VISSL has them, or where that way ends."""
    for key in _WHERE_VISSL_KEEPS_IT:
        if isinstance(loaded, dict) and key in loaded:
            loaded = loaded[key]
    named = loaded.items() if isinstance(loaded, dict) else ()
    return {timm_name(str(name)): tensor for name, tensor in named if isinstance(tensor, Tensor)}


def _header(url: str, store: Store, path: str) -> Shapes:
    """The shapes in a safetensors file: its length, in 8 bytes, and JSON; what follows must be all there."""
    length = int.from_bytes(_get(url, store, path, 0, 8), "little")
    if length > HEADER_BYTES:
        raise _unreadable(url)
    try:
        entries = json.loads(_get(url, store, path, 8, 8 + length))
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {name: torch.Size(entry["shape"]) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise _unreadable(url) from None
    if store.size(path) != end:
        raise _unreadable(url)
    return found


def _missing(said: str) -> UserError:
    return UserError(f"{said}; valid is {ACCEPTED}")


def _unreadable(url: str) -> UserError:
    return UserError(f"{url}: cut off, damaged, or no file of weights; download or write it again")


def _refuse_another(url: str, found: Shapes, wanted: Shapes, trunk: str) -> None:
    """Raise UserError unless the tensors found are those of the trunk that is wanted."""
    missing = [name for name in wanted if name not in found and not name.endswith(COUNTER)]
    unlike = [name for name in wanted if name in found and found[name] != wanted[name]]
    more = [name for name in found if name not in wanted and not name.startswith("head.")]  # timm's classifier
    told = []
    if missing:
        told.append(f"{len(missing)} of its {len(wanted)} tensors missing, the first {missing[0]}")
    if unlike:
        first, theirs, ours = unlike[0], tuple(found[unlike[0]]), tuple(wanted[unlike[0]])
        told.append(f"{len(unlike)} of another shape, the first {first}, {theirs} in the place of {ours}")
    if more:
        told.append(f"{len(more)} not of it, the first {more[0]}")
    if told:
        raise UserError(f"{url}: does not fit model.trunk {trunk}: {'; '.join(told)}{_what_it_is(found)}")


def _what_it_is(found: Shapes) -> str:
    """What an error adds where the tensors are those of a trunk that has a name, or of none at all."""
    if "stem.conv.weight" not in found:
        return "; it holds no RegNet by the names of timm or VISSL"
    known = _to_compare(found)
    fitting = (name for name in TRUNKS if _to_compare(trunk_shapes(ModelSettings(trunk=name))) == known)
    return next((f'; it is a {name} (SET="model.trunk={name}")' for name in fitting), "")


def _to_compare(found: Shapes) -> Shapes:
    return {name: shape for name, shape in found.items() if not name.startswith("head.") and not name.endswith(COUNTER)}
