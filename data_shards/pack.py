"""From images anywhere to a shard set: WebDataset tars with their index, the manifest last.

Three phases, each of which goes on where it was: the plan (data_shards.plan), the shards (data_shards.work), the merge
(data_shards.merge). Same source and settings: same bytes in every shard, however many processes or machines work.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_shards.errors import UserError
from data_shards.index import MANIFEST, REFUSED, Manifest
from data_shards.merge import Refusal, merge, read_refused
from data_shards.plan import Asked, PackSettings, Plan, load_plans, make_plan
from data_shards.processes import worker_count
from data_shards.progress import Progress, quiet
from data_shards.sources import Source, SourceOptions, list_sources, metadata_schema, one_spelling, tally
from data_shards.store import Denied, Store
from data_shards.work import pack_groups

__all__ = ["PackReport", "PackSettings", "Refusal", "Source", "SourceOptions", "finish", "pack", "prepare", "report"]

INDEXED = "plans/indexed/TARS.json"  # what data_shards.adopt was asked for
_PROBE = "plans/writable"
EXAMPLES = 20  # of refused sources, in a report
WORTH_A_PROCESS = 2000  # sources: to start a process takes as long as to pack these


@dataclass(frozen=True)
class PackReport:
    """What came of it. `reasons`: how many were refused, by rule; `examples`: the first of them.

    ignored: what was left out: members of archives that are no images, by extension, and links to folders.
    """

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
    ignored: dict[str, int]

    def summary(self) -> str:
        """One line for a terminal."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return (
            f"{self.samples:,} images in {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB"
            + (f"; refused {self.refused:,} ({reasons})" if self.refused else "; none refused")
            + (f"; left out besides the images: {tally(self.ignored)}" if self.ignored else "")
            + ("; they were there already" if self.already_there else f"; {self.seconds:.1f} s")
        )

    def refused_lines(self) -> list[str]:
        """The first of those refused, each with its reason."""
        more = self.refused - len(self.examples)
        return [*map(str, self.examples), *([f"and {more:,} more in {self.url}/{REFUSED}"] if more else [])]


def pack(
    source: str | Path | Sequence[Source],
    dst: Store,
    settings: PackSettings,
    *,
    options: SourceOptions | None = None,
    append: bool = False,
    progress: Progress = quiet,
    workers: int | None = None,
) -> PackReport:
    """Write a shard set, go on with one that the same call began, or find that it is there already.

    source: what `list_sources` takes, or the sources themselves. append: add what of it is not in the set yet.
    workers: processes; by default one a core. Raises UserError when there is nothing to pack, when `dst` holds another
    set, when a store fails: the same call goes on then.
    """
    start = time.monotonic()
    plan = prepare(source, dst, settings, options=options, append=append, progress=progress)
    if plan is not None:
        finish(dst, plan, workers=workers, progress=progress)
    return report(dst, time.monotonic() - start, already_there=plan is None)


def prepare(
    source: str | Path | Sequence[Source],
    dst: Store,
    settings: PackSettings,
    *,
    options: SourceOptions | None = None,
    append: bool = False,
    progress: Progress = quiet,
) -> Plan | None:
    """The plan by which there is something to do, made now or found half done; None when all is done.

    Raises UserError as `pack` does, before anything is written.
    """
    dst.check()
    asked = Asked(_name(source), settings, options or SourceOptions())
    plans, manifest = load_plans(dst), Manifest.load(dst) if dst.exists(MANIFEST) else None
    done = len(manifest.shard_samples) if manifest else 0
    begun = _begun_append(asked, dst, plans, manifest) if append else _begun(asked, dst, plans, manifest)
    if begun is not None:
        return begun if begun.end_shard > done else None
    _check_writable(dst)
    ignored = Counter[str]()
    listed, columns = _listed(source, asked.options, ignored, dst.url)
    plan = make_plan(dst, asked, listed, columns, plans, manifest.layout_id if manifest else None, progress, ignored)
    if plan is not None and plan.asked != asked:
        raise _other(dst, asked, plan)
    return plan


