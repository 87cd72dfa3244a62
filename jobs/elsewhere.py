"""Runs that a store has and this site does not know: submitted at another site, or by someone else.

The store hears of a run with each checkpoint and every half minute; what is shown is as old as that. Where such a run
is queued, and its logs, only its own site tells.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from data_shards.errors import UserError
from data_shards.store import Store
from jobs.runs import READERS, Row, Status, summary, troubled
from jobs.verbs import duration
from pipeline.journal import newest_events, newest_rows

PATIENCE_S = 5.0  # for a store that does not answer: status is looked at, not waited for
ENDS = ("finished", "cancelled", "failed")
BEGINS = ("submitted", "requeued", "started", "resumed")


def stores_of(known: Sequence[Status]) -> list[str]:
    """The folders of all runs in which these runs lie."""
    return sorted({one.store.rpartition("/")[0] for one in known if one.store})


def elsewhere(known: Sequence[Status], stores: Iterable[str]) -> tuple[list[Status], list[str]]:
    """The runs of these stores that are none of the site's, which are known, and a line for each store that is away."""
    own = {one.store for one in known}
    found, complaints = list[Status](), list[str]()
    with ThreadPoolExecutor(READERS) as pool:
        for url in stores:
            try:
                store = Store(url, retry_seconds=PATIENCE_S)
                others = [store.at(name) for name in store.folders() if f"{store.url}/{name}" not in own]
                found += [status for status in pool.map(status_in, others) if status is not None]
            except UserError as error:
                complaints.append(f"runs of other sites are not shown: {error}")
    return sorted(found, key=lambda status: status.run), complaints


def status_in(store: Store) -> Status | None:
    """What its folder in the store says of a run; None for a folder that is none."""
    told, attempts = newest_events(store)
    if not told:
        return None
    last = next((event["event"] for event in reversed(told) if event["event"] in (*ENDS, *BEGINS)), "")
    words = last if last in ENDS else "elsewhere"
    job = next((str(event["job"]) for event in reversed(told) if "job" in event), "")
    found = summary(
        store.url.rpartition("/")[2], store.url, words, told, newest_rows(store, attempts), job=job, nodes="elsewhere"
    )
    return replace(found, starts=len(attempts), look=_where_to_look(found, told))


def _where_to_look(one: Status, told: Sequence[Row]) -> str:
    if one.state == "failed":
        return next(str(event["reason"]) for event in reversed(told) if event["event"] == "failed")
    if one.state in ENDS:
        return ""
    seconds = min(filter(None, (one.seconds_ago, one.committed_ago_s)), default=None)
    heard = "it has not told of a step" if seconds is None else f"last heard of {duration(seconds)} ago"
    return "; ".join(filter(None, (troubled(told), heard)))
