"""A look into a few steps of a run that goes on, by torch's profiler, when somebody asks for it.

The question is a file, `profile` in the run's folder on the shared disk, which `make profile` puts there. Rank 0 alone
answers: beside the attempt's rows it leaves profile-step-000000104.json.gz, a trace for ui.perfetto.dev, and .txt, what
takes longest. The steps that are looked at take longer; what is learned stays the same to the bit.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import schedule

from data_shards.errors import one_line
from data_shards.whole import write_whole

QUESTION = "profile"
STEPS = 3
WARM_UP = 1  # the first one with a profiler is like no other
LOOK_S = 2.0  # between two looks for the question: each is one of a shared disk
ROWS = 20
# what the program calls the parts of a step, as `record_function` marks them
PARTS = ("forward", "sinkhorn", "loss", "backward", "next batch", "gradient norm", "optimizer")


class Profiler:
    """folder: of the attempt, within the run's. event(name, **fields): is told of each answer."""

    def __init__(self, folder: Path, event: Callable[..., None]) -> None:
        self._folder, self._event = folder, event
        self._looked = 0.0
        self._trace: Any = None
        self._done = 0  # the last step that has ended

    def between(self, done: int) -> None:
        """To be called between any two steps; done: the last one that has ended."""
        self._done = done
        try:
            if self._trace is not None:
                self._trace.step()
            elif time.monotonic() - self._looked > LOOK_S:
                self._looked = time.monotonic()
                if self._asked():
                    self._begin()
        except Exception as error:  # noqa: BLE001 - a look that fails must not end what is looked at
            self.close()
            self._event("profile failed", step=done, reason=one_line(error))

    def close(self) -> None:
        """Look no longer; what was seen of less than all steps is forgotten."""
        trace, self._trace = self._trace, None
        if trace is not None:
            with suppress(Exception):
                trace.on_trace_ready = None
                trace.stop()

    def _asked(self) -> bool:
        """Takes the question away, which a later start would else answer again."""
        with suppress(OSError):  # there is none, or the disk is away
            (self._folder.parent / QUESTION).unlink()
            return True
        return False

    def _begin(self) -> None:
        steps = schedule(wait=0, warmup=WARM_UP, active=STEPS, repeat=1)
        self._trace = torch.profiler.profile(schedule=steps, on_trace_ready=self._answer)
        self._trace.start()

    def _answer(self, trace: Any) -> None:
        self._trace = None
        trace_path, table_path = (self._folder / f"profile-step-{self._done:09d}.{end}" for end in ("json.gz", "txt"))
        trace.export_chrome_trace(str(trace_path))
        lines = [f"steps {self._done - STEPS + 1} to {self._done} on rank 0", "", *table(trace.key_averages())]
        write_whole(table_path, "\n".join([*lines, ""]))
        self._event("profiled", step=self._done, table=str(table_path), trace=str(trace_path))


def table(averages: Iterable[Any]) -> Iterator[str]:
    """The parts of a step, then what takes longest by itself: on a GPU if one works, else on the host.

    averages: of torch's profiler, over STEPS steps.
    """
    events = list(averages)
    host = [event for event in events if event.device_type == DeviceType.CPU]
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    yield "   ms a step" + "    of a GPU" * bool(kernels)
    for name, spent, on_gpu in _parts(host, kernels):
        yield f"{_ms(spent)}{_ms(on_gpu) if kernels else ''}  {name}"
    yield from ("", "   ms a step       calls" + "  (of a GPU)" * bool(kernels))
    timed = [(event.self_device_time_total, event) for event in kernels]
    timed = timed or [(event.self_cpu_time_total, event) for event in host if not event.is_user_annotation]
    for spent, event in sorted(timed, key=lambda one: one[0], reverse=True)[:ROWS]:
        yield f"{_ms(spent)}{event.count / STEPS:12.0f}  {event.key}"


def _parts(host: list[Any], kernels: list[Any]) -> Iterator[tuple[str, float, float]]:
    """Name, microseconds of the host and of a GPU; the whole step first."""
    marked = {event.key: event for event in host if event.is_user_annotation}
    if (step := marked.get("ProfilerStep*")) is not None:
        yield "the whole step", step.cpu_time_total, sum(kernel.self_device_time_total for kernel in kernels)
    # what autograd does for a GPU, it does in a thread of its own
    behind = sum(event.device_time_total for event in host if event.key.startswith("autograd::engine::"))
    for name in PARTS:
        if (part := marked.get(name)) is not None:
            yield name, part.cpu_time_total, part.device_time_total + (behind if name == "backward" else 0)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000 / STEPS:12.2f}"
