"""What a user types: every make target explains itself, and every command that the README names is there."""

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs.cli import parser

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()
# What targets need to be told; each gets what it reads.
GIVEN = [
    "RUN=r",
    "SRC=/a b",
    "DST=s3://b/d",
    "BANK=s3://b/1",
    "HELD_OUT=s3://b/2",
    "SITE=local",
    "LIST=a list",
    "KEY=k",
    "STEP=7",
]
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed: apt install make")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def explained() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):.*## \S", MAKEFILE, re.MULTILINE))


def verbs() -> dict[str, argparse.ArgumentParser]:
    action = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def make(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, env=inherited | changes, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_every_target_explains_itself() -> None:
    assert targets() - explained() == {"slurm"}  # a step of others, not for typing
    assert set(re.findall(r"^\.PHONY: (\S+)", MAKEFILE, re.MULTILINE)) == targets()


@needs_make
def test_help_lists_every_target_in_a_line() -> None:
    said = make("help").stdout.splitlines()
    assert {line.split()[0] for line in said} == explained()
    assert max(map(len, said)) <= 110


def test_every_command_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"(?:`|^| )make ([a-z][a-z-]+)(?=[` ]|$)", README, re.MULTILINE))
    assert len(named) >= 10
    assert named - targets() - {"python"} == set()


def test_every_verb_that_a_target_calls_is_there_and_takes_its_options() -> None:
    calls = re.findall(r"\$\(FARSEER\) ([a-z]+)(.*)", MAKEFILE)
    assert {verb for verb, _ in calls} <= set(verbs())
    for verb, rest in calls:
        known = {option for action in verbs()[verb]._actions for option in action.option_strings}
        asked = set(re.findall(r"(--[a-z-]+)", rest))
        asked |= {f"--{name}" for name in re.findall(r"\$\(call flag,[A-Z]+,([a-z-]+)\)", rest)}
        asked |= {"--run"} if "$(run_option)" in rest else set()
        asked |= {"--site"} if "$(site_option)" in rest else set()
        assert asked <= known, f"farseer {verb}"


@needs_make
@pytest.mark.parametrize("target", sorted(explained()))
def test_what_a_target_would_run_can_be_read(target: str) -> None:
    (lines,) = re.findall(rf"^{target}:.*(?:\n\t.*)*", MAKEFILE, re.MULTILINE)
    lines = lines.replace("run_option", "RUN").replace("site_option", "SITE")
    done = make("-n", target, *(one for one in GIVEN if re.search(rf"\b{one.partition('=')[0]}\b", lines)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@needs_make
@pytest.mark.parametrize("target", ["logs", "resume", "cancel", "checkpoints"])
def test_a_target_that_needs_a_run_says_so_before_it_does_anything(target: str) -> None:
    done = make("-n", target)
    assert done.returncode == 2
    assert f"say which run: make {target} RUN=name" in done.stderr


@needs_make
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit", "RUN=r", "CONFIG=conf/x.yaml"], "CONFIG= is read by no target; there are AFRESH "),
        (["status", "SITES=mine"], "SITES= is read by no target"),
        (["export", "RUN=r", "OUT=here"], "OUT= is not read by make export; it reads JSON RUN SITE STEP TO."),
        (["preview", "status", "DST=s3://b/d", "EVERY=5"], "EVERY= is not read by make preview status; it reads DST "),
        (["cancel", "RUN=r", "NOW=0"], "NOW=0: say NOW=1, or leave it out"),
        (["submit", "RUN=r", "FORCE=false"], "FORCE=false: say FORCE=1, or leave it out"),
        (["resume", "RUN=r", "SET=optim.lr=1"], "a run goes on under its own config: make submit CONF= RUN= SET="),
    ],
)
def test_what_would_be_ignored_is_refused(arguments: list[str], said: str) -> None:
    done = make("-n", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


@needs_make
@pytest.mark.parametrize(
    ("value", "said", "forced"), [("0", "FORCE=0: say FORCE=1", False), ("1", "", True), ("", "", False)]
)
def test_a_switch_in_the_environment_is_on_with_1_alone(value: str, said: str, forced: bool) -> None:
    done = make("-n", "submit", "RUN=r", FORCE=value)
    assert (done.returncode, "--force" in done.stdout) == (2 if said else 0, forced)
    assert said in done.stderr


@needs_make
def test_quotes_in_overrides_and_keys_come_through(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    program = checkout / ".venv" / "bin" / "farseer"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    for name in ("Makefile", "setup.cfg", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    (checkout / ".venv" / "stamp").touch()
    sources = 'data.sources=[{"url":"s3://a b"}]'
    assert sources in make("-C", str(checkout), "plan", f"SET={sources}").stdout.splitlines()
    assert "a `key` $x" in make("-C", str(checkout), "seen", "RUN=r", "KEY=a `key` $$x").stdout.splitlines()


@needs_make
def test_a_python_that_is_too_old_is_told_with_the_way_out(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    for name in ("Makefile", "setup.cfg", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    done = make("lint", "-C", str(checkout), f"PYTHON={old}")
    assert done.returncode == 2
    assert "is older than 3.11; make PYTHON=" in done.stdout
    assert not (checkout / ".venv").exists()


def test_what_is_installed_here_is_what_the_constraints_name() -> None:
    from importlib import metadata

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if re.match(r"[A-Za-z0-9_.-]+==", line))
    installed = {name: metadata.version(name) for name in pins if _has(name)}
    assert len(installed) > 50
    assert {name: version.split("+")[0] for name, version in installed.items()} == {
        name: pins[name] for name in installed
    }


def _has(name: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_every_requirement_is_pinned() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    wanted = set(
        re.findall(r"^    ([A-Za-z0-9_.-]+)(?:[><=!~]|$)", setup.split("[options.packages.find]")[0], re.MULTILINE)
    )
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name for name in wanted if name.lower() not in pinned} == set()


def test_the_releases_with_a_credential_stealer_are_kept_out() -> None:
    for text in ((ROOT / "setup.cfg").read_text(), (ROOT / "constraints.txt").read_text()):
        assert "2.6.2" in text
        assert "2.6.3" in text


def test_the_check_of_a_change_runs_lint_and_every_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash")
    assert "set -euo pipefail" in text
    assert text.index("make lint") < text.index("make test")


def test_every_variable_that_a_recipe_reads_is_one_that_make_lets_pass() -> None:
    (known,) = re.findall(r"^KNOWN := (.*?)\ngiven", MAKEFILE, re.MULTILINE | re.DOTALL)
    (switches,) = re.findall(r"^SWITCHES := (.*?)\nKNOWN", MAKEFILE, re.MULTILINE | re.DOTALL)
    recipes = "\n".join(line for line in MAKEFILE.splitlines() if line.startswith("\t"))
    flags = set(re.findall(r"\$\(call flag,([A-Z_]+),", recipes))
    assert flags == set(switches.replace("\\", "").split())
    read = set(re.findall(r"\$\(([A-Z_]+)\)", recipes)) | flags
    assert read - {"BIN", "FARSEER", "MAKEFILE_LIST", "PYTEST"} <= set(known.split()) | flags
