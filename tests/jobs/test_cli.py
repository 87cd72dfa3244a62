import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.daemons import Process
from jobs.run_verbs import _short
from jobs.runs import Job
from jobs.site import ROOT
from jobs.verbs import output_file


@pytest.fixture
def site(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(f"shared_dir: {tmp_path / 'shared'}\nexecutor: local\n")
    return str(path)


def refused(capsys) -> str:
    """The one line that a refusal wrote."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("farseer: ")
    assert said.err.count("\n") == 1, said.err
    return str(said.err)


@pytest.mark.slow
def test_to_plan_and_to_submit_takes_no_lightning():
    """Which takes as long to import as torch itself, and trains."""
    code = "import sys, jobs.plan, jobs.submit; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_help_names_the_verbs_and_does_not_import_torch():
    code = "import sys; from jobs.cli import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for verb in ("plan", "submit", "resume", "status", "logs", "cancel", "checkpoints"):
        assert f"\n    {verb} " in done.stdout or f"\n    {verb}\n" in done.stdout
    assert "supervise" not in done.stdout.split("verbs:")[1]


@pytest.mark.parametrize("verb", ["logs", "cancel", "resume", "checkpoints"])
def test_a_run_that_does_not_exist_is_one_line_and_exit_code_2(verb, site, capsys):
    assert main([verb, "--run", "nope", "--site", site]) == 2
    assert "RUN=nope: no such run" in refused(capsys)


def test_a_site_that_does_not_exist_is_one_line_and_exit_code_2(capsys):
    assert main(["status", "--site", "nope"]) == 2
    assert "SITE=nope: no such site" in refused(capsys)


def test_what_to_type_next_names_the_site_as_it_was_named(site, capsys, monkeypatch):
    job = Job("first", Path("/shared/first"), "file:///runs/first", "7")
    monkeypatch.setattr("jobs.submit.submit", lambda _, site, *__, **___: replace(job, option=site.option))
    config = str(ROOT / "conf" / "demo.yaml")
    assert main(["submit", config, "--run", "first", "--site", site]) == 0
    assert f"make logs RUN=first SITE={site} FOLLOW=1, make status SITE={site}, make" in capsys.readouterr().out


def test_status_without_runs_says_how_to_start_one(site, capsys):
    assert main(["status", "--site", site]) == 0
    assert "make submit CONF=... RUN=..." in capsys.readouterr().out


def test_status_is_a_table_for_people_and_json_for_scripts(site, tmp_path, capsys):
    (tmp_path / "shared" / "first").mkdir(parents=True)
    store = f"file://{tmp_path}/runs/first"
    Job("first", tmp_path / "shared" / "first", store, "local-1", Process(1, -1)).save()
    assert main(["status", "--site", site]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["RUN", "STATE", "STEP", "LOSS", "IMAGES/S"]
    assert row.startswith("first  ended without a word")
    assert row.endswith(f"  make resume RUN=first SITE={site} goes on")
    assert main(["status", "--site", site, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["run"] == "first"


def test_what_a_store_does_not_tell_is_said_beside_the_json_too(site, capsys):
    assert main(["status", "--site", site, "--json", "--store", "s3:///nothing"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == []
    assert said.err.startswith("runs of other sites are not shown: s3:///nothing: ")


def test_a_log_is_shown_on_a_terminal_that_has_not_all_of_its_characters(site, tmp_path, monkeypatch):
    logs = tmp_path / "shared" / "first" / "logs"
    logs.mkdir(parents=True)
    (logs / "local.log").write_text("half \N{BLACK LARGE SQUARE} done\n", encoding="utf-8")
    Job("first", logs.parent, "file:///x", "local-1", Process(1, -1)).save()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="iso-8859-1"))
    assert main(["logs", "--run", "first", "--site", site]) == 0
    assert written.getvalue() == b"job| half ? done\n"


def test_of_a_long_reason_the_beginning_is_shown_and_the_command_whole():
    assert _short("a reason; make logs RUN=first") == "a reason; make logs RUN=first"
    assert _short(f"{'x' * 200}; make logs RUN=first") == f"{'x' * 76} ... make logs RUN=first"
    assert _short(command := f"make resume RUN=first SITE=/{'x' * 100}.yaml goes on") == command
    assert _short("x" * 200) == f"{'x' * 95} ..."
    assert _short("") == ""


def test_a_page_goes_to_the_file_that_is_named_or_under_its_own_name_into_a_folder(tmp_path):
    assert output_file(str(tmp_path), "preview-set.html") == tmp_path / "preview-set.html"
    assert output_file(str(tmp_path / "page.html"), "preview-set.html") == tmp_path / "page.html"
    assert output_file(None, "verify/set.txt") == ROOT / "var" / "verify" / "set.txt"
