"""The program `farseer`: one verb for each make target. What a user can mend is one line on stderr and exit code 2.

Each verb imports what it needs when it is called, so that `farseer --help` is there at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from jobs.shard_verbs import shard_verbs
from jobs.verbs import add_verb, json_option, say, site_option, table

if TYPE_CHECKING:
    from jobs.runs import Status
    from pipeline.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run_verb(options)
    except UserError as error:
        sys.stderr.write(f"farseer: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # farseer logs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    root = argparse.ArgumentParser(prog="farseer", description="Train a vision model on unlabelled images, on SLURM.")
    verbs = root.add_subparsers(title="verbs", required=True, metavar="VERB")
    shard_verbs(verbs)
    _job_verbs(verbs)
    _result_verbs(verbs)
    options = add_verb(verbs, "demo", demo, "the whole product on this machine, in about six minutes")
    options.add_argument("--src", help="a folder of photographs of yours, in the place of the demo's")
    options.add_argument("--set", default="", help="overrides of conf/demo.yaml: 'train.steps=100'")
    options = add_verb(verbs, "cluster", cluster, "an S3 server and a SLURM on this machine: SITE=local")
    options.add_argument("action", choices=("up", "down", "status"))
    _supervise_options(add_verb(verbs, "supervise", supervise, argparse.SUPPRESS))
    return root


def _job_verbs(verbs: Any) -> None:
    plan_options(add_verb(verbs, "plan", plan, "show what a run would do: the resolved config, steps, memory"))
    options = _run_option(add_verb(verbs, "submit", submit, "check everything, then start a run or go on with it"))
    plan_options(options)
    options.add_argument("--force", action="store_true", help="go on under another config than the run began with")
    site_option(_run_option(add_verb(verbs, "resume", resume, "go on with a run that exists, under its own config")))
    options = add_verb(verbs, "status", status, "all runs: how far, how fast, what to look at")
    site_option(options)
    json_option(options)
    options = _run_option(add_verb(verbs, "logs", logs, "the logs of a run: what failed first, then all ranks"))
    site_option(options)
    options.add_argument("--follow", action="store_true", help="go on until the job is over")
    options.add_argument("--events", action="store_true", help="what happened to the run, a line each")
    options.add_argument("--lines", type=int, default=40, help="of each rank")
    options = _run_option(add_verb(verbs, "cancel", cancel, "stop a run after a last checkpoint"))
    site_option(options)
    options.add_argument("--now", action="store_true", help="without a last checkpoint")


def _result_verbs(verbs: Any) -> None:
    options = _run_option(add_verb(verbs, "checkpoints", checkpoints, "the checkpoints of a run in the store"))
    site_option(options)
    options.add_argument("--verify", action="store_true", help="read and hash every byte of them")
    json_option(options)
    evaluating = _run_option(add_verb(verbs, "evaluate", evaluate, "what the trunk of a run can do, beside baselines"))
    json_option(evaluating)
    reporting = _run_option(add_verb(verbs, "report", report, "evaluate a run and write its report, one page of HTML"))
    reporting.add_argument("--to", help="the page's file; by default var/report-<run>.html")
    for options in (evaluating, reporting):
        options.add_argument("bank", metavar="BANK", help="labelled shards to learn from: s3://bucket/folder")
        options.add_argument("held_out", metavar="HELD_OUT", help="labelled shards to ask about")
        site_option(options)


def plan_options(options: argparse.ArgumentParser) -> None:
    """What names a config and a site."""
    options.add_argument("config", metavar="CONF", help="a config file, such as conf/demo.yaml")
    options.add_argument("--set", default="", help="overrides: 'optim.lr=2.4 data.lanes=64'")
    site_option(options)


def plan(options: argparse.Namespace) -> int:
    from jobs.plan import describe
    from jobs.site import load_site

    site = load_site(options.site)
    site.activate()
    say(*describe(_config(options), site))
    return 0


def submit(options: argparse.Namespace) -> int:
    from jobs.site import load_site
    from jobs.submit import submit as start

    site = load_site(options.site)
    forced = " checkpoint.force=true" if options.force else ""
    return _submitted(start(_config(options, forced), site, options.name), site.name)


def resume(options: argparse.Namespace) -> int:
    from jobs.runs import Job
    from jobs.site import load_site
    from jobs.submit import submit as start
    from pipeline.config import load

    site = load_site(options.site)
    job = Job.of(site, options.name)
    return _submitted(start(load(job.run_dir / "config.yaml"), site, options.name), site.name)


def status(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from jobs.runs import statuses
    from jobs.site import load_site

    site = load_site(options.site)
    site.activate()
    found = statuses(site)
    if options.json:
        say(json.dumps([asdict(one) for one in found], indent=2))
    elif not found:
        say(f"no runs in {site.shared_dir}; make submit CONF=... RUN=... starts one")
    else:
        say(
            *table(
                ("RUN", "STATE", "STEP", "LOSS", "IMAGES/S", "WAIT", "SAVED", "STARTS", "LAST STEP"), map(_row, found)
            )
        )
    return 0


def logs(options: argparse.Namespace) -> int:
    from jobs import runs

    job = _job(options)
    if options.events:
        say(*(runs.sentence(event) for event in runs.history(job.run_dir)))
        return 0
    for failure in job.start.failures():
        say(f"{failure}", failure.trace)
    runs.show(job, options.lines, options.follow, sys.stdout)
    return 0


def cancel(options: argparse.Namespace) -> int:
    from jobs import runs

    job = _job(options)
    say(runs.cancel(job, options.now))
    return 0


def checkpoints(options: argparse.Namespace) -> int:
    from jobs.runs import stored_checkpoints

    job = _job(options)
    found = stored_checkpoints(job.store, options.verify)
    if options.json:
        say(json.dumps(found, indent=2))
    else:
        rows = ([row["name"], f"{row['bytes'] / 1e6:.1f} MB", row["state"]] for row in found)
        say(*table(("CHECKPOINT", "SIZE", "STATE"), rows))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from data_shards.store import Store
    from pipeline.evaluate.run import evaluate_run

    found = evaluate_run(Store(_job(options).store), options.bank, options.held_out)
    say(*([json.dumps(found.to_json(), indent=2)] if options.json else found.text()))
    return 0


def report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from data_shards.store import Store
    from jobs.site import ROOT
    from pipeline.evaluate.run import evaluate_run
    from pipeline.report.run import report_run

    store = Store(_job(options).store)
    page = Path(options.to) if options.to else ROOT / "var" / f"report-{options.name}.html"
    found = evaluate_run(store, options.bank, options.held_out)
    say(*found.text(), f"report: {report_run(store, options.bank, options.held_out, found, page)}")
    return 0


def demo(options: argparse.Namespace) -> int:
    from pathlib import Path

    from jobs.demo import demo as show

    show(Path(options.src).expanduser() if options.src else None, options.set)
    return 0


def cluster(options: argparse.Namespace) -> int:
    from jobs import cluster
    from jobs.site import LOCAL

    if options.action == "down":
        cluster.down(LOCAL.parent)
        say("down; what is stored stays until make clean")
    else:
        say(*(cluster.up if options.action == "up" else cluster.status)(LOCAL.parent))
    return 0


def supervise(options: argparse.Namespace) -> int:
    """Around the ranks, in the job itself (jobs.supervise)."""
    from data_shards.store import Store
    from jobs import local, slurm, supervise
    from jobs.start import Start

    start = Start.here()
    if options.when == "before":
        say(str(supervise.before(start)))
        return 0
    if options.when == "serve":
        return local.serve(
            options.store,
            options.ranks,
            options.gpus,
            options.time_limit_min,
            options.signal_delay_s,
            options.max_cycles,
        )
    decision = supervise.after(start, options.exit, Store(options.store), options.max_cycles)
    sys.stderr.write(f"farseer: {decision.action}: {decision.reason}\n")
    if decision.action == "requeue":
        slurm.requeue(start.job)
    return 2 if decision.action == "stop" else 0


def _supervise_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("when", choices=("before", "after", "serve"))
    options.add_argument("--store", default="")
    for name, default in (("exit", 0), ("ranks", 1), ("gpus", 0), ("time-limit-min", 60), ("signal-delay-s", 60)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--max-cycles", type=int, default=3)


def _run_option(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    options.add_argument("--run", required=True, dest="name", help="the run's name")
    return options


def _config(options: argparse.Namespace, more: str = "") -> "Config":
    from pipeline.config import load

    return load(options.config, options.set + more)


def _job(options: argparse.Namespace) -> Any:
    from jobs.runs import Job
    from jobs.site import load_site

    site = load_site(options.site)
    site.activate()
    return Job.of(site, options.name)


def _submitted(job: Any, site: str) -> int:
    where = "" if site == "local" else f" SITE={site}"
    say(
        f"job {job.id} is submitted; logs in {job.run_dir / 'logs'}",
        f"next: make logs RUN={job.run}{where} FOLLOW=1, make status{where}, make cancel RUN={job.run}{where}",
    )
    return 0


def _row(one: "Status") -> list[str]:
    def text(value: float | int | None, form: str = "{}") -> str:
        return "-" if value is None else form.format(value)

    step = text(one.step) + (f"/{one.steps}" if one.steps else "")
    return [
        one.run,
        one.state,
        step,
        text(one.loss, "{:.4f}"),
        text(one.images_s, "{:.1f}"),
        text(one.wait, "{:.0%}"),
        text(one.committed),
        str(one.starts),
        text(one.seconds_ago, "{:.0f} s ago"),
    ]


if __name__ == "__main__":
    sys.exit(main())
