"""The verbs for shard sets. Each imports what it needs when it is called."""

import argparse
import os
from typing import Any

from jobs.pack_verb import pack_verb
from jobs.verbs import Verb, add_verb, json_option, progress, say_found, use_keys

VERIFY_CONNECTIONS = 64  # its requests are small and many


def shard_verbs(verbs: Any) -> None:
    pack_verb(verbs)
    verifying = add_set_verb(verbs, "verify", verify, "whether a shard set holds what its manifest says")
    verifying.add_argument("--full", action="store_true", help="check and decode every image; else sizes and indexes")
    verifying.add_argument("--workers", type=int, help="processes; by default one a core")
    verifying.add_argument("--afresh", action="store_true", help="also what an interrupted run has checked in full")
    verifying.add_argument("--out", help="where the keys of bad images go; by default var/verify/<set>.txt")
    previewing = add_set_verb(
        verbs, "preview", preview, "one page: pictures sampled evenly, sizes, kinds, what was refused"
    )
    previewing.add_argument("--to", help="the page; by default var/preview-<set>.html")
    deduping = add_set_verb(
        verbs, "dedup", dedup, "list images that a set has twice, or that an evaluation set has too"
    )
    deduping.add_argument("--against", nargs="+", default=[], metavar="URL", help="evaluation sets")
    deduping.add_argument("--distance", type=int, default=4, help="bits of 64 in which hashes of near ones may differ")
    deduping.add_argument("--memory-gib", type=float, default=4, help="DuckDB's; the rest goes to the disk of --out")
    deduping.add_argument("--out", help="folder of the lists; by default var/dedup/<set>")


def add_set_verb(verbs: Any, name: str, function: Verb, text: str) -> argparse.ArgumentParser:
    """A verb for a set that is there: DST, --site and --json."""
    options = add_verb(verbs, name, function, text)
    options.add_argument("target", metavar="DST", help="the set: s3://bucket/folder")
    options.add_argument("--site", default=os.environ.get("SITE"), help="whose keys; by default local, if it is up")
    json_option(options)
    return options


def verify(options: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from data_shards.store import Store
    from data_shards.verify import verify as check
    from jobs.site import ROOT

    use_keys(options.site)
    folder = ROOT / "var" / "verify"
    store = Store(options.target, connections=VERIFY_CONNECTIONS)
    report = check(
        store,
        full=options.full,
        workers=options.workers,
        notes=folder,
        afresh=options.afresh,
        progress=progress(),
    )
    out = Path(options.out) if options.out else folder / f"{_file_name(store.url)}.txt"
    if report.keys:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(f"{key}\n" for key in report.keys))
    where = [f"their keys are in {out}; make remove DST={report.url} LIST={out}"] if report.keys else []
    values = {**asdict(report), "faults": [fault._asdict() for fault in report.faults]}
    say_found(options, values, [*report.lines(), *where])
    return 1 if report.faults else 0


def preview(options: argparse.Namespace) -> int:
    from pathlib import Path

    from data_shards.store import Store
    from jobs.site import ROOT
    from pipeline.report.preview import preview as write

    use_keys(options.site)
    store = Store(options.target)
    path = Path(options.to) if options.to else ROOT / "var" / f"preview-{_file_name(store.url)}.html"
    found = write(store, path)
    line = f"{found.url}: {len(found.shown)} of {found.manifest.samples:,} images shown in {path}"
    say_found(options, {"url": found.url, "page": str(path), "samples": found.manifest.samples}, [line])
    return 0


def dedup(options: argparse.Namespace) -> int:
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
    say_found(options, report, report.lines())
    return 1 if report.leaks else 0


def _file_name(url: str) -> str:
    """s3://bucket/folder -> bucket-folder."""
    return url.partition("://")[2].strip("/").replace("/", "-")
