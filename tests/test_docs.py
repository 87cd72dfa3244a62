"""What the documents say is so: their examples give what stands there, their links and modules are there."""

import doctest
import re
from pathlib import Path

import pytest

from data_shards.store import Store
from pipeline.journal import read_metrics
from tests.pipeline import distributed
from tests.pipeline.test_profile import one_run
from tests.pipeline.test_train import config, tiles

__all__ = ["tiles"]

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_examples_give_what_stands_there() -> None:
    found = doctest.testfile(str(ROOT / "docs" / "HOW_IT_WORKS.md"), module_relative=False)
    assert found.attempted > 3
    assert found.failed == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_it_links_to_and_the_modules_that_it_names_are_there(document: Path) -> None:
    text = document.read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)}
    modules = set(re.findall(r"`((?:data_shards|pipeline|jobs)(?:\.[a-z_0-9]+)+)", text))
    assert {link for link in links if not (document.parent / link).exists()} == set()
    assert {name for name in modules if not is_there(name)} == set()


@pytest.mark.slow
def test_every_value_of_a_row_is_explained(tiles: str, tmp_path: Path) -> None:
    values = config(tiles, tmp_path)
    distributed.run(1, one_run, values, str(tmp_path / "run"), False)
    row = read_metrics(Store(f"{values['store']}/run"))[-1]
    text = (ROOT / "docs" / "HOW_IT_WORKS.md").read_text()
    for part in ("result", "run"):
        (table,) = re.findall(rf"\n\| {part} \| \|\n(.*?)\n\n", text, re.DOTALL)
        explained = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
        assert explained - {"gpu_bytes"} == row[part].keys() - {"gpu_bytes"}


def is_there(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()