def finish(dst: Store, plan: Plan, *, workers: int | None = None, progress: Progress = quiet) -> None:
    """The second and the third phase, in processes of this machine. Raises UserError as `pack` does."""
    workers = min(worker_count(workers, 1 + plan.sources // WORTH_A_PROCESS, dst), plan.groups)
    pack_groups(dst, plan, range(plan.groups), workers, progress)
    merge(dst, plan)


def report(dst: Store, seconds: float, *, already_there: bool) -> PackReport:
    """What is in the set now."""
    manifest = Manifest.load(dst)
    refused = sum(manifest.refused.values())
    return PackReport(
        url=dst.url,
        layout_id=manifest.layout_id,
        samples=manifest.samples,
        shards=len(manifest.shard_samples),
        bytes=sum(manifest.shard_bytes),
        refused=refused,
        reasons=manifest.refused,
        examples=tuple(islice(read_refused(dst), EXAMPLES)) if refused else (),
        seconds=seconds,
        already_there=already_there,
        ignored=dict(sum((Counter(plan.ignored) for plan in load_plans(dst)), Counter[str]())),
    )


def _listed(
    source: str | Path | Sequence[Source], options: SourceOptions, ignored: Counter[str], dst: str
) -> tuple[Iterable[Source], pa.Schema | None]:
    """The sources, and what is known of each. Read as typed: a slash at the end tells a folder from an object."""
    if not isinstance(source, str | Path):
        return source, None
    return list_sources(str(source), options, ignored, dst), metadata_schema(str(source), options)


def _check_writable(dst: Store) -> None:
    """Now, rather than when a billion sources are listed."""
    dst.put(_PROBE, b"")
    with contextlib.suppress(Denied):  # what may be written need not be removable
        dst.delete([_PROBE])


def _begun(asked: Asked, dst: Store, plans: list[Plan], manifest: Manifest | None) -> Plan | None:
    """The plan of the same call, if there is one. Raises UserError when the place holds something else."""
    same = next((plan for plan in plans if plan.asked == asked), None)
    if same is None and plans:
        raise _other(dst, asked, plans[0])
    if same is None and manifest is not None:
        raise UserError(f"{dst.url}: holds another shard set ({manifest.samples:,} samples); give a DST of its own")
    if dst.exists(INDEXED):
        raise UserError(f"{dst.url}: holds the begin of an index of tars (IN_PLACE=1); give a DST of its own")
    return same


def _begun_append(asked: Asked, dst: Store, plans: list[Plan], manifest: Manifest | None) -> Plan | None:
    """The same for an append: its plan when it was begun and is not finished."""
    if manifest is None:
        raise UserError(f"{dst.url}: holds no finished shard set to append to; make shards without APPEND=1 first")
    if not plans:
        raise UserError(f"{dst.url}: its shards were not packed here but indexed where they lie; give a DST of its own")
    if plans[-1].end_shard <= len(manifest.shard_samples):
        return None
    if plans[-1].asked != asked:
        raise _other(dst, asked, plans[-1])
    return plans[-1]


def _other(dst: Store, asked: Asked, plan: Plan) -> UserError:
    """What the place holds, and in what it differs from what is asked for."""
    there, here = _flat(plan.asked), _flat(asked)
    differences = ", ".join(
        f"{name}: {there[name]} there, {here[name]} here" for name in here if here[name] != there[name]
    )
    return UserError(
        f"{dst.url}: holds another shard set, or the begin of one (of {plan.sources:,} sources; {differences}); give a "
        f"DST of its own, or APPEND=1 to add to it"
    )


def _flat(asked: Asked) -> dict[str, Any]:
    return {"source": asked.source, **asked.settings.model_dump(), **asked.options.model_dump()}


def _name(source: str | Path | Sequence[Source]) -> str:
    """What stands for the source in a plan: the same from any folder, for sources handed over wherever they lie."""
    if isinstance(source, str | Path):
        return one_spelling(str(source))
    digest = blake2b(digest_size=8)
    for one in source:
        digest.update(repr(one[1:5]).encode("utf-8", "surrogateescape"))
    return f"{len(source)} sources {digest.hexdigest()}"
