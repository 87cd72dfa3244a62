"""The reference of keys says of each what the sections say."""

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic_core import to_jsonable_python

from jobs.cli import main
from jobs.keys import Key, groups
from jobs.site import ROOT, Site
from pipeline.config import Config

KEYS = {key.name: key for group in groups(Config) for key in group.keys}


def dotted(values: dict[str, object], prefix: str = "") -> list[str]:
    names = []
    for key, value in values.items():
        inner = isinstance(value, dict)
        names += dotted(value, f"{prefix}{key}.") if inner else [prefix + key]  # type: ignore[arg-type]
    return names


def test_each_key_of_a_resolved_config_is_there_once_with_its_default() -> None:
    resolved = Config.model_validate({"data": {"batch": 4, "lanes": 2, "url": "s3://a"}, "train": {"steps": 1}})
    listed = [key.name for group in groups(Config) for key in group.keys]
    assert len(set(listed)) == len(listed)
    assert set(dotted(resolved.dump())) == {name for name in listed if "[]" not in name}
    for name, key in KEYS.items():
        value: object = resolved.dump()
        for part in name.split(".") if "[]" not in name else ():
            value = value[part]  # type: ignore[index]
        if "[]" not in name and name not in ("data.batch", "data.lanes", "data.url", "train.steps"):
            assert yaml.safe_load(str(key.default)) == value, name


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda path: path.name)
def test_each_key_of_the_configs_that_come_along_is_there(file: Path) -> None:
    assert set(dotted(yaml.safe_load(file.read_text()))) - {"extends"} <= KEYS.keys()


@pytest.mark.parametrize("page", ["README.md", "docs/BENCHMARKS.md", "docs/COMING_FROM_VISSL.md"])
def test_each_key_that_a_page_names_is_there(page: str) -> None:
    sections = "|".join(sorted({name.partition(".")[0] for name in KEYS if "." in name}))
    named = set(re.findall(rf"(?:`|SET=\")((?:{sections})\.[a-z_]+)(?:`|=)", (ROOT / page).read_text()))
    assert named
    assert named <= KEYS.keys()


def test_a_note_is_the_comment_beside_the_field_or_above_it_with_what_may_be_chosen() -> None:
    assert KEYS["data.batch"] == Key("data.batch", None, "images a step, over all ranks")
    assert KEYS["optim.name"].note == "larc | adamw"
    assert KEYS["monitor.wandb"].note.startswith("auto | online | offline | disabled; auto: online with a key")
    assert KEYS["loader.hardware_jpeg"].note.startswith("Share of JPEGs that")
    assert KEYS["loader.hardware_jpeg"].note.endswith("before raising it.")  # all lines of it
    assert KEYS["model.batch_norm_lanes"].note.endswith("null: all of them")  # as YAML has it
    assert KEYS["augment.crops[].size"].note == "pixels of a side"
    assert not any("noqa" in key.note or "type: ignore" in key.note for key in KEYS.values())


def test_a_group_says_whether_it_affects_results() -> None:
    affect = {group.name: group.affects_results for group in groups(Config)}
    assert affect["optim"]
    assert affect["data"]
    assert not affect["reader"]
    (site,) = groups(Site)
    assert not site.affects_results
    assert to_jsonable_python(Site.model_fields["nodes"].default) == 1
    assert next(key for key in site.keys if key.name == "nodes").default == "1"


def test_the_command_shows_the_keys_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--key", "signal_delay"]) == 0
    shown = capsys.readouterr().out
    assert "A SITE: conf/sites/*.yaml" in shown
    assert "signal_delay_s" in shown
    assert "A RUN" not in shown
    assert main(["config", "--key", "min_side", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"of": "packing", "affects_results": False, "name": "min_side", "default": "32", "note": "pixels"}


def test_a_misspelt_key_is_one_line_with_what_is_near_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--key", "optm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("farseer: KEY=optm: no key has that in its name; near it: optim.")


def test_lines_are_as_wide_as_they_may_be_and_none_is_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    too_wide = [line for line in lines if len(line) > 100]
    assert all(line.startswith("  augment.crops ") for line in too_wide)  # a default that cannot be broken
    assert sum(line.startswith("  ") and not line.startswith("   ") for line in lines) > len(KEYS)
