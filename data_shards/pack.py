"""From a folder of images to a shard set: WebDataset tars with their index, written in parallel, the manifest last.

Every image is decoded once, to prove that it is whole; what is not is refused by a rule and listed. Then the plan is
made: the sorted sources, put into an order of their own by a keyed permutation, so that neighbours in a folder are far
apart in the shards. Same sources and settings: same bytes in every shard, however many processes work.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import google_crc32c
from pydantic import Field, NonNegativeInt, PositiveInt

from data_shards.errors import UserError
from data_shards.images import PILLOW_MAX_PIXELS, Refused, read_photo
from data_shards.index import MANIFEST, REFUSED, Manifest
from data_shards.permutation import Permutation
from data_shards.section import Section
from data_shards.shard import Sample, write_shard
from data_shards.store import Store

PLAN_VERSION = 1

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int], None]  # what is counted, how many are done, of how many


class PackSettings(Section):
    """What is taken, and how large a shard is."""

    affects_results: ClassVar[bool] = False

    shard_bytes: PositiveInt = 256 * 2**20  # decides the number of objects only: reads are ranges
    min_side: PositiveInt = 32  # pixels
    max_pixels: PositiveInt = Field(default=100_000_000, le=PILLOW_MAX_PIXELS)
    max_bytes: PositiveInt = 64 * 2**20  # of a file
    seed: NonNegativeInt = 0  # of the order in which sources are laid out


class Source(NamedTuple):
    """A file; its name within the collection, which tells it apart; its label, if it has one."""

    path: Path
    name: str
    label: str | None


class Refusal(NamedTuple):
    """A line of the set's refused.jsonl."""

    source: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source!r}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class PackReport:
    """What came of it. `reasons`: how many were refused, by rule; `examples`: the first of them."""

    url: str
    layout_id: str
    samples: int
    shards: int
    bytes: int
    refused: int
    reasons: dict[str, int]
    examples: tuple[Refusal, ...]
    seconds: float
    already_there: bool

    def summary(self) -> str:
        """One line for a terminal."""
        tally = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return (
            f"{self.samples:,} images in {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB"
            + (f"; refused {self.refused:,} ({tally})" if self.refused else "; none refused")
            + ("; they were there already" if self.already_there else f"; {self.seconds:.1f} s")
        )

    def refused_lines(self) -> list[str]:
        """The first of those refused, each with its reason."""
        more = self.refused - len(self.examples)
        return [*map(str, self.examples), *([f"and {more:,} more in {self.url}/{REFUSED}"] if more else [])]


def shards(
    src: str,
    dst: str,
    settings: PackSettings | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> PackReport:
    """Pack the folder `src` into the store's folder `dst`. Raises UserError."""
    folder = Path(src).expanduser()
    if not folder.is_dir():
        raise UserError(f"{src}: no such folder; make shards SRC=/folder/of/images DST={dst}")
    return pack(folder, Store(dst), settings or PackSettings(), progress=progress, workers=workers)


def pack(
    source: Path | Sequence[Source],
    dst: Store,
    settings: PackSettings,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
) -> PackReport:
    """Write a shard set, or find that it is there already.

    source: a folder (labels are its subfolders' names), or the files. workers: processes; by default one a core.
    Raises UserError when there is nothing to pack, when `dst` holds another set, or when a source changes meanwhile.
    """
    start = time.monotonic()
    dst.check()
    sources = find_sources(source) if isinstance(source, Path) else sorted(source, key=lambda s: os.fsencode(s.name))
    where = str(source) if isinstance(source, Path) else f"{len(sources)} sources"
    if len({s.name for s in sources}) < len(sources):
        raise UserError(f"{where}: some have the same name; each needs one of its own")
    with _processes(_worker_count(workers, len(sources), dst)) as processes:
        verdicts = processes.map(partial(_judge, settings=settings), sources, batch=32)
        judged = list(_counted(verdicts, "images", len(sources), progress))
        samples = [one for one in judged if isinstance(one, Sample)]
        refused = [one for one in judged if not isinstance(one, Sample)]
        if not samples:
            raise UserError(f"{where}: no image to pack: {_tally(refused)}")
        samples, manifest = _plan(samples, refused, settings)
        there = _already_there(dst, manifest)
        if not there:
            manifest = _write(processes, samples, manifest, refused, dst, progress)
    manifest = there or manifest
    return PackReport(
        url=dst.url,
        layout_id=manifest.layout_id,
        samples=manifest.samples,
        shards=len(manifest.shard_samples),
        bytes=sum(manifest.shard_bytes),
        refused=len(refused),
        reasons=manifest.refused,
        examples=tuple(refused[:20]),
        seconds=time.monotonic() - start,
        already_there=there is not None,
    )


def find_sources(folder: Path, label: Callable[[str], str | None] | None = None) -> list[Source]:
    """All files below a folder, sorted by name. `label` makes one of a file's name; by default it is the subfolder."""
    label = label or by_folder
    names = [
        (Path(directory) / file).relative_to(folder).as_posix()
        for directory, _, files in os.walk(folder, onerror=_cannot_list)
        for file in files
    ]
    return [Source(folder / name, name, label(name)) for name in sorted(names, key=os.fsencode)]


def by_folder(name: str) -> str | None:
    return name.rpartition("/")[0] or None


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename}: {error.strerror}; it cannot be packed as it is") from error


