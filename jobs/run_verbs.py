"""The verbs for runs: plan, submit, watch, stop. Each imports what it needs when it is called."""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from jobs.verbs import (
    above_zero,
    add_verb,
    duration,
    json_option,
    positive,
    say,
    say_found,
    site_option,
    table,
    use_keys,
)

if TYPE_CHECKING:
    from data_shards.store import Store
    from jobs.checkpoints import Stored
    from jobs.runs import Job, Status
    from jobs.site import Site
    from pipeline.config import Config

SAMPLE_BYTES = 120_000  # of a photograph 500 pixels wide
WATCH_S = 2.0
LOOK_WIDTH = 100  # letters
STORE_S = 30.0  # between two looks at the runs of other sites
NO_RUNS = "no runs in {}; make submit CONF=... RUN=... starts one, STORE=s3://bucket/folder shows those of a store"


def run_verbs(verbs: Any) -> None:
    options = _plan_options(add_verb(verbs, "plan", plan, "what a run would do and cost, and whether it can work"))
    options.add_argument("--run", default="run", dest="name", help="its name, for the batch script that is shown")
    options.add_argument("--images-per-s", type=above_zero, help="speed to assume; by default that of earlier runs")
    options.add_argument("--samples", type=positive, help="plan for a set of so many images, packed or not")
    options.add_argument("--sample-bytes", type=positive, help=f"of each of these, on average ({SAMPLE_BYTES:,})")
    json_option(options)
    options = run_option(add_verb(verbs, "submit", submit, "check everything, then start a run or go on with it"))
    _plan_options(options)
    options.add_argument("--force", action="store_true", help="go on under another config than the run began with")
    options.add_argument(
        "--from",
        dest="origin",
        help="begin with the weights of another run (name, or name@step), or with a trunk's: the url or path of a file "
        "(SEER's, timm's) or an export",
    )
    site_option(run_option(add_verb(verbs, "resume", resume, "go on with a run that exists, under its own config")))
    options = add_verb(verbs, "status", status, "all runs: how far, how fast, what to look at")
    options.add_argument("--run", default="", dest="names", help="these alone, by their names, with blanks between")
    site_option(options)
    json_option(options)
    options.add_argument("--watch", action="store_true", help="show it anew every two seconds")
    options.add_argument("--store", action="append", default=[], help="a folder of runs, such as s3://runs, to look at")
    options = add_verb(verbs, "doctor", doctor, "whether a site can do what a run asks of it: ok, or what to do")
    _plan_options(options)
    options.add_argument("--probe", action="store_true", help="look from the nodes too, by a short job")
    json_option(options)
    options = run_option(add_verb(verbs, "logs", logs, "the logs of a run: what failed first, then all ranks"))
    site_option(options)
    options.add_argument("--follow", action="store_true", help="go on until the job is over")
    options.add_argument("--events", action="store_true", help="what happened to the run, a sentence each")
    options.add_argument("--lines", type=positive, default=100, help="the last ones, of all ranks together")
    site_option(run_option(add_verb(verbs, "profile", profile, "what the next steps of a run spend their time on")))
    options = run_option(add_verb(verbs, "cancel", cancel, "stop a run after a last checkpoint"))
    site_option(options)
    options.add_argument("--now", action="store_true", help="without a last checkpoint")
    options = run_option(
        add_verb(verbs, "checkpoints", checkpoints, "the checkpoints of a run: how old, where, whole?")
    )
    site_option(options)
    options.add_argument("--verify", action="store_true", help="read and hash every byte of them")
    json_option(options)


