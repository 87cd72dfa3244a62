"""The verbs for what came of a run, from evaluate to sync; each imports what it needs when called."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from jobs.run_verbs import newest_job, run_folder, run_option
from jobs.verbs import (
    ProgressLine,
    add_verb,
    complain,
    json_option,
    output,
    output_file,
    positive,
    say,
    say_found,
    site_option,
)

if TYPE_CHECKING:
    from jobs.site import Site
    from pipeline.report.rows import RowReader

WATCH_S = 30  # between two pages of a dashboard


def result_verbs(verbs: Any) -> None:
    evaluating = run_option(
        add_verb(verbs, "evaluate", evaluate, "how well a frozen trunk tells labelled images apart")
    )
    evaluating.add_argument("--step", type=positive, help="of the checkpoint; by default the newest that is whole")
    evaluating.add_argument("--size", type=positive, help="of the images, in pixels; by default the largest crops'")
    evaluating.add_argument("--workers", type=positive, help="tasks of SLURM, a GPU each; without it all is done here")
    evaluating.add_argument(
        "--every", type=positive, help="again with each checkpoint so many steps later, to the run's end"
    )
    evaluating.add_argument("--keep-features", action="store_true", help="leave them in the run's folder, under eval/")
    json_option(evaluating)
    reporting = run_option(add_verb(verbs, "report", report, "evaluate a run and write its report, one page of HTML"))
    reporting.add_argument("--to", help="the page's file; by default var/report-<run>.html")
    for options in (evaluating, reporting):
        options.add_argument("bank", metavar="BANK", help="labelled shards to learn from: s3://bucket/folder")
        options.add_argument("held_out", metavar="HELD_OUT", help="labelled shards to ask about")
        site_option(options)
    options = run_option(add_verb(verbs, "export", export, "the trunk of a run as a folder that timm reads"))
    options.add_argument("--step", type=positive, help="of the checkpoint; by default the newest that is whole")
    options.add_argument("--to", help="s3://bucket/folder, or a folder here; by default var/export/<run>")
    site_option(options)
    json_option(options)

    options = add_verb(verbs, "dashboard", dashboard, "one page of several runs: curves, scores, how they differ")
    options.add_argument(
        "--run", default="", dest="names", help="names, or urls of runs' folders; else the newest runs"
    )
    options.add_argument("--store", action="append", default=[], help="a folder of runs, such as s3://runs, to look at")
    options.add_argument("--to", help="the page's file; by default var/dashboard.html")
    options.add_argument("--watch", action="store_true", help=f"write it anew every {WATCH_S} s")
    site_option(options)

    options = run_option(add_verb(verbs, "replay", replay, "what a run saw at a step: its images and crops, one page"))
    options.add_argument("--step", type=int, required=True, help="as the rows of metrics count, from 1")
    options.add_argument("--to", help="the page's file; by default var/replay-<run>-<step>.html")
    options.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="that makes the crops")
    site_option(options)
    site_option(run_option(add_verb(verbs, "sync", sync, "send to W&B what it has not got of a run")))


def evaluate(options: argparse.Namespace) -> int:
    from jobs.evaluating import Question
    from jobs.site import load_site
    from pipeline.evaluate.score import lines

    if options.every and ("://" in options.name or options.step):
        raise UserError("EVERY= follows a run that its site knows by name, from its newest checkpoint on: no STEP=")
    run, sets = run_folder(options), (options.bank, options.held_out)
    asked = Question(
        run,
        *sets,
        load_site(options.site) if options.workers else None,
        _wandb_folder(options),
        options.size,
        options.workers,
        options.keep_features,
    )
    followed = asked.follow(lambda: newest_job(options), options.every, ProgressLine()) if options.every else None
    for exam, score in followed or [asked.answer(options.step, ProgressLine())]:
        say_found(options, score, lines(score, exam.history()))
    return 0


def _wandb_folder(options: argparse.Namespace) -> Path:
    """The run's own, where `sync` looks; of a run that another site knows, one here."""
    return output(None, f"evaluate/{_name(options)}") if "://" in options.name else newest_job(options).run_dir


def report(options: argparse.Namespace) -> int:
    from pipeline.evaluate.run import evaluate_run, open_tiles
    from pipeline.report.run import report_run

    store = run_folder(options)
    page = output_file(options.to, f"report-{_name(options)}.html")
    bank, held_out = open_tiles(options.bank), open_tiles(options.held_out)
    found = evaluate_run(store, bank, held_out)
    say(*found.text(), f"report: {report_run(store, bank, held_out, found, page)}")
    return 0


def export(options: argparse.Namespace) -> int:
    from data_shards.store import Store
    from pipeline.export import export_run

    to = options.to or str(output(None, f"export/{_name(options)}"))
    target = Store(to if "://" in to else f"file://{Path(to).expanduser().absolute()}")
    found = export_run(run_folder(options), target, options.step)
    say_found(options, found, found.lines())
    return 0


def dashboard(options: argparse.Namespace) -> int:
    from jobs.site import load_site
    from pipeline.report.rows import RowReader

    site, page = load_site(options.site), output_file(options.to, "dashboard.html")
    site.activate()
    readers = dict[str, RowReader]()
    while True:
        try:
            _write_dashboard(options, site, page, readers)
        except UserError as error:
            if not (options.watch and error.passing and readers):
                raise
            complain(f"{error}; looking again")
        if not options.watch:
            return 0
        time.sleep(WATCH_S)


def _write_dashboard(options: argparse.Namespace, site: "Site", page: Path, readers: "dict[str, RowReader]") -> None:
    from jobs.dashboard import briefs
    from pipeline.report.dashboard import write_dashboard
    from pipeline.report.figures import times

    found, complaints = briefs(site, options.names.split(), options.store, readers)
    if not found and not complaints:
        raise UserError(f"no runs in {site.shared_dir} yet; make submit starts one")
    write_dashboard(page, found, time.time(), WATCH_S if options.watch else None)
    say(f"{time.strftime('%H:%M:%S')} dashboard of {times(len(found), 'run')}: {page}")
    for line in complaints:
        complain(line)


def replay(options: argparse.Namespace) -> int:
    """Exit code 1 when the step's images or crops are not those of its row."""
    from pipeline.replay import replay as again
    from pipeline.report.replay_page import write_replay

    page = output_file(options.to, f"replay-{_name(options)}-{options.step}.html")
    found = again(run_folder(options), options.step, options.device, ProgressLine())
    write_replay(page, found)
    say(*found.lines(), f"page: {page}")
    return 1 if found.same_batch is False or found.same_crops is False else 0


def sync(options: argparse.Namespace) -> int:
    from jobs.wandb_sync import send
    from pipeline.report.figures import listed, times

    starts, rows = send(newest_job(options))
    sent = [times(starts, "start") + " recorded offline"] * bool(starts) + [times(rows, "missed row")] * bool(rows)
    say(f"{listed(sent)} sent" if sent else "W&B has all of it")
    return 0


def _name(options: argparse.Namespace) -> str:
    return str(options.name).rstrip("/").rpartition("/")[2]
