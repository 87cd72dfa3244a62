"""`farseer shards`: packing on this machine, or over the nodes of a cluster."""

import argparse
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from jobs.verbs import add_verb, json_option, progress, say_found, use_keys

if TYPE_CHECKING:
    from data_shards.pack import PackSettings, SourceOptions
    from data_shards.plan import Plan
    from data_shards.store import Store


def pack_verb(verbs: Any) -> None:
    options = add_verb(verbs, "shards", shards, "pack images into shards, each of them read and decoded once")
    options.add_argument("source", metavar="SRC", help="a folder, a tar or zip, or a list (Parquet or text)")
    options.add_argument("target", metavar="DST", help="where the shards go: s3://bucket/folder")
    options.add_argument("--append", action="store_true", help="add what of SRC is not in the set yet, as new shards")
    options.add_argument("--in-place", action="store_true", help="index WebDataset tars where they lie; none is copied")
    options.add_argument("--set", default="", help="settings: 'min_side=64 shard_bytes=134217728 label=none'")
    options.add_argument("--dali-index", action="store_true", help="write an index for DALI's own reader, too")
    options.add_argument("--workers", type=int, help="processes; by default one a core; with --site, tasks of SLURM")
    options.add_argument("--site", default=os.environ.get("SITE"), help="where; by default on this machine")
    json_option(options)


def shards(options: argparse.Namespace) -> int:
    from data_shards.pack import prepare, report
    from data_shards.store import Store

    use_keys(options.site)
    settings, source_options = parse_settings(options.set + (" dali_index=true" if options.dali_index else ""))
    if options.in_place:
        return _in_place(options, settings)
    start, dst = time.monotonic(), Store(options.target)
    plan = prepare(options.source, dst, settings, options=source_options, append=options.append, progress=progress())
    if plan is not None:
        _pack(options, dst, plan)
    found = report(dst, time.monotonic() - start, already_there=plan is None)
    more = "" if not found.already_there or options.append else "; APPEND=1 adds what SRC has got since"
    say_found(options, found, [*found.refused_lines(), f"{found.url}: {found.summary()}{more}"])
    return 0


def _in_place(options: argparse.Namespace, settings: "PackSettings") -> int:
    from data_shards.adopt import index_shards
    from data_shards.store import Store

    if options.append or options.dali_index:
        raise UserError("IN_PLACE=1 indexes tars as they are: leave out APPEND=1 and DALI_INDEX=1")
    store = Store(options.target)
    report, about = index_shards(options.source, store, settings, progress=progress(), workers=options.workers)
    lines = [*report.refused_lines(), f"{report.url}: {report.summary()}", about]
    say_found(options, {**asdict(report), "about": about}, lines)
    return 0


def _pack(options: argparse.Namespace, dst: "Store", plan: "Plan") -> None:
    """On the nodes of a site when tasks are asked for, else in processes here."""
    from data_shards.pack import finish
    from jobs.site import load_site

    site = load_site(options.site) if options.site and options.workers else None
    if site is None or site.executor == "local":
        finish(dst, plan, workers=options.workers, progress=progress())
        return
    from jobs.pack_array import pack_array

    pack_array(site, dst, plan, options.workers, progress())


def parse_settings(text: str) -> "tuple[PackSettings, SourceOptions]":
    """`min_side=64 label=none` as settings. Raises UserError, a line for each mistake."""
    import yaml
    from pydantic import ValidationError

    from data_shards.pack import PackSettings, SourceOptions

    valid = [*PackSettings.model_fields, *SourceOptions.model_fields]
    values, made, errors = dict[str, Any](), list[Any](), list[str]()
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or name not in valid:
            errors.append(f"SET: found {word!r}; valid is name=value of: {', '.join(valid)}")
            continue
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            hint = f"YAML needs special signs in quotes ({name}='@x'), without spaces"
            errors.append(f"SET: {name}: found {value!r}; {hint}")
    for section in (PackSettings, SourceOptions):
        try:
            made.append(section(**{name: value for name, value in values.items() if name in section.model_fields}))
        except ValidationError as error:
            errors += [f"SET: {one['loc'][0]}: found {one['input']!r}; {one['msg']}" for one in error.errors()]
    if errors:
        raise UserError("\n".join(errors))
    return made[0], made[1]
