"""Named tensors to files and back: which rank writes which, the copy in host memory, safetensors on disk.

In: a dict of named tensors; the same names on all ranks where they are replicated or parted, a rank's own elsewhere.
Out: one safetensors file a rank: its own tensors, its parts, and its share of the replicated ones.

torch.distributed.checkpoint reads the tensors back onto any number of ranks. Its own writer of this format is left
aside: 1 GiB took it 9 s and 2 GiB of memory beside the copy, `save_file` 0.6 s and none; and its planner, which sends
the plans of all ranks to rank 0: a minute for 512 of them. Its default format keeps its metadata in a pickle; this one
has JSON at the head of each file. Nothing is ever unpickled.
"""

import heapq
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from pipeline.sharding import first_row, is_parted, part

_PARTS = "DCP_SHARDING_INFO"
_ALIGNED = 64  # bytes
_OWN = "queue."  # what the names in Queue.state begin with


def deal(state: Mapping[str, Tensor], rank: int, world_size: int) -> list[str]:
    """The names that this rank writes: its own, and a share of those that all have, even by bytes.

    Each rank finds out by itself, so what all have must be alike on all of them.
    """
    loads = [(0, other) for other in range(world_size)]
    mine = [name for name in state if _is_of_this_rank(name, state[name]) and part(state[name]).numel()]
    shared = [name for name in state if not _is_of_this_rank(name, state[name])]
    for name in sorted(shared, key=lambda name: (-state[name].nbytes, name)):
        load_bytes, least = heapq.heappop(loads)
        heapq.heappush(loads, (load_bytes + state[name].nbytes, least))
        if least == rank:
            mine.append(name)
    return mine


def is_own(name: str) -> bool:
    """Whether one rank alone has the tensor: a lane's queue."""
    return name.startswith(_OWN)


def _is_of_this_rank(name: str, tensor: Tensor) -> bool:
    return is_own(name) or is_parted(tensor)


def first_rows(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """Of those tensors that are parted among the ranks, where this rank's part begins."""
    return {name: first_row(state[name]) for name in names if is_parted(state[name])}


class HostCopy:
    """Host memory for a rank's share, pinned where there is a GPU and used again by each copy.

    In one piece: torch pins each by itself, and rounds it up to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Contiguous copies of what this rank has of them, complete at the return, overwritten by the next call."""
        parts = {name: part(state[name].detach()) for name in names}
        if _layout(parts) != _layout(self._buffers):
            self._buffers = {}  # before there is memory for others
            self._buffers = _room_for(parts)
        for name, buffer in self._buffers.items():
            buffer.copy_(parts[name], non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return dict(self._buffers)


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _room_for(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors.values()]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    room = zip(tensors.items(), torch.split(memory, sizes), strict=True)
    return {name: piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for (name, tensor), piece in room}


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds an inf or a nan, None when there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def write(tensors: dict[str, Tensor], path: Path, first_rows: Mapping[str, int] | None = None) -> None:
    """One safetensors file, on the disk when this returns. Raises OSError.

    first_rows: of those that are parts of tensors, where in them they begin.
    """
    header = {"format": "pt"}
    if first_rows:  # as torch.distributed.checkpoint has it, and then for each tensor of the file
        begin = {name: [first_rows.get(name, 0), 0, 0, 0][: tensor.dim()] for name, tensor in tensors.items()}
        header[_PARTS] = json.dumps({name: {"saved_offsets": place} for name, place in begin.items()})
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class Saved:
    """The tensors in the safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        self._metadata = self._reader.read_metadata().state_dict_metadata

    @property
    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self._metadata)

    def mismatch(self, state: Mapping[str, Tensor]) -> str | None:
        """Why the state cannot be filled from here, naming the first tensor that does not fit; None when it can."""
        for name, tensor in state.items():
            saved = self._metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                return f"it has no tensor {name}, which this run needs"
            if saved.size != tensor.shape:
                return f"its {name} has the shape {tuple(saved.size)}, this run's has {tuple(tensor.shape)}"
            if saved.properties.dtype != tensor.dtype:
                return f"its {name} is {saved.properties.dtype}, this run's is {tensor.dtype}"
        return None

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Fill the given tensors in place, wherever they live; they must match."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(state), storage_reader=self._reader, planner=planner, no_dist=True)
