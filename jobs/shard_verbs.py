"""The verbs for shard sets: shards packs one, the others look at it, and take from it what must leave.

Each imports what it needs when it is called.
"""

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from jobs.run_verbs import run_folder, run_option
from jobs.verbs import (
    ProgressLine,
    Verb,
    add_verb,
    json_option,
    output,
    output_file,
    positive,
    say_found,
    site_option,
    use_keys,
)

if TYPE_CHECKING:
    from data_shards.pack import PackSettings, SourceOptions
    from data_shards.plan import Plan
    from data_shards.store import Store

VERIFY_CONNECTIONS = 64  # its requests are small and many


def shard_verbs(verbs: Any) -> None:
    packing = add_verb(verbs, "shards", shards, "pack images into shards, each of them read and decoded once")
    packing.add_argument("source", metavar="SRC", help="a folder, a tar or zip, or a list (Parquet or text)")
    packing.add_argument("target", metavar="DST", help="where the shards go: s3://bucket/folder")
    packing.add_argument("--append", action="store_true", help="add what of SRC is not in the set yet, as new shards")
    packing.add_argument("--in-place", action="store_true", help="index WebDataset tars where they lie; none is copied")
    packing.add_argument("--set", default="", help="settings: 'min_side=64 shard_bytes=134217728 label=none'")
    packing.add_argument("--dali-index", action="store_true", help="write an index for DALI's own reader, too")
    packing.add_argument(
        "--workers", type=positive, help="processes; by default one a core; with --site, SLURM's tasks"
    )
    packing.add_argument("--site", default=os.environ.get("SITE"), help="where; by default on this machine")
    json_option(packing)
    verifying = _set_verb(verbs, "verify", verify, "whether a shard set holds what its manifest says")
    verifying.add_argument("--full", action="store_true", help="check and decode every image; else sizes and indexes")
    verifying.add_argument("--workers", type=positive, help="processes; by default one a core")
    verifying.add_argument("--afresh", action="store_true", help="also what an interrupted run has checked in full")
    verifying.add_argument("--out", help="where the keys of bad images go; by default var/verify/<set>.txt")
    previewing = _set_verb(
        verbs, "preview", preview, "one page: pictures sampled evenly, sizes, kinds, what was refused"
    )
    previewing.add_argument("--to", help="the page; by default var/preview-<set>.html")
    deduping = _set_verb(verbs, "dedup", dedup, "list images that a set has twice, or that an evaluation set has too")
    deduping.add_argument("--against", nargs="+", default=[], metavar="URL", help="evaluation sets")
    deduping.add_argument("--distance", type=int, default=4, help="bits of 64 in which hashes of near ones may differ")
    deduping.add_argument("--memory-gib", type=float, default=4, help="DuckDB's; the rest goes to the disk of --out")
    deduping.add_argument("--out", help="folder of the lists; by default var/dedup/<set>")
    removing = _set_verb(verbs, "remove", remove, "never show these images again, from each run's next start on")
    removing.add_argument("list", metavar="LIST", help="a file of keys, sources or sha256, one a line; - is stdin")
    removing.add_argument("--ignore-unknown", action="store_true", help="lines that name no image are only counted")
    removing.add_argument("--force", action="store_true", help="also more than 5 %% of the set")
    _set_verb(verbs, "compact", compact, "erase the bytes of removed images from a set, in place")
    asking = run_option(add_verb(verbs, "seen", seen, "whether a run has learnt from an image, and at which steps"))
    asking.add_argument("image", metavar="KEY", help="its key, the name of its source, or its sha256")
    site_option(asking)
    json_option(asking)


def _set_verb(verbs: Any, name: str, function: Verb, text: str) -> argparse.ArgumentParser:
    """A verb for a set that is there: DST, --site and --json."""
    options = add_verb(verbs, name, function, text)
    options.add_argument("target", metavar="DST", help="the set: s3://bucket/folder")
    options.add_argument("--site", default=os.environ.get("SITE"), help="whose keys; by default local, if it is up")
    json_option(options)
    return options


def shards(options: argparse.Namespace) -> int:
    from data_shards.pack import prepare, report

    if options.target.startswith("memory://"):
        raise UserError(
            f"DST={options.target}: is gone with this process; valid is s3://bucket/folder or file:///folder"
        )
    settings, source_options = parse_settings(options.set + (" dali_index=true" if options.dali_index else ""))
    if options.in_place:
        return _in_place(options, settings)
    start, dst = time.monotonic(), _store(options)
    plan = prepare(
        options.source, dst, settings, options=source_options, append=options.append, progress=ProgressLine()
    )
    if plan is not None:
        _pack(options, dst, plan)
    found = report(dst, time.monotonic() - start, already_there=plan is None)
    more = "" if not found.already_there or options.append else "; APPEND=1 adds what SRC has got since"
    say_found(options, found, [*found.refused_lines(), f"{found.url}: {found.summary()}{more}"])
    return 0


def _in_place(options: argparse.Namespace, settings: "PackSettings") -> int:
    from data_shards.adopt import index_shards

    if options.append or options.dali_index:
        raise UserError("IN_PLACE=1 indexes tars as they are: leave out APPEND=1 and DALI_INDEX=1")
    report, about = index_shards(
        options.source, _store(options), settings, progress=ProgressLine(), workers=options.workers
    )
    lines = [*report.refused_lines(), f"{report.url}: {report.summary()}", about]
    say_found(options, {**asdict(report), "about": about}, lines)
    return 0


