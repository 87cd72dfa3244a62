"""Where a job runs: one file a cluster, `conf/sites/<name>.yaml`, chosen by `SITE=`.

`SITE=local` is what `make cluster-up` made on this machine (`var/cluster/site.yaml`). A site names files and profiles,
never a secret: what it holds travels into the batch script, which others can read.
"""

import os
import re
import shlex
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from data_shards.errors import UserError, not_yaml
from data_shards.section import Section, what_is_valid

ROOT = Path(__file__).resolve().parents[1]
SITES = ROOT / "conf" / "sites"
LOCAL = ROOT / "var" / "cluster" / "site.yaml"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What the job takes over from the environment of the one who submits; the rest, secrets among it, stays behind.
INHERITED = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
# Names and paths that lead to the store; the keys themselves stay in the files.
CARRIED = (
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
# What no job has in its environment, wherever it would come from.
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")
# SLURM takes these from whoever submits as options, whatever the script says, and hands SLURM_* on to the new job.
_OF_ANOTHER_JOB = ("SLURM_", "SBATCH_", "SRUN_")
# Its other tools answer and do less under these: a squeue of one user's jobs does not show whose are on a run.
_OF_ITS_TOOLS = ("SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")
# Options of sbatch that follow from a key of the site.
_OF_ITS_KEYS = {
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "cpus-per-task": "cpus_per_rank",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "time": "time_limit_min",
    "signal": "signal_delay_s",
}
# And those by which a job is one of Farseer's.
_OURS = {"array", "chdir", "comment", "error", "export", "job-name", "ntasks", "open-mode", "output"}
_OURS |= {"requeue", "no-requeue"}
_DEFAULTS = ("account", "partition", "qos")  # of the user's, where the site leaves them open
_SECRET = re.compile(r"SECRET|(^|_)TOKEN(_|$)|PASSWORD|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_FILE = re.compile(r"_(FILE|PATH|DIR)$", re.IGNORECASE)  # of a secret, which may be named


class Site(Section):
    """A cluster, or this machine alone (`executor: local`). Changes nothing that is learned."""

    affects_results: ClassVar[bool] = False
    name: str = ""  # as who asks for it calls it
    executor: Literal["slurm", "local"] = "slurm"
    shared_dir: str  # an absolute path (or ~/, $HOME/) that every node sees: snapshots, logs, a run's local files
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt = 1
    cpus_per_rank: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    gpu_memory_gb: PositiveFloat | None = None  # a GPU's, for `plan` to hold the model against
    memory_gb: PositiveFloat | None = None  # a node's
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_limit_min: PositiveInt = 24 * 60
    signal_delay_s: PositiveInt = 120  # from the signal to the end: twice what a save and its upload take
    max_cycles: PositiveInt = 3  # failed starts without a new committed checkpoint, after which the job stops
    exclude_hours: PositiveFloat = 12.0  # a host to blame for two failed starts is kept out for so long
    interface: str | None = None  # network interface of the collectives
    python: str | None = None  # a command, by default the Python that submits; `apptainer exec img python` is one too
    setup: tuple[str, ...] = ()  # shell lines before the ranks, as `module load cuda`; one that fails ends the start
    environment: dict[str, str] = Field(default_factory=dict)  # here and in the job: AWS_PROFILE, SLURM_CONF, ...
    extra: dict[str, str | int | bool] = Field(default_factory=dict)  # more sbatch options, without the dashes
    # for `plan` alone:
    images_per_s: PositiveFloat | None = None  # of all ranks, where no earlier run tells
    price_per_gpu_hour: PositiveFloat | None = None  # in your currency
    failures_per_node_day: NonNegativeFloat = 2 / 128  # OPT-175B's logbook: two a day among 124 to 128 nodes

    @field_validator("shared_dir")
    @classmethod
    def _is_the_same_everywhere(cls, path: str) -> str:
        """Jobs begin in another folder than the one who submits them."""
        full = Path(os.path.expandvars(path))
        with suppress(RuntimeError):  # of a user whom this machine does not know, the path stays as it is
            full = full.expanduser()
        if not full.is_absolute() or "$" in str(full):  # a variable that is not set stays too
            raise ValueError("an absolute path, such as /shared/farseer or ~/farseer, of variables that are set")
        return str(full)

    @field_validator("extra")
    @classmethod
    def _leaves_to_us_what_is_ours(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        """What follows from the site's own keys, or makes a job one of Farseer's, has one place."""
        for name in options:
            option = name.replace("_", "-")
            if option in _OF_ITS_KEYS:
                raise ValueError(f"no {name}: the site says it by {_OF_ITS_KEYS[option]}")
            if option in _OURS:
                raise ValueError(f"no {name}: Farseer has its own")
        return options

    @field_validator("extra")
    @classmethod
    def _leaves_each_rank_all_gpus(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        """A rank takes its GPU by its number on the node, so it must see them all."""
        binding = [name for name in options if name.replace("_", "-") in ("gpus-per-task", "gpu-bind", "tres-per-task")]
        if binding:
            raise ValueError(f"no {', '.join(binding)}: with gpus_per_node each rank takes one of its node by itself")
        return options

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, variables: dict[str, str]) -> dict[str, str]:
        secret = [name for name in variables if _SECRET.search(name) and not _FILE.search(name)]
        if secret:
            raise ValueError(
                f"paths and names only, {', '.join(secret)} holds a secret; put it in a file and name that file, "
                "such as AWS_SHARED_CREDENTIALS_FILE"
            )
        return variables

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def used_partition(self) -> str | None:
        """What sbatch takes, from the site or from who submits; None: SLURM's default one."""
        return self.partition or os.environ.get("SBATCH_PARTITION") or None

    @property
    def option(self) -> str:
        """What a command to type has at its end, so that it is about this site."""
        return "" if self.name in ("", "local") else f" SITE={shlex.quote(self.name)}"

    def run_dir(self, run: str) -> Path:
        """The run's folder on the shared disk. Raises UserError when the name could leave it."""
        if not RUN_NAME.fullmatch(run):
            raise UserError(f"RUN: found {run!r}; valid is up to 64 letters, digits, dots, dashes and underscores")
        return Path(self.shared_dir) / run

    def activate(self) -> None:
        """Give this process the site's environment, so that what is checked here is what the job will meet.

        A site that says where the store's keys are says all of it: nothing inherited overrules it. Otherwise what this
        process has by name (CARRIED) goes along with the job. Raises UserError for a key itself, which does not.
        Of a SLURM job in which this process may be, only where SLURM is stays; of SBATCH_*, what the site leaves open.
        """
        if self.executor == "slurm":
            inherited = (*_OF_ANOTHER_JOB, *_OF_ITS_TOOLS)
            own = {"SLURM_CONF", *(f"SBATCH_{key.upper()}" for key in _DEFAULTS if getattr(self, key) is None)}
            for name in [name for name in os.environ if name.startswith(inherited) and name not in own]:
                del os.environ[name]
        if any(name.startswith("AWS_") for name in self.environment):
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                del os.environ[name]
        os.environ.update(self.environment)
        keys = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if name in os.environ]
        if keys and self.executor == "slurm":
            raise UserError(
                f"{' and '.join(keys)} would not travel to the job (secrets stay out of it); unset them, put the "
                f"key into a file, name it in SITE={self.name}: environment: {{AWS_SHARED_CREDENTIALS_FILE: ...}}"
            )


class UniqueKeys(yaml.SafeLoader):
    """YAML, but for a key that stands twice: of it the last one would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set[str]()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name} is there twice; keep one", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_site(name: str) -> Site:
    """Read a site by name (`conf/sites/<name>.yaml`, `local`) or by the path of its file.

    Raises UserError with a line for each mistake.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else LOCAL if name == "local" else SITES / f"{name}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)  # noqa: S506 - a safe one
    except FileNotFoundError:
        raise UserError(_missing(name, path)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(not_yaml(path, error)) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: found no settings; valid: {', '.join(Site.model_fields)}")
    try:
        return Site.model_validate({"name": "local" if path == LOCAL else name, **values})
    except ValidationError as error:
        raise UserError("\n".join(_explain(path, details) for details in error.errors())) from None


def export_lines(variables: dict[str, str]) -> list[str]:
    """Shell lines that set them, whatever is in their values."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _missing(name: str, path: Path) -> str:
    if name == "local":
        return "SITE=local: no cluster runs on this machine; make cluster-up starts one"
    known = ", ".join(["local", *sorted(file.stem for file in SITES.glob("*.yaml"))])
    return f"SITE={name}: no such site ({path}); there are: {known}"


def _explain(path: Path, error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown key; valid: {', '.join(Site.model_fields)}"
    if error["type"] == "missing":
        return f"{path}: {key}: missing; it has no default, so set it"
    found = "" if error["loc"][0] == "environment" else f"found {error['input']!r}; "  # that may be a secret
    return f"{path}: {key}: {found}valid is {what_is_valid(error['msg'])}"
