"""The ranks of a run, and how they come to one mind: small JSON values over a gloo group. Nothing is pickled."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_shards.errors import UserError, may_pass
from data_shards.index import ShardSet
from data_shards.removed import Removed, read_removed
from data_shards.store import Unavailable

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`group` is used by one thread only; at world size 1 there need not be any."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None

    def exchange(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order. Two collectives."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        if self.world_size == 1:
            return [_decode(data)]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))), group=self.group)
        return [_decode(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives (JSON) on each rank.

        When it raises on one, all raise: that rank its own error, the others a UserError that names it, or Unavailable.
        """
        own: Exception | None = None
        value = None
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - raised again below, when the others know
            own = error
        answers = self.exchange([value, None if own is None else _told(own)])
        if own is not None:
            raise own
        for rank, (_, failed) in enumerate(answers):
            if failed is not None:
                raise _elsewhere(rank, *failed)
        return [value for value, _ in answers]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives (JSON) on rank 0, which alone does it, on all ranks. When it raises there, all raise."""
        answers: list[Any] = self.together(lambda: work() if self.rank == 0 else None)
        answer: T = answers[0]
        return answer

    def from_first(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers (n,) of rank 0, on all ranks. Two collectives."""
        if self.world_size == 1:
            return values
        size = torch.tensor([len(values)])
        dist.broadcast(size, 0, group=self.group)
        numbers = torch.from_numpy(values) if self.rank == 0 else torch.empty(int(size), dtype=torch.int64)
        dist.broadcast(numbers, 0, group=self.group)
        return numbers.numpy()


def same_removed(shards: ShardSet, ranks: Ranks) -> Removed:
    """The removed samples as rank 0 reads their lists, so that all replace the same, whatever is added meanwhile."""
    read: list[Removed] = []

    def lists() -> tuple[int, ...]:
        read.append(read_removed(shards))
        return read[0].lists

    counts = ranks.first(lists)
    ids = read[0].ids.astype(np.int64) if read else np.empty(0, np.int64)
    return Removed.of(ranks.from_first(ids), counts)


def _told(error: Exception) -> tuple[str, int, bool, bool]:
    """What other ranks are told of an error."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text, getattr(error, "exit_code", 1), may_pass(error), isinstance(error, Unavailable)


def _elsewhere(rank: int, text: str, exit_code: int, passing: bool, unavailable: bool) -> UserError:
    """The error that the others raise, which is judged as that of the rank is."""
    error = (Unavailable if unavailable else UserError)(f"rank {rank}: {text}")
    error.exit_code, error.passing = exit_code, passing
    return error


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
