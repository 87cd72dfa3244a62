"""The program `farseer`: one verb for each make target. What a user can mend is one line on stderr and exit code 2.

Each verb imports what it needs when it is called, so that `farseer --help` is there at once.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from data_shards.errors import UserError
from jobs.config_verb import config_verb
from jobs.result_verbs import result_verbs
from jobs.run_verbs import run_verbs
from jobs.shard_verbs import shard_verbs
from jobs.verbs import Parser, add_verb, positive, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # logs and names hold what a terminal may not have
    try:
        options = parser().parse_args(arguments)
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
    root = Parser(prog="farseer", description="Train a vision model on unlabelled images, on SLURM.")
    verbs = root.add_subparsers(title="verbs", required=True, metavar="VERB")
    shard_verbs(verbs)
    config_verb(verbs)
    run_verbs(verbs)
    result_verbs(verbs)
    options = add_verb(verbs, "demo", demo, "the whole product on this machine, in about six minutes")
    options.add_argument("--src", help="a folder of photographs of yours, in the place of the demo's")
    options.add_argument("--set", default="", help="overrides of conf/demo.yaml: 'train.steps=100'")
    options = add_verb(verbs, "cluster", cluster, "an S3 server and a SLURM on this machine: SITE=local")
    options.add_argument("action", choices=("up", "down", "status"))
    options = add_verb(verbs, "chaos", chaos, "faults against short real runs here: do all end as the undisturbed one?")
    options.add_argument("--trials", type=positive, default=5)
    options.add_argument("--seed", type=int, default=0, help="of the faults and their moments")
    options.add_argument("--fault", action="append", default=[], help="draw among these only; may be given again")
    _supervise_options(add_verb(verbs, "supervise", supervise, argparse.SUPPRESS))
    return root


def demo(options: argparse.Namespace) -> int:
    from pathlib import Path

    from jobs.demo import demo as show

    show(Path(options.src).expanduser() if options.src else None, options.set)
    return 0


def cluster(options: argparse.Namespace) -> int:
    from jobs import cluster
    from jobs.site import LOCAL, ROOT

    if options.action == "up":
        say(*cluster.up(LOCAL.parent), "up; make cluster-down ends it")
    elif options.action == "down":
        cluster.down(LOCAL.parent)
        if (left := ROOT / "var" / "chaos").is_dir():  # by a campaign that was killed
            from jobs.chaos.campaign import down

            down(left)
        say("down; what is stored stays until make clean")
    else:
        say(*cluster.status(LOCAL.parent))
    return 0


def chaos(options: argparse.Namespace) -> int:
    """Exit code 1 when a run did not end as the undisturbed one."""
    from jobs.chaos.campaign import campaign, table
    from jobs.site import ROOT

    for number in (signal.SIGTERM, signal.SIGHUP):  # of a terminal that is closed; nohup has it ignored
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # on the way out the cluster is stopped
    rows = campaign(ROOT / "var", options.trials, options.seed, options.fault, say)
    say("", *table(rows))
    return 0 if all(row.equal for row in rows) else 1


def supervise(options: argparse.Namespace) -> int:
    """Around the ranks, in the job itself (jobs.supervise)."""
    from data_shards.store import Store
    from jobs import blame, local, slurm, supervise
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
    if options.setup:
        start.fail(0, supervise.SetupFailed(options.setup, options.exit))
    store = Store(options.store, retry_seconds=supervise.STORE_S)
    decision = supervise.after(start, options.exit, store, options.max_cycles)
    sys.stderr.write(f"farseer: {decision.action}: {decision.reason}\n")
    if decision.action == "requeue":
        hosts: list[str] = []
        with contextlib.suppress(Exception):  # whatever other users have put there, the run goes on
            hosts = blame.excluded(start.run_dir.parent, options.exclude_hours)
        try:
            slurm.requeue_without(start.job, hosts, list(filter(None, [options.exclude])), options.constraint)
        except slurm.NotInstalled:
            return supervise.BY_THE_SHELL
        except UserError as error:
            start.note("failed", reason=f"{decision.reason}; it is not started again: {error}")
            raise
    return 2 if decision.action == "stop" else 0


def _supervise_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("when", choices=("before", "after", "serve"))
    options.add_argument("--store", default="")
    for name, default in (("exit", 0), ("ranks", 1), ("gpus", 0), ("time-limit-min", 60), ("signal-delay-s", 60)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--setup", help="the command of the site's setup that has failed, so that no rank was started")
    options.add_argument("--max-cycles", type=int, default=3)
    options.add_argument("--exclude-hours", type=float, default=12.0)
    options.add_argument("--exclude", help="hosts that the site keeps its jobs off")
    options.add_argument("--constraint", help="what the job's nodes must have")


if __name__ == "__main__":
    sys.exit(main())