def _judge(source: Source, settings: PackSettings) -> Sample | Refusal:
    limits = {"min_side": settings.min_side, "max_pixels": settings.max_pixels, "max_bytes": settings.max_bytes}
    try:
        photo = read_photo(source.path, **limits)
    except Refused as refused:
        return Refusal(source.name, refused.reason, refused.detail)
    return Sample(
        path=source.path,
        source=source.name,
        label=source.label,
        extension=photo.extension,
        converted=photo.converted,
        width=photo.width,
        height=photo.height,
        size=len(photo.data),
        crc32c=google_crc32c.value(photo.data),
        sha256=photo.sha256,
    )


def _plan(samples: list[Sample], refused: Sequence[Refusal], settings: PackSettings) -> tuple[list[Sample], Manifest]:
    """The samples in the order of their ids, and the manifest but for the shards' sizes."""
    count = len(samples)
    key = blake2b(f"pack {PLAN_VERSION} {settings.seed} {count}".encode(), digest_size=64).digest()
    samples = [samples[i] for i in Permutation(count, key)(range(count)).tolist()]
    mean_bytes = sum(sample.tar_bytes for sample in samples) / count
    shard_count = min(count, -(-count // max(1, round(settings.shard_bytes / mean_bytes))))
    each, more = divmod(count, shard_count)
    shard_samples = tuple(each + (number < more) for number in range(shard_count))
    layout = blake2b(f"layout {PLAN_VERSION} {count} {shard_samples}".encode(), digest_size=16)
    contents = blake2b(digest_size=16)
    for sample in samples:
        layout.update(os.fsencode(sample.source) + b"\0")
        contents.update(sample.sha256)
    reasons = dict(sorted(Counter(one.reason for one in refused).items()))
    return samples, Manifest(
        layout.hexdigest(), contents.hexdigest(), count, shard_samples, (), settings.model_dump(), reasons
    )


def _already_there(dst: Store, manifest: Manifest) -> Manifest | None:
    """The set in the store, when it is this one. Raises UserError when it is another."""
    if not dst.exists(MANIFEST):
        return None
    there = Manifest.load(dst)
    if (there.layout_id, there.contents_id) == (manifest.layout_id, manifest.contents_id):
        return there
    raise UserError(
        f"{dst.url}: holds another shard set ({there.samples} samples, layout {there.layout_id[:8]}; this one has "
        f"{manifest.samples}, layout {manifest.layout_id[:8]}); give a DST of its own"
    )


def _write(
    processes: "_Processes",
    samples: list[Sample],
    manifest: Manifest,
    refused: Sequence[Refusal],
    dst: Store,
    progress: Progress | None,
) -> Manifest:
    _remove_leftovers(dst, len(manifest.shard_samples))
    ends = list(accumulate(manifest.shard_samples))
    parts = [
        (n, samples[end - count : end]) for n, (end, count) in enumerate(zip(ends, manifest.shard_samples, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="farseer-pack-") as folder:
        written = processes.map(partial(write_shard, dst=dst, folder=Path(folder)), parts, batch=1)
        sizes = tuple(_counted(written, "shards", len(parts), progress))
    dst.put(REFUSED, "".join(json.dumps(one._asdict()) + "\n" for one in refused).encode())
    manifest = Manifest(**{**manifest.__dict__, "shard_bytes": sizes})
    manifest.save(dst)
    return manifest


def _remove_leftovers(dst: Store, count: int) -> None:
    """An interrupted packing of other sources may have left shards that this one does not write over."""
    ours = re.compile(r"shards/[0-9a-f]{2}/(\d{6,})\.(tar|idx|parquet)")
    left = [entry.path for entry in dst.list("shards") if (m := ours.fullmatch(entry.path)) and int(m[1]) >= count]
    dst.delete(left)


def _tally(refused: Sequence[Refusal]) -> str:
    counts = Counter(one.reason for one in refused).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in counts) or "there is no file in it"


def _worker_count(wanted: int | None, sources: int, dst: Store) -> int:
    if dst.url.startswith("memory:"):
        return 1  # other processes have other memory
    # to start some takes as long as to check a thousand images
    return wanted or min(len(os.sched_getaffinity(0)), max(1, sources // 1000))


class _Processes(NamedTuple):
    """`map` over processes, in order; without a pool, in this one."""

    pool: ProcessPoolExecutor | None

    def map(self, call: Callable[[T], R], items: Iterable[T], batch: int) -> Iterator[R]:
        return map(call, items) if self.pool is None else self.pool.map(call, items, chunksize=batch)


@contextlib.contextmanager
def _processes(count: int) -> Iterator[_Processes]:
    """Spawned, never forked: the store has threads. Ctrl-C is this process's to handle."""
    if count == 1:
        yield _Processes(None)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield _Processes(pool)
    except BrokenProcessPool as error:
        raise UserError(
            "a packing process died, probably for want of memory; pack with fewer workers or a smaller max_pixels"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _counted(items: Iterable[T], what: str, total: int, progress: Progress | None) -> Iterator[T]:
    for done, item in enumerate(items, 1):
        if progress:
            progress(what, done, total)
        yield item
