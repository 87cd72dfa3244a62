"""WebDataset tars that exist already, indexed where they lie: DST gets their index and manifest, no tar is copied.

Each image is examined once, by the same rules as in packing; what they refuse, or what would have to be converted, is
listed and left out of the index. Their order is taken as it is. A tar is done when its record is there, so the same
call goes on where it was.

    DST/plans/indexed/TARS.json      what was asked for
    DST/plans/indexed/000012.json    a finished tar
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from data_shards.archives import Member, archive_kind, images
from data_shards.errors import UserError
from data_shards.files import opened
from data_shards.images import Photo, Refused, Rules, check_bytes, examine
from data_shards.index import MANIFEST, REFUSED, Manifest
from data_shards.merge import Refusal
from data_shards.pack import INDEXED, PackReport, report
from data_shards.plan import load_plans
from data_shards.processes import unordered, worker_count
from data_shards.progress import Progress, quiet
from data_shards.shard import Row, Written, put_index, row
from data_shards.sources import Source, folder_label, list_tars
from data_shards.store import AlreadyExists, NotFound, Store

VERSION = 1
MIXING = (
    "the order within the tars is kept: training reads neighbours together, in chunks, and mixes those of a window; if "
    "the tars are sorted, by class or by site, batches are less mixed than those of a packed set: pack them to mix them"
)
_WORTH_PROCESSES = 8  # tars
_FOLDER = INDEXED.rpartition("/")[0]
_TEXTS = pa.schema({"txt": pa.string(), "json": pa.string()})


class Indexed(NamedTuple):
    """A finished tar. names: digest of its members' (hex); alike: how many neighbours of `labelled` share a label."""

    written: Written
    names: str
    refused: dict[str, int]
    alike: int
    labelled: int


def index_shards(
    src: str, dst: Store, rules: Rules, *, progress: Progress = quiet, workers: int | None = None
) -> tuple[PackReport, str]:
    """Index the tars of `src` (a folder, a pattern or one of them, here or in S3); and what to know about their order.

    workers: processes; by default one a core. Raises UserError when a tar cannot be read, or when `dst` holds
    another set.
    """
    if rules.longest_side or rules.drop_exif:
        raise UserError("images in tars that stay as they are cannot be changed: leave out longest_side and drop_exif")
    start = time.monotonic()
    dst.check()
    tars = [url if "://" in url else f"file://{url}" for url in list_tars(src)]
    dst.beside(tars[0].rpartition("/")[0])  # training reads them as a store: http does not do
    there = _claim(dst, {"version": VERSION, "tars": tars, "rules": rules.model_dump(include={*Rules.model_fields})})
    workers = worker_count(workers, len(tars) if len(tars) >= _WORTH_PROCESSES else 1, dst)
    found: dict[int, Indexed] = {}
    for number, one in unordered(partial(_index, dst, rules), list(enumerate(tars)), workers):
        found[number] = one
        progress("tars", len(found), len(tars), refused=sum(sum(tar.refused.values()) for tar in found.values()))
    shards = [found[number] for number in range(len(tars))]
    if not there:
        _manifest(src, tars, shards, rules).save(dst)
    return report(dst, time.monotonic() - start, already_there=there), _about_order(shards)


def _claim(dst: Store, asked: dict[str, Any]) -> bool:
    """Whether the set is complete. Raises UserError when something else is, or is being made, there."""
    mine = json.dumps(asked).encode()
    there = Manifest.load(dst) if dst.exists(MANIFEST) else None
    begun = dst.exists(INDEXED)
    if begun and dst.get(INDEXED) != mine:
        raise UserError(f"{dst.url}: the index of other tars, or by other rules; give a DST of its own")
    if load_plans(dst) or (there is not None and (not begun or list(there.tars) != asked["tars"])):
        raise UserError(f"{dst.url}: holds another shard set; give a DST of its own")
    if not begun:
        try:
            dst.put(INDEXED, mine, create_only=True)
        except AlreadyExists:  # somebody else's, this very moment
            return _claim(dst, asked)
    return there is not None


