"""Files out of Debian packages without installing them, and who made them: apt-get download, dpkg -x, copyright.

Works as any user. Where apt's lists are missing or too old to download by, lists of our own are fetched into the
working folder; nothing outside of it is written.
"""

import fnmatch
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

TRIES = 3
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Credit:
    """Whose a file is and how it may be used."""

    name: str
    author: str
    licence: str
    package: str

    def __str__(self) -> str:
        return f"{self.name}: {self.author} ({self.licence}, {self.package})"


@dataclass
class Packages:
    """Unpacked packages below `folder`, and why others are missing."""

    folder: Path
    missing: dict[str, str] = field(default_factory=dict)
    own_lists: bool = False

    def fetch(self, name: str) -> Path | None:
        """The folder into which the package is unpacked; None when it is not to be had, the reason is in `missing`."""
        target = self.folder / name
        if target.is_dir():
            return target
        if not shutil.which("apt-get") or not shutil.which("dpkg"):
            self.missing[name] = "apt-get and dpkg are not on this machine"
            return None
        for attempt in range(TRIES):
            if why := self._download(name):
                self.missing[name] = why
                self._update_lists()
                time.sleep(attempt)
            else:
                self.missing.pop(name, None)
                return target
        return None

    def _download(self, name: str) -> str:
        """Download and unpack; returns why not, or nothing."""
        beside = self.folder / f".{name}"
        shutil.rmtree(beside, ignore_errors=True)
        (beside / "files").mkdir(parents=True)
        try:
            if why := self._run(["apt-get", "-q", *self._options(), "download", name], beside):
                return why
            for package in beside.glob("*.deb"):
                if why := self._run(["dpkg", "-x", str(package), str(beside / "files")], beside):
                    return why
            (beside / "files").rename(self.folder / name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return ""

    def _update_lists(self) -> None:
        """Lists of our own, once: a plain user may not renew the machine's, and we leave those alone."""
        if not self.own_lists:
            self.own_lists = True
            for part in ("lists/partial", "cache/archives/partial"):
                (self.folder / ".apt" / part).mkdir(parents=True, exist_ok=True)
            self._run(["apt-get", "-q", *self._options(), "update"], self.folder)

    def _options(self) -> list[str]:
        own = (self.folder / ".apt").resolve()
        # As root apt would hand the work to a user of its own, who may not enter our folder.
        options = ["APT::Sandbox::User=root"]
        if self.own_lists:
            options += [f"Dir::State::Lists={own}/lists", f"Dir::Cache={own}/cache"]
        return [word for option in options for word in ("-o", option)]

    def _run(self, command: list[str], where: Path) -> str:
        """Run it; returns the last line of what it complained about, or nothing."""
        try:
            done = subprocess.run(
                command, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return f"{command[0]} took more than {TIMEOUT_S:.0f} s"
        said = (done.stderr or done.stdout).strip().splitlines()
        return "" if done.returncode == 0 else said[-1] if said else f"{command[0]} failed"


def credit(unpacked: Path, file: Path, name: str) -> Credit:
    """Who made `file` of the unpacked package, by the package's machine-readable copyright file."""
    package = unpacked.name
    found = next(unpacked.glob("usr/share/doc/*/copyright"), None)
    author, licence = "see the package", "see the package"
    for paragraph in re.split(r"\n\s*\n", found.read_text(errors="replace") if found else ""):
        fields = _fields(paragraph)
        if any(_covers(pattern, file) for pattern in fields.get("Files", "").split()):
            author = "; ".join(map(_name, fields.get("Copyright", author).splitlines()))
            licence = fields.get("License", licence).splitlines()[0]  # the last paragraph that covers a file counts
    return Credit(name, author, licence, package)


def _fields(paragraph: str) -> dict[str, str]:
    """`Name: value` with indented lines that go on."""
    matches = re.finditer(r"^(\S[^:\n]*):[ \t]*(.*(?:\n[ \t]+.*)*)", paragraph, re.MULTILINE)
    return {match[1]: "\n".join(line.strip() for line in match[2].splitlines() if line.strip()) for match in matches}


def _covers(pattern: str, file: Path) -> bool:
    """Patterns are of the source package, whose folders are not those of the installed files: by the file's name."""
    name = pattern.rsplit("/", 1)[-1]
    return pattern == "*" or (name != "*" and fnmatch.fnmatchcase(file.name, name))


def _name(line: str) -> str:
    """`2008, Jane Doe <jane@example.org>` -> `Jane Doe`."""
    without = re.sub(r"<[^>]*>\W*|\b(19|20)\d\d(-(19|20)\d\d)?\b", "", line)
    return without.strip(" ,.").removeprefix("by ") or line.strip()
