"""Which runs a dashboard shows, and whence it has what it shows of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_shards.errors import UserError
from data_shards.store import Store
from jobs import runs
from jobs.cli import main
from jobs.daemons import Process
from jobs.dashboard import briefs
from jobs.runs import Job
from jobs.site import Site
from pipeline.config import Config
from pipeline.report.rows import RowReader
from tests.pipeline.report.test_dashboard import score
from tests.pipeline.test_report import metrics

CONFIG = Config.model_validate(
    {"data": {"url": "s3://shards/x", "batch": 64, "lanes": 2}, "train": {"steps": 90}}
).dump()


@pytest.fixture(autouse=True)
def no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.slurm, "queue", lambda names: [])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(shared_dir=str(tmp_path / "shared"))


def at(row: dict[str, Any], time: float) -> dict[str, Any]:
    return {"result": {"grad_norm": 1.0, **row["result"]}, "run": {**row["run"], "time": time}}


def written(steps: int, time: float) -> tuple[str, str]:
    """Rows and events of a first attempt, whose last step was at that time."""
    lines = [json.dumps(at(row, time)) + "\n" for row in metrics(steps, steps)]
    event = {"time": time - 60, "attempt": 1, "event": "started", "step": 0, "steps": 90, "ranks": 2}
    return "".join(lines), json.dumps(event) + "\n"


def on_disk(site: Site, name: str, steps: int = 30, time: float = 1.8e9, attempt: int = 1) -> Job:
    """A run of the site, of which the store has nothing."""
    folder = Path(site.shared_dir) / name
    (folder / f"a{attempt:02d}").mkdir(parents=True)
    metrics, events = written(steps, time)
    (folder / f"a{attempt:02d}" / "metrics.jsonl").write_text(metrics)
    (folder / f"a{attempt:02d}" / "events.jsonl").write_text(events)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    job = Job(name, folder, f"file://{Path(site.shared_dir).parent}/store/{name}", "42")
    job.save()
    return job


def in_store(url: str, steps: int = 40, time: float = 1.8e9) -> Store:
    store = Store(url)
    metrics, events = written(steps, time)
    store.put("metrics/a01-000001.jsonl", metrics.encode())
    store.put("events/a01-000001.jsonl", events.encode())
    store.put("config.yaml", yaml.safe_dump(CONFIG).encode())
    return store


def test_a_run_of_the_site_is_read_from_its_disk_and_its_scores_from_the_store(site: Site) -> None:
    job = on_disk(site, "first")
    Store(job.store).put("eval/step-000000030/score-ab.json", json.dumps(asdict(score(30, 0.4))).encode())
    ((found,), complaints) = briefs(site, ["first"], [], {})
    assert (found.run, found.done, found.figures[0]) == ("first", 30, "30 of 90")
    assert found.config["train.steps"] == 90
    assert [one.step for one in found.scores] == [30]
    assert "training begins, to step 90, on 2 ranks" in found.happened[0]
    assert complaints == []


def test_a_page_that_is_made_again_shows_the_rows_that_came_meanwhile(site: Site) -> None:
    job = on_disk(site, "first", steps=30)
    readers: dict[str, RowReader] = {}
    assert [one.done for one in briefs(site, ["first"], [], readers)[0]] == [30]
    with (job.run_dir / "a01" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(at(metrics(31, 31)[-1], 1.8e9)) + "\n")
    ((found,), _) = briefs(site, ["first"], [], readers)
    assert (found.done, found.figures[0], len(found.curves["Loss"][0])) == (31, "31 of 90", 31)


def test_a_run_that_was_partly_made_elsewhere_is_read_from_the_store(site: Site) -> None:
    job = on_disk(site, "moved", steps=5, attempt=2)
    in_store(job.store, steps=40)
    ((found,), _) = briefs(site, ["moved"], [], {})
    assert found.done == 40


def test_runs_are_shown_in_the_order_of_their_names_as_given_also_by_their_urls(site: Site, tmp_path: Path) -> None:
    on_disk(site, "a")
    other = in_store(f"file://{tmp_path}/others/b").url
    assert [one.run for one in briefs(site, [other, "a"], [], {})[0]] == ["b", "a"]


def test_without_names_those_last_heard_of_are_shown_also_of_other_sites(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.dashboard.MOST_RUNS", 3)
    for n in range(3):
        on_disk(site, f"mine{n}", time=1.7e9 + n)
    in_store(f"file://{tmp_path}/store/theirs", time=1.7e9 + 1.5)  # beside the site's own runs
    assert [one.run for one in briefs(site, [], [], {})[0]] == ["mine2", "theirs", "mine1"]
    in_store(f"file://{tmp_path}/far/there", time=1.7e9 + 9)
    assert [one.run for one in briefs(site, [], [f"file://{tmp_path}/far"], {})[0]] == ["there", "mine2", "mine1"]


def test_what_cannot_be_read_is_said_and_the_others_are_shown(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk(site, "good")
    odd = on_disk(site, "odd")
    (odd.run_dir / "config.yaml").write_text("no: such\n")

    def refuses(*_: object) -> None:
        raise UserError("the store is away")

    monkeypatch.setattr("jobs.dashboard.read_scores", refuses)
    found, complaints = briefs(site, ["odd", "good"], [], {})
    assert [one.run for one in found] == ["good"]
    assert "evaluations of good are not shown: the store is away" in complaints
    assert any(line.startswith("odd is not shown: ") and "config.yaml" in line for line in complaints)


def test_a_local_run_of_another_machine_is_shown_though_nobody_here_knows_its_state(site: Site) -> None:
    job = on_disk(site, "far")
    replace(job, process=Process(1, 1), host="another-machine").save()
    ((found,), _) = briefs(site, ["far"], [], {})
    assert (found.state, found.done) == ("unknown", 30)
    assert "started on another-machine" in found.look
    assert [one.run for one in briefs(site, [], [], {})[0]] == ["far"]


def test_a_name_without_a_run_is_refused(site: Site, tmp_path: Path) -> None:
    on_disk(site, "a")
    with pytest.raises(UserError, match=r"RUN=b: no such run in .*; there are: a"):
        briefs(site, ["a", "b"], [], {})
    with pytest.raises(UserError, match=r"RUN=file:.*/nothing: no run's folder"):
        briefs(site, [f"file://{tmp_path}/nothing"], [], {})


def test_the_command_writes_the_page_and_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(f"executor: local\nshared_dir: {tmp_path}/shared\n")
    command = ["dashboard", "--site", str(file), "--to", str(tmp_path / "pages" / "d.html")]
    assert main(command) == 2
    assert capsys.readouterr().err == f"farseer: no runs in {tmp_path}/shared yet; make submit starts one\n"
    site = Site(executor="local", shared_dir=str(tmp_path / "shared"))
    for name in ("one", "two"):
        on_disk(site, name)
    assert main([*command, "--run", "one two"]) == 0
    assert capsys.readouterr().out.endswith(f" dashboard of 2 runs: {tmp_path}/pages/d.html\n")
    assert "<h1>2 runs</h1>" in (tmp_path / "pages" / "d.html").read_text()
