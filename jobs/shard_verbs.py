"""The verbs for shard sets. Each imports what it needs when it is called."""

import argparse
import json
import os
from typing import Any

from jobs.pack_verb import pack_verb
from jobs.verbs import add_verb, json_option, progress, say


def shard_verbs(verbs: Any) -> None:
    pack_verb(verbs)
    verifying = add_verb(verbs, "verify", verify, "whether a shard set holds what its manifest says")
    verifying.add_argument("target", metavar="DST", help="the set: s3://bucket/folder")
    verifying.add_argument("--full", action="store_true", help="check and decode every image; else sizes and indexes")
    deduping = add_verb(verbs, "dedup", dedup, "list images that a set has twice, or that an evaluation set has too")
    deduping.add_argument("target", metavar="DST", help="the set: s3://bucket/folder")
    deduping.add_argument("--against", nargs="+", default=[], metavar="URL", help="evaluation sets")
    deduping.add_argument("--distance", type=int, default=4, help="bits of 64 in which hashes of near ones may differ")
    deduping.add_argument("--memory-gib", type=float, default=4, help="DuckDB's; the rest goes to the disk of --out")
    deduping.add_argument("--out", help="folder of the lists; by default var/dedup/<set>")
    for options in (verifying, deduping):
        options.add_argument("--site", default=os.environ.get("SITE"), help="whose keys; by default local, if it is up")
        json_option(options)


def verify(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from data_shards.store import Store
    from data_shards.verify import verify as check

    use_keys(options.site)
    report = check(Store(options.target), full=options.full, progress=progress())
    if options.json:
        say(json.dumps(asdict(report), indent=2))
    else:
        how = "every image decoded" if report.full else "sizes and indexes; FULL=1 decodes every image"
        verdict = f"{len(report.faults)} faults" if report.faults else "as its manifest says"
        say(*report.faults, f"{report.url}: {report.samples:,} images in {report.shards:,} shards: {verdict} ({how})")
    return 1 if report.faults else 0


def dedup(options: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from pydantic import ValidationError

    from data_shards.dedup import DedupSettings
    from data_shards.dedup import dedup as find
    from data_shards.errors import UserError
    from data_shards.store import Store
    from jobs.site import ROOT

    use_keys(options.site)
    store = Store(options.target)
    against = [Store(url) for url in options.against]
    folder = Path(options.out) if options.out else ROOT / "var" / "dedup" / store.url.partition("://")[2].strip("/")
    try:
        settings = DedupSettings(distance=options.distance, memory_bytes=int(options.memory_gib * 2**30))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"dedup: {wrong['loc'][0]} {wrong['input']}: {wrong['msg']}") from None
    report = find(store, folder, settings, against=against, progress=progress())
    say(*([json.dumps(asdict(report), indent=2)] if options.json else report.lines()))
    return 1 if report.leaks else 0


def use_keys(site: str | None) -> None:
    """Those of a site; without one those of the local site if it is up, else whatever the AWS chain finds."""
    from jobs.site import LOCAL, load_site

    if site or LOCAL.exists():
        load_site(site or "local").activate()