def run_option(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    options.add_argument("--run", required=True, dest="name", help="the run's name")
    return options


def _plan_options(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What names a config and a site."""
    options.add_argument("config", metavar="CONF", help="a config file, such as conf/demo.yaml")
    options.add_argument("--set", default="", help="overrides: 'optim.lr=2.4 data.lanes=64'")
    site_option(options)
    return options


def plan(options: argparse.Namespace) -> int:
    from jobs.feasible import Assumed
    from jobs.plan import make_plan

    config, site = _config_and_site(options)
    site.activate()
    if options.sample_bytes and not options.samples:
        raise UserError("SAMPLE_BYTES= is of the images that SAMPLES= counts; give both")
    assumed = Assumed(options.samples, options.sample_bytes or SAMPLE_BYTES) if options.samples else None
    made = make_plan(config, site, options.name, options.images_per_s, assumed)
    say_found(options, made.to_json(), made.text())
    return 0


def submit(options: argparse.Namespace) -> int:
    from jobs.submit import submit as start

    config, site = _config_and_site(options, " checkpoint.force=true" if options.force else "")
    return _submitted(start(config, site, options.name, origin=options.origin))


def resume(options: argparse.Namespace) -> int:
    from jobs.runs import Job
    from jobs.site import load_site
    from jobs.submit import submit as start
    from pipeline.config import load

    site = load_site(options.site)
    job = Job.of(site, options.name)
    return _submitted(start(load(job.run_dir / "config.yaml"), site, options.name))


def status(options: argparse.Namespace) -> int:
    from jobs.elsewhere import elsewhere, stores_of
    from jobs.runs import Job, statuses
    from jobs.site import load_site

    site = load_site(options.site)
    site.activate()
    names, asked, others, complaints = options.names.split(), -STORE_S, list["Status"](), list[str]()
    for name in names:
        Job.of(site, name)  # refuses one that is not there
    while True:
        own = statuses(site, names)
        if not names and time.monotonic() - asked >= STORE_S:
            others, complaints = elsewhere(own, options.store or stores_of(own))
            asked = time.monotonic()
        found = [*own, *others]
        lines = table(HEAD, map(_row, found)) if found else [NO_RUNS.format(site.shared_dir)]
        if options.json or not options.watch:
            say_found(options, found, lines)
            sys.stderr.write("".join(f"{line}\n" for line in complaints))
            return 0
        say("\x1b[H\x1b[2J" + f"{time.strftime('%H:%M:%S')}, {len(found)} runs", *lines, *complaints)
        time.sleep(WATCH_S)


def doctor(options: argparse.Namespace) -> int:
    """Exit code 1 when a run would not work there."""
    from jobs.doctor import examine

    config, site = _config_and_site(options)
    site.activate()
    found = examine(site, config.store, [source.url for source in config.data.sets], options.probe)
    say_found(options, found, (one.line() for one in found))
    return 1 if any(one.ok is False for one in found) else 0


def logs(options: argparse.Namespace) -> int:
    from jobs.logs import sentence, show, what_failed
    from jobs.runs import history

    job = newest_job(options)
    if options.events:
        say(*map(sentence, history(job.run_dir)))
        return 0
    say(*what_failed(job))
    show(job, options.lines, options.follow, sys.stdout)
    return 0


def profile(options: argparse.Namespace) -> int:
    from jobs.profile import profile as look

    job = newest_job(options)
    say(f"the first rank of job {job.id} is asked to look at its next steps; Ctrl-C asks no longer")
    table, trace = look(job)
    say(table.read_text(), f"{trace}: ui.perfetto.dev shows it")
    return 0


def cancel(options: argparse.Namespace) -> int:
    from jobs import runs

    say(runs.cancel(newest_job(options), options.now))
    return 0


def checkpoints(options: argparse.Namespace) -> int:
    """Exit code 1 when one is damaged."""
    from jobs.checkpoints import checkpoints as find

    found = find(newest_job(options), options.verify)
    damage = [one.damage for one in found if one.damage]
    lines = table(("STEP", "ATTEMPT", "AGE", "BYTES", "STATE", "WHERE"), map(_checkpoint_row, found))
    say_found(options, found, [*lines, *damage])
    return 1 if damage else 0


def newest_job(options: argparse.Namespace) -> "Job":
    """The newest job of the run that the options name, its site's environment set."""
    from jobs.runs import Job
    from jobs.site import load_site

    site = load_site(options.site)
    site.activate()
    return Job.of(site, options.name)


def run_folder(options: argparse.Namespace) -> "Store":
    """The folder of the run in the store. The run is a name that the site knows, or that folder's url."""
    from data_shards.store import Store

    if "://" not in options.name:
        return Store(newest_job(options).store)
    use_keys(None if options.site == "local" else options.site)  # another machine may have trained it, and this none
    return Store(options.name)


def _config_and_site(options: argparse.Namespace, more: str = "") -> "tuple[Config, Site]":
    """Both, or the mistakes of both."""
    from jobs.reasons import Reasons
    from jobs.site import load_site
    from pipeline.config import load

    reasons = Reasons()
    site = reasons.ask(lambda: load_site(options.site))
    config = reasons.ask(lambda: load(options.config, options.set + more))
    reasons.refuse()
    assert config is not None
    assert site is not None
    return config, site


def _submitted(job: "Job") -> int:
    say(
        f"job {job.id} is submitted; logs in {job.run_dir / 'logs'}",
        f"next: {job.make('logs')} FOLLOW=1, make status{job.option}, {job.make('cancel')}",
    )
    return 0


HEAD = ("RUN", "STATE", "STEP", "LOSS", "IMAGES/S", "WAIT", "LEFT", "SAVED", "AT RISK", "RESTARTS", "LOST", "GOODPUT",
        "NODES", "LOOK")  # fmt: skip


def _row(one: "Status") -> list[str]:
    def text(value: float | int | None, form: str = "{}") -> str:
        return "-" if value is None else form.format(value)

    good = one.goodput
    saved = f"{one.committed}, {_span(one.committed_ago_s)} ago" if one.committed_ago_s is not None else None
    return [
        one.run,
        one.state.partition(" (")[0],
        text(one.step) + (f"/{one.steps}" if one.steps else ""),
        text(one.loss, "{:.4f}"),
        text(one.images_s, "{:,.1f}"),
        text(one.wait, "{:.0%}"),
        _span(one.left_s),
        saved or text(one.committed),
        text(one.at_risk, "{:,}"),
        text(good.restarts if good else None),
        text(good.lost_steps if good else None),
        text(good.share if good else None, "{:.0%}"),
        one.nodes or "-",
        _short(one.look),
    ]


def _short(look: str) -> str:
    """Where to look, as wide as a table takes: of a long reason the beginning, and the command to type whole."""
    reason, make, command = look.rpartition("make ") if "make " in look else (look, "", "")
    room = max(LOOK_WIDTH // 3, LOOK_WIDTH - len(f" ... {make}{command}"))
    cut = len(look) > LOOK_WIDTH and len(reason) > room
    return f"{reason[:room]} ... {make}{command}".rstrip() if cut else look


def _checkpoint_row(one: "Stored") -> Iterator[str]:
    yield from (f"{one.step:,}", str(one.attempt), _span(one.age_s), f"{one.bytes / 1e6:,.1f} MB", one.state, one.where)


def _span(seconds: float | None) -> str:
    return "-" if seconds is None else duration(max(seconds, 0.0))
