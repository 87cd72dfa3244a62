"""What came of a packing: a summary of each group of shards, and the manifest that is made of them.

Whoever ends last merges; two who both think so write the same bytes. At most MOST_GROUPS objects are read.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.errors import UserError
from data_shards.index import MANIFEST, REFUSED, Manifest, dali_path, index_path, shard_path, table_path
from data_shards.plan import Plan
from data_shards.shard import Written
from data_shards.store import AlreadyExists, Store


class Refusal(NamedTuple):
    """A source that was not taken: a line of the set's refused/*.jsonl."""

    source: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source!r}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class Commit(NamedTuple):
    """A finished shard, as its record says."""

    written: Written
    refused: list[Refusal]


def read_refused(store: Store) -> Iterator[Refusal]:
    """What was refused when the set was packed, in the order of the shards."""
    for entry in store.list(REFUSED):
        for line in store.get(entry.path).splitlines():
            yield Refusal(**json.loads(line))


def refused_path(plan: Plan, group: int) -> str:
    """Where a group's refused sources are listed; named by its first shard, which no other plan has."""
    return f"{REFUSED}/{plan.group_shards(group).start:06d}.jsonl"


def save_group(store: Store, plan: Plan, group: int, commits: Iterable[Commit]) -> None:
    """Put what came of a group's shards, taken one by one: what was refused, then the summary."""
    shards, reasons = list[Written](), Counter[str]()
    with tempfile.TemporaryFile(prefix="farseer-refused-") as lines:
        for commit in commits:
            shards.append(commit.written)
            reasons.update(one.reason for one in commit.refused)
            lines.writelines(json.dumps(one._asdict()).encode() + b"\n" for one in commit.refused)
        lines.flush()
        if reasons:
            store.upload(Path(f"/proc/self/fd/{lines.fileno()}"), refused_path(plan, group))
    store.put(plan.summary_path(group), json.dumps({"shards": shards, "refused": reasons}).encode())


def unfinished(store: Store, plan: Plan) -> set[int]:
    """The groups that have no summary yet."""
    done = {int(Path(entry.path).stem) for entry in store.list(f"{plan.folder}/groups")}
    return set(range(plan.groups)) - done


def merge(store: Store, plan: Plan) -> Manifest:
    """Put the manifest of a plan whose groups are all finished.

    Raises UserError when no image was accepted; then nothing of the plan is left in the store.
    """
    summaries = _summaries(store, plan)
    shards = [Written(*one) for summary in summaries for one in summary["shards"]]
    refused = sum((Counter(summary["refused"]) for summary in summaries), Counter[str]())
    if not any(shard.samples for shard in shards):
        _discard(store, plan)
        tally = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
        raise UserError(f"{plan.asked.source}: no image to pack: {tally}")
    manifest = _manifest(Manifest.load(store, plan.after) if plan.after else None, plan, shards, refused)
    _save(store, plan, manifest)
    return manifest


def _manifest(before: Manifest | None, plan: Plan, shards: Sequence[Written], refused: Counter[str]) -> Manifest:
    source, settings, options = plan.asked
    counts = tuple(shard.samples for shard in shards)
    layout = blake2b(f"{plan.after} {plan.identity} {counts}".encode(), digest_size=16)
    contents = blake2b("".join(shard.digest for shard in shards).encode(), digest_size=16)
    sizes, all_refused = tuple(shard.bytes for shard in shards), refused
    if before is not None:
        contents.update(before.contents_id.encode())
        counts, sizes = before.shard_samples + counts, before.shard_bytes + sizes
        all_refused = refused + Counter(before.refused)
    return Manifest(
        layout_id=layout.hexdigest(),
        contents_id=contents.hexdigest(),
        samples=sum(counts),
        shard_samples=counts,
        shard_bytes=sizes,
        settings={"source": source, **settings.model_dump(), **options.model_dump()},
        refused=dict(sorted(all_refused.items())),
    )


def _save(store: Store, plan: Plan, manifest: Manifest) -> None:
    """As the newest version, unless another merge of this plan was quicker, or the set has gone on since."""
    if plan.after is not None and Manifest.load(store).layout_id not in (plan.after, manifest.layout_id):
        raise UserError(f"{store.url}: {MANIFEST} is no longer the version that plan {plan.number} adds to")
    try:
        manifest.save(store, create_only=plan.after is None)
    except AlreadyExists:
        if Manifest.load(store) != manifest:
            raise


def _summaries(store: Store, plan: Plan) -> list[dict[str, Any]]:
    """All at once: the store has its own bound on connections."""
    reads = [store.submit(store.read(plan.summary_path(group))) for group in range(plan.groups)]
    return [json.loads(read.result()) for read in reads]


def _discard(store: Store, plan: Plan) -> None:
    """The plan itself goes last: until then, the same command finds what it has to do."""
    numbers = range(plan.first_shard, plan.end_shard)
    store.delete(path(number) for path in (shard_path, index_path, table_path, dali_path) for number in numbers)
    store.delete(refused_path(plan, group) for group in range(plan.groups))
    paths = [entry.path for entry in store.list(plan.folder)]
    store.delete(path for path in paths if path != plan.path)
    store.delete([plan.path])