def _index(dst: Store, rules: Rules, tar: tuple[int, str]) -> tuple[int, Indexed]:
    """Number of a tar, and what came of it, now or before."""
    number, url = tar
    commit = f"{_FOLDER}/{number:06d}.json"
    try:
        written, *others = json.loads(dst.get(commit))
        return number, Indexed(Written(*written), *others)
    except NotFound:
        pass
    refused: list[Refusal] = []
    with opened(url) as file:
        rows = [*_rows(number, file, url, rules, refused)]
        size = file.seek(0, 2)
    found = _indexed(put_index(dst, number, rows, _TEXTS, size), rows, refused)
    if refused:
        lines = "".join(json.dumps(one._asdict()) + "\n" for one in refused)
        dst.put(f"{REFUSED}/{number:06d}.jsonl", lines.encode())
    dst.put(commit, json.dumps(found).encode())
    return number, found


def _rows(number: int, file: BinaryIO, url: str, rules: Rules, refused: list[Refusal]) -> Iterator[Row]:
    if archive_kind(file, url) != "tar":
        raise UserError(f"{url}: no tar; only the images of uncompressed tars can be used where they lie")
    place = 0
    for member in images(file, url, "tar", Counter()):
        texts = dict(member.texts or {})
        label = texts.pop("cls", None) or folder_label(member.name)
        source = Source(url, name=f"{url.rpartition('/')[2]}/{member.name}", label=label, columns=texts)
        try:
            photo = _examine(file, member, rules)
        except Refused as error:
            refused.append(Refusal(source.name, error.reason, error.detail))
            continue
        yield row(number, place, member.offset, source, photo)
        place += 1


def _examine(file: BinaryIO, member: Member, rules: Rules) -> Photo:
    check_bytes(member.size, rules.max_bytes)
    file.seek(member.offset)
    photo = examine(file.read(member.size), rules)
    if photo.converted:
        raise Refused("unusual coding", "it would have to be converted, and its tar stays as it is")
    return photo


def _indexed(written: Written, rows: list[Row], refused: list[Refusal]) -> Indexed:
    names = blake2b(digest_size=16)
    for one in rows:
        names.update(f"{one.columns['source']}\n".encode())
    labels = [one.columns["label"] for one in rows]
    labelled = [pair for pair in pairwise(labels) if None not in pair]
    reasons = Counter(one.reason for one in refused)
    return Indexed(written, names.hexdigest(), reasons, sum(a == b for a, b in labelled), len(labelled))


def _manifest(src: str, tars: list[str], shards: list[Indexed], rules: Rules) -> Manifest:
    layout, contents = blake2b(digest_size=16), blake2b(digest_size=16)
    for shard in shards:
        layout.update(f"{shard.names} {shard.written.samples}\n".encode())
        contents.update(shard.written.digest.encode())
    refused = sum((Counter(shard.refused) for shard in shards), Counter[str]())
    if not any(shard.written.samples for shard in shards):
        raise UserError(f"{src}: no image to index: {dict(refused) or 'there is none in it'}")
    return Manifest(
        layout_id=layout.hexdigest(),
        contents_id=contents.hexdigest(),
        samples=sum(shard.written.samples for shard in shards),
        shard_samples=tuple(shard.written.samples for shard in shards),
        shard_bytes=tuple(shard.written.bytes for shard in shards),
        settings={"source": src, "in_place": True, **rules.model_dump(include={*Rules.model_fields})},
        refused=dict(sorted(refused.items())),
        tars=tuple(tars),
    )


def _about_order(shards: list[Indexed]) -> str:
    alike, labelled = sum(shard.alike for shard in shards), sum(shard.labelled for shard in shards)
    return MIXING + (f" ({alike / labelled:.0%} of neighbours have the same label)" if labelled else "")
