"""`farseer evaluate` here, without SLURM: a table, no work twice, values for scripts, errors in a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_shards.store import Denied, Unavailable
from jobs.cli import main
from tests.pipeline.evaluate.sets import labelled
from tests.pipeline.test_export import a_run


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    run, _ = a_run(tmp_path, 3, 6)
    bank, held_out = (shards.store.url for shards in labelled(tmp_path, 60))
    site = tmp_path / "site.yaml"
    site.write_text(f"executor: local\nshared_dir: {tmp_path}/shared\n")
    return ["evaluate", "--run", run.url, "--site", str(site), "--size", "32", bank, held_out]


@pytest.mark.slow
def test_a_run_is_evaluated_once_a_step_and_shown_beside_its_other_steps(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert "40 images of" in said[0]
    assert [line.split()[0] for line in said[1:]] == ["step", "6"]
    score = next(tmp_path.glob("runs/first/eval/step-000000006/score-*.json"))
    written = score.stat().st_mtime_ns
    assert not list(tmp_path.glob("runs/first/eval/step-*/features-*/*"))

    assert main([*command, "--step", "3", "--workers", "4"]) == 0  # a site without SLURM does it itself
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["step", "3", "6"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(score.read_text())
    assert score.stat().st_mtime_ns == written


def test_features_stay_when_that_is_asked_for(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--keep-features"]) == 0
    kept = sorted(path.name for path in tmp_path.glob("runs/first/eval/step-000000006/features-*/*"))
    assert kept[:4] == ["00000.safetensors", "00000.safetensors", "about.json", "about.json"]
    assert [name.partition("-")[0] for name in kept[4:]] == ["keep", "keep"]


def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--step", "4"]) == 2
    assert main([*command[:-1], "file:///nowhere"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "no checkpoint of step 4; there are 3, 6" in said[0]
    assert "/nowhere: no MANIFEST.json, so no shard set" in said[1]


def test_a_run_in_the_store_needs_no_site(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.site.LOCAL", tmp_path / "no-cluster-here.yaml")
    at = command.index("--site")
    assert main([*command[:at], *command[at + 2 :]]) == 0
    assert "40 images of" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--workers", "--size", "--every", "--step"])
@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_a_number_that_means_nothing_is_refused(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--run", "first", "s3://bank", "s3://held-out", f"{option}={number}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"farseer: argument {option}: '{number}' is no whole number above 0; make help, or farseer ")
    assert said.count("\n") == 1


def test_a_dashboard_that_is_watched_outlives_a_store_that_is_away_and_its_beginning_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "here.yaml"
    site.write_text(f"shared_dir: {tmp_path}/shared\nexecutor: local\n")
    looks: list[str | None] = [None, "no answer", "no answer, again", "denied"]

    def briefs(_: Any, __: Any, ___: Any, readers: dict[str, Any]) -> tuple[list[Any], list[str]]:
        readers["run"] = None
        if (look := looks.pop(0)) is None:
            return [], ["a line"]
        raise (Denied if look == "denied" else Unavailable)(look)

    monkeypatch.setattr("jobs.dashboard.briefs", briefs)
    monkeypatch.setattr("jobs.result_verbs.WATCH_S", 0)
    monkeypatch.setattr("pipeline.report.dashboard.write_dashboard", lambda *_: None)
    command = ["dashboard", "--site", str(site), "--to", str(tmp_path / "page.html")]
    assert main([*command, "--watch"]) == 2
    assert looks == []
    said = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("farseer: ") for line in said] == [
        "a line",
        "no answer; looking again",
        "no answer, again; looking again",
        "denied",
    ]
    looks.append("no answer")
    assert main(command) == 2