def _pack(options: argparse.Namespace, dst: "Store", plan: "Plan") -> None:
    """On the nodes of a site when tasks are asked for, else in processes here."""
    from data_shards.pack import finish
    from jobs.site import load_site

    site = load_site(options.site) if options.site and options.workers else None
    if site is None or site.executor == "local":
        finish(dst, plan, workers=options.workers, progress=ProgressLine())
        return
    from jobs.pack_array import pack_array

    pack_array(site, dst, plan, options.workers, ProgressLine())


def parse_settings(text: str) -> "tuple[PackSettings, SourceOptions]":
    """`min_side=64 label=none` as settings. Raises UserError, a line for each mistake."""
    import yaml
    from pydantic import ValidationError

    from data_shards.pack import PackSettings, SourceOptions
    from data_shards.section import what_is_valid

    valid = [*PackSettings.model_fields, *SourceOptions.model_fields]
    values, made, errors = dict[str, Any](), list[Any](), list[str]()
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or name not in valid:
            errors.append(f"SET: found {word!r}; valid is name=value of: {', '.join(valid)}")
            continue
        try:
            values[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # the latter: a date that is none
            hint = f"YAML needs special signs in quotes ({name}='@x'), without spaces"
            errors.append(f"SET: {name}: found {value!r}; {hint}")
    for section in (PackSettings, SourceOptions):
        try:
            made.append(section(**{name: value for name, value in values.items() if name in section.model_fields}))
        except ValidationError as error:
            errors += [
                f"SET: {one['loc'][0]}: found {one['input']!r}; valid is {what_is_valid(one['msg'])}"
                for one in error.errors()
            ]
    if errors:
        raise UserError("\n".join(errors))
    return made[0], made[1]


def verify(options: argparse.Namespace) -> int:
    """Exit code 1 when something is wrong with the set."""
    from data_shards.removed import removal
    from data_shards.verify import verify as check

    store = _store(options, connections=VERIFY_CONNECTIONS)
    how = {"full": options.full, "workers": options.workers, "afresh": options.afresh}
    report = check(store, notes=output(None, "verify"), **how, progress=ProgressLine())
    out = output_file(options.out, f"verify/{_file_name(store.url)}.txt")
    if report.keys:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(f"{key}\n" for key in report.keys))
    where = [f"their keys are in {out}; {removal(report.url, out)} takes them out"] if report.keys else []
    values = {**asdict(report), "faults": [fault._asdict() for fault in report.faults]}
    say_found(options, values, [*report.lines(), *where])
    return 1 if report.faults else 0


def preview(options: argparse.Namespace) -> int:
    from pipeline.report.preview import gather
    from pipeline.report.preview_page import write_preview

    store = _store(options)
    path = output_file(options.to, f"preview-{_file_name(store.url)}.html")
    found = gather(store)
    write_preview(path, found)
    line = f"{found.url}: {len(found.shown)} of {found.manifest.samples:,} images shown in {path}"
    say_found(options, {"url": found.url, "page": str(path), "samples": found.manifest.samples}, [line])
    return 0


def dedup(options: argparse.Namespace) -> int:
    """Exit code 1 when an evaluation set has images of this one: a leak."""
    from pydantic import ValidationError

    from data_shards.dedup import DedupSettings
    from data_shards.dedup import dedup as find
    from data_shards.section import what_is_valid
    from data_shards.store import Store

    store = _store(options)
    against = [Store(url) for url in options.against]
    folder = output(options.out, f"dedup/{store.url.partition('://')[2].strip('/')}")
    try:
        settings = DedupSettings(distance=options.distance, memory_bytes=int(options.memory_gib * 2**30))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"dedup: {wrong['loc'][0]}: found {wrong['input']}; valid is {what_is_valid(wrong['msg'])}"
        ) from None
    report = find(store, folder, settings, against=against, progress=ProgressLine())
    say_found(options, report, report.lines())
    return 1 if report.leaks else 0


def remove(options: argparse.Namespace) -> int:
    from data_shards.index import ShardSet
    from data_shards.removed import remove as add

    shards = ShardSet.open(_store(options))
    how = {"ignore_unknown": options.ignore_unknown, "force": options.force}
    path = Path("/dev/stdin" if options.list == "-" else options.list)
    try:
        with path.open(encoding="utf-8", errors="backslashreplace") as lines:  # as the tables write such names
            report = add(shards, lines, **how, progress=ProgressLine())
    except OSError as error:
        raise UserError(f"LIST={path}: {error.strerror}; give a file of keys, sources or sha256, one a line") from None
    say_found(options, report, [report.summary()])
    return 0


def compact(options: argparse.Namespace) -> int:
    from data_shards.compact import compact as erase

    report = erase(_store(options), ProgressLine())
    say_found(options, report, [report.summary()])
    return 0


def seen(options: argparse.Namespace) -> int:
    from pipeline.seen import seen as look

    image = os.fsencode(options.image).decode(errors="backslashreplace")  # as the tables write such names
    found = look(run_folder(options), image, ProgressLine())
    say_found(options, found, found.lines())
    return 0


def _store(options: argparse.Namespace, **how: int) -> "Store":
    """Of the set, by the keys of the site."""
    from data_shards.store import Store

    use_keys(options.site)
    return Store(options.target, **how)


def _file_name(url: str) -> str:
    """s3://bucket/folder -> bucket-folder."""
    return url.partition("://")[2].strip("/").replace("/", "-")
