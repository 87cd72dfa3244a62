"""The verbs for images that must leave: remove, seen, compact. Each imports what it needs when it is called."""

import argparse
from typing import Any

from jobs.run_verbs import run_folder, run_option
from jobs.shard_verbs import add_set_verb
from jobs.verbs import add_verb, json_option, progress, say_found, site_option, use_keys


def curate_verbs(verbs: Any) -> None:
    removing = add_set_verb(verbs, "remove", remove, "never show these images again, from each run's next start on")
    removing.add_argument("list", metavar="LIST", help="a file of keys, sources or sha256, one a line; - is stdin")
    removing.add_argument("--ignore-unknown", action="store_true", help="lines that name no image are only counted")
    removing.add_argument("--force", action="store_true", help="also more than 5 %% of the set")
    add_set_verb(verbs, "compact", compact, "erase the bytes of removed images from a set, in place")
    asking = run_option(add_verb(verbs, "seen", seen, "whether a run has learnt from an image, and at which steps"))
    asking.add_argument("image", metavar="KEY", help="its key, the name of its source, or its sha256")
    site_option(asking)
    json_option(asking)


def remove(options: argparse.Namespace) -> int:
    from pathlib import Path

    from data_shards.errors import UserError
    from data_shards.index import ShardSet
    from data_shards.removed import remove as add
    from data_shards.store import Store

    use_keys(options.site)
    shards = ShardSet.open(Store(options.target))
    how = {"ignore_unknown": options.ignore_unknown, "force": options.force}
    path = Path("/dev/stdin" if options.list == "-" else options.list)
    try:
        with path.open(encoding="utf-8", errors="backslashreplace") as lines:  # as the tables write such names
            report = add(shards, lines, **how, progress=progress())
    except OSError as error:
        raise UserError(f"LIST={path}: {error.strerror}; give a file of keys, sources or sha256, one a line") from None
    say_found(options, report, [report.summary()])
    return 0


def compact(options: argparse.Namespace) -> int:
    from data_shards.compact import compact as erase
    from data_shards.store import Store

    use_keys(options.site)
    report = erase(Store(options.target), progress())
    say_found(options, report, [report.summary()])
    return 0


def seen(options: argparse.Namespace) -> int:
    from pipeline.seen import seen as look

    found = look(run_folder(options), options.image, progress())
    say_found(options, found, found.lines())
    return 0
