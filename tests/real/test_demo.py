"""`make demo`, short: the same path from photographs to report, with fewer steps."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jobs import cluster
from jobs.cli import main
from jobs.demo import demo
from jobs.site import ROOT
from tests.conftest import kept_environment

pytestmark = [pytest.mark.slow(minutes=3), pytest.mark.timeout(600)]


def site_of(var: Path) -> Path:
    return var / "cluster" / "site.yaml"


@pytest.mark.skipif(not shutil.which("apt-get"), reason="the photographs come from Debian packages; no apt-get here")
def test_the_demo_preempts_resumes_evaluates_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs = ROOT / "var" / "photos"
    photographs.mkdir(parents=True, exist_ok=True)
    (tmp_path / "photos").symlink_to(photographs)  # downloaded once for all
    try:
        with kept_environment():
            figures = demo(overrides="train.steps=24 checkpoint.every_steps=6 monitor.wandb=disabled", var=tmp_path)
            *_, again, _, last = capsys.readouterr().out.splitlines()
            assert last.startswith("Shown in")
            ((conf, sets),) = re.findall(r'make submit CONF=(\S+) RUN=mine SET="(.*)"$', again)
            assert main(["plan", conf, "--set", sets, "--site", str(site_of(tmp_path))]) == 0
            run = json.loads(next((tmp_path / "jobs").glob("*/job.json")).read_text())["store"]
            assert (
                main(["export", "--run", run, "--site", str(site_of(tmp_path)), "--to", str(tmp_path / "export")]) == 0
            )
    finally:
        cluster.down(tmp_path / "cluster")
    assert figures.preempted
    assert figures.resumed_step is not None
    assert 12 <= figures.resumed_step < 24
    assert figures.steps == 24
    assert figures.refused == figures.planted_corrupt == 5
    assert json.loads((tmp_path / "demo.json").read_text())["loss"] == figures.loss
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "preempted" in page
    assert json.loads((tmp_path / "export" / "config.json").read_text())["farseer"]["step"] == 24
