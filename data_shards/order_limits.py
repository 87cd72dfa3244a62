"""Whether the numbers of an order of the data go together, and which would when they do not."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_shards.errors import UserError
from data_shards.permutation import MAX_SIZE

if TYPE_CHECKING:
    from data_shards.order import Order


def refuse(order: "Order") -> None:
    """Raise UserError when the numbers of an order do not go together."""
    for name in ("samples", "chunk_samples", "window_chunks", "lanes", "batch_size"):
        if getattr(order, name) < 1:
            raise UserError(f"data.{name}: found {getattr(order, name)}; it must be at least 1")
    if order.samples > MAX_SIZE:
        raise UserError(f"data.samples: found {order.samples}; a set has 2^53 at most")
    if order.batch_size % order.lanes:
        fitting = [lanes for lanes in divisors(order.batch_size) if lanes <= 2 * order.lanes]
        raise UserError(
            f"data.lanes: {order.lanes} does not divide data.batch ({order.batch_size}); {either(fitting[-3:])} would"
        )
    wrong = _too_small(order)
    if wrong:
        raise UserError(f"{wrong}; {_what_would_fit(order)}")


def _too_small(order: "Order") -> str:
    """What a set, or a window, is too small for; empty when it is not."""
    q, g, lanes, batch = order.chunk_samples, order.window_chunks, order.lanes, order.batch_size
    if lanes * g > _comesaround(order, q):
        if order.parts:
            return _too_much_of_one(order)
        return (
            f"data.window_chunks: {lanes} lanes with windows of {g} chunks need {lanes * g} chunks of {q} samples, the "
            f"set of {order.samples} samples has {order.samples // q}, so that a sample would meet itself in a batch"
        )
    if batch > lanes * g * q:
        return (
            f"data.batch: {batch} samples over {lanes} lanes take {batch // lanes} of each, "
            f"a window has only {g * q} ({g} chunks of {q} samples)"
        )
    return ""


def _comesaround(order: "Order", chunk_samples: int) -> int:
    """After how many chunks of the stream a set begins again, the one that does so first."""
    period = sum(part.share for part in order.sets)
    return min(part.samples // chunk_samples * period // part.share for part in order.sets)


def _too_much_of_one(order: "Order") -> str:
    q, mixed = order.chunk_samples, order.lanes * order.window_chunks
    period = sum(part.share for part in order.parts)
    part = min(order.parts, key=lambda part: part.samples // q / part.share)
    return (
        f"data.sources: {part.url or part.layout_id}: {part.samples} samples at {part.share / period:.3g} of the whole "
        f"come around every {part.samples // q * period // part.share} chunks of {q} samples, "
        f"{order.lanes} lanes with windows of {order.window_chunks} mix {mixed} at a time, so that a sample would "
        f"meet itself in a batch"
    )


def _what_would_fit(order: "Order") -> str:
    """Changes of one number that would make the order of this set possible."""
    q, g, lanes, batch = order.chunk_samples, order.window_chunks, order.lanes, order.batch_size
    chunks = _comesaround(order, q)
    need = -(-batch // (lanes * q))  # chunks a window must have for the batch
    candidates = {
        "window_chunks": chunks // lanes if need < g else need,
        "chunk_samples": _comesaround(order, 1) // (lanes * g),
        "lanes": max((some for some in divisors(batch) if some * g <= chunks), default=0),
        "batch": lanes * g * q,
    }
    fitting = [f"{name} {value}" for name, value in candidates.items() if value and _fits(order, **{name: value})]
    if not fitting and _fits(order, chunk_samples=1, window_chunks=_comesaround(order, 1) // lanes):
        fitting = [f"chunk_samples 1 with window_chunks {_comesaround(order, 1) // lanes}"]
    if not fitting:
        return f"a batch of {batch} over {lanes} lanes needs more samples"
    return f"{fitting[0]} would" + (f" (or {', or '.join(fitting[1:])})" if fitting[1:] else "")


def _fits(order: "Order", **changed: int) -> bool:
    numbers = {"chunk_samples": order.chunk_samples, "window_chunks": order.window_chunks}
    numbers |= {"lanes": order.lanes, "batch": order.batch_size, **changed}
    window = numbers["lanes"] * numbers["window_chunks"]
    chunks = _comesaround(order, numbers["chunk_samples"])
    return 0 < window <= chunks and numbers["batch"] <= window * numbers["chunk_samples"]


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def around(number: int, factor: int) -> list[int]:
    """The multiples of `factor` next to `number`, the nearest first."""
    below = number // factor * factor
    return sorted((m for m in (below, below + factor) if m), key=lambda m: (abs(m - number), -m))


def either(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
