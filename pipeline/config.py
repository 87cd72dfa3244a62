"""A run's config: YAML files joined by `extends:`, overrides from `SET=`, checked whole before anything starts.

Every mistake is reported at once, each on a line of its own with the file, the key, what was found and what is valid.
Defaults live in the sections (in the modules that read them); a YAML file holds only what differs.
"""

import datetime
import difflib
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError, model_validator

from data_shards.errors import UserError, not_yaml
from data_shards.order import DataSettings, Order
from data_shards.reader import ReaderSettings
from data_shards.section import Section, what_is_valid
from pipeline.augment import AugmentSettings
from pipeline.checkpoint import CheckpointSettings
from pipeline.loader import LoaderSettings
from pipeline.monitor import MonitorSettings
from pipeline.optim import OptimSettings
from pipeline.regnet import ModelSettings
from pipeline.swav import ASSIGNING, SwAVSettings
from pipeline.watchdog import WatchdogSettings


class TrainSettings(Section):
    """How long, in what precision, from which initial weights. The length is one of epochs, steps and images."""

    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    images: PositiveInt | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0  # of the initial weights; the order and the crops have data.seed
    start_from: str | None = None  # FROM=: whose weights it begins with: run@step, or a trunk's file by its url or path

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        given = [name for name in ("epochs", "steps", "images") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of epochs, steps, images (found {', '.join(given) or 'none'})")
        return self

    def length(self, order: Order) -> int:
        """Steps of the whole run over that order of the data."""
        if self.steps is not None:
            return self.steps
        if self.images is not None:
            return -(-self.images // order.batch_size)
        assert self.epochs is not None
        return round(self.epochs * order.steps_per_epoch)


CONF = Path("conf")  # where recipes lie, seen from where make is called
_BLANKS = """; a value with blanks goes between quotes: SET="'augment.mean=[0.5, 0.5, 0.5]'\""""
SAVING = ("activation_checkpointing", "sharded")  # switches that take less memory for more time


class EfficiencySettings(Section):
    """What makes a run faster or exactly repeatable without changing what it learns."""

    affects_results: ClassVar[bool] = False
    torch_threads: PositiveInt = 1  # a rank's, on CPU
    activation_checkpointing: bool = False  # blocks keep what enters them and are computed again backward: less memory
    sharded: bool = False  # each rank holds a part of weights, gradients, optimizer (FSDP): less memory, more traffic
    deterministic: bool = False  # DDP keeps its buckets: sums are equal after a restart on any number of ranks
    timeout_s: PositiveFloat = 900.0  # of a collective; longer than reader.retry_seconds, for which one rank may wait

    @property
    def switched_on(self) -> str | None:
        """What a start has of the switches that its results do not depend on, in words."""
        return ", ".join(name for name in (*SAVING, "deterministic") if getattr(self, name)) or None

    @property
    def timeout(self) -> datetime.timedelta:
        """The same, as process groups take it."""
        return datetime.timedelta(seconds=self.timeout_s)


class Config(Section):
    """The root: one section a module."""

    store: str = "s3://runs"  # the folder of all runs
    data: DataSettings
    reader: ReaderSettings = ReaderSettings()
    loader: LoaderSettings = LoaderSettings()
    augment: AugmentSettings = AugmentSettings()
    model: ModelSettings = ModelSettings()
    swav: SwAVSettings = SwAVSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings
    efficiency: EfficiencySettings = EfficiencySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    monitor: MonitorSettings = MonitorSettings()
    watchdog: WatchdogSettings = WatchdogSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        lanes, group, queue = self.data.lanes, self.model.batch_norm_lanes, self.swav.queue
        wrong = []
        if group is not None and lanes % group:
            wrong.append(f"model.batch_norm_lanes: {group} does not divide data.lanes ({lanes})")
        if queue % lanes:
            legal = max(1, round(queue / lanes)) * lanes
            would = f'{legal} would (SET="swav.queue={legal}")'
            wrong.append(f"swav.queue: {queue} samples do not divide among {lanes} lanes; {would}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def refused(self) -> dict[str, str]:
        """What no start is let through with, by key. Records of runs from before it was known are still read."""
        wrong, (first, *others) = {}, self.augment.crops
        if first.count < ASSIGNING or any(crop.size > first.size for crop in others):
            sizes = ", ".join(f"{crop.count} of {crop.size}" for crop in self.augment.crops)
            wrong["augment.crops"] = f"found {sizes}; codes come from the first two, so begin with two of the largest"
        timeout_s, retry_s = self.efficiency.timeout_s, self.reader.retry_seconds
        if timeout_s <= retry_s:
            wrong["efficiency.timeout_s"] = (
                f"{timeout_s:g} s is not longer than reader.retry_seconds ({retry_s:g} s): while one rank waits for "
                f"the store, the others would give it up"
            )
        return wrong | self._folders_refused()

    def _folders_refused(self) -> dict[str, str]:
        """Those of the nodes that would be others in a job, which begins in a folder and an environment of its own."""
        folders = {"checkpoint.local_dir": self.checkpoint.local_dir, "reader.cache_dir": self.reader.cache_dir}
        valid = "an absolute path on the node's own disk, without variables"
        return {
            key: f"found {folder!r}; valid is {valid}"
            for key, folder in folders.items()
            if folder is not None and (not Path(folder).is_absolute() or "$" in folder)
        }

    def dump(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON takes them; `Config.model_validate` reads them back."""
        return self.model_dump(mode="json")

    def results(self) -> dict[str, Any]:
        """The sections that affect results, without the places where the data lies (the run pins its layout ids)."""
        kept = {
            name: value
            for name, value in self.dump().items()
            if isinstance(section := getattr(self, name), Section) and section.affects_results
        }
        data = {key: value for key, value in kept["data"].items() if key not in ("url", "sources")}
        shares = {"shares": list(self.data.shares)} if len(self.data.sets) > 1 else {}
        return {**kept, "data": data | shares}

    def fingerprint(self) -> str:
        """A hash of what affects results: equal for two configs that learn the same from the same data."""
        return hashlib.sha256(json.dumps(self.results(), sort_keys=True).encode()).hexdigest()[:16]


class ConfigError(UserError):
    """All mistakes of a config, a line each."""


@dataclass
class _Source:
    """Values with the place that each key came from (dotted key -> file:line)."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def load(path: str | Path, overrides: str | Sequence[str] = ()) -> Config:
    """Read a config file with what it extends, apply `key=value` overrides, check it.

    Raises ConfigError with one line for each mistake.
    """
    source = _read_file(Path(path), seen=())
    for override in _split(overrides, source) if isinstance(overrides, str) else overrides:
        _override(source, override)
    try:
        config = Config.model_validate(source.values)
    except ValidationError as error:
        source.errors += _explained(error, source, str(path))
    else:
        source.errors += [f"{source.places.get(key, path)}: {key}: {text}" for key, text in config.refused().items()]
    if source.errors:
        raise ConfigError("\n".join(source.errors))
    return config


def parse(values: Mapping[str, Any], name: str) -> Config:
    """Check values that were read before, such as a run's own record; `name` stands in for the file in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(error, _Source(dict(values)), name))) from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for each leaf that differs."""
    left, right = dict(leaves(old)), dict(leaves(new))
    return [f"{k}: {left.get(k)!r} -> {right.get(k)!r}" for k in sorted({*left, *right}) if left.get(k) != right.get(k)]


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What stands at the end of each path, as (optim.lr, 0.6)."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _read_file(path: Path, seen: tuple[Path, ...]) -> _Source:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself (through {', '.join(str(p) for p in seen)})")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (FileNotFoundError, IsADirectoryError):
        folder = path if path.is_dir() else path.parent
        there = f"in {folder}: {_configs_in(folder)}"
        near = [p for p in (CONF / path.name, CONF / f"{path.name}.yaml") if p.is_file()]
        raise ConfigError(f"{path}: no such config; {f'did you mean {near[0]}?' if near else there}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(not_yaml(path, error)) from None
    own = _Source()
    if root is None:
        return own
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: found no mapping; valid is a mapping of sections, such as `optim: {{lr: 0.3}}`")
    try:
        own.values = _mapping(root, path, "", own)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a tag, a date that is none, an anchor in itself
        raise ConfigError(not_yaml(path, error)) from None
    parent = own.values.pop("extends", None)
    return own if parent is None else _merge(_read_file(path.parent / str(parent), (*seen, path.resolve())), own)


def _configs_in(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.glob("*.yaml"))) or "none"


def _mapping(node: yaml.MappingNode, path: Path, prefix: str, source: _Source) -> dict[str, Any]:
    loader = yaml.SafeLoader("")
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        dotted = f"{prefix}.{key}" if prefix else key
        place = f"{path}:{key_node.start_mark.line + 1}"
        if key in values:
            source.errors.append(f"{place}: {dotted}: found twice, first at {source.places[dotted]}; keep one")
        source.places[dotted] = place
        if isinstance(value_node, yaml.MappingNode):
            values[key] = _mapping(value_node, path, dotted, source)
        else:
            values[key] = loader.construct_object(value_node, deep=True)
    return values


def _merge(base: _Source, over: _Source) -> _Source:
    def join(left: Any, right: Any) -> Any:
        if isinstance(left, dict) and isinstance(right, dict):
            return {**left, **{key: join(left.get(key), value) for key, value in right.items()}}
        return right

    return _Source(join(base.values, over.values), {**base.places, **over.places}, [*base.errors, *over.errors])


def _split(overrides: str, source: _Source) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError as error:
        hint = 'put the value between quotes of the other kind, such as train.start_from="it\'s.torch"'
        source.errors.append(f"SET: found {overrides!r}: {str(error).lower()}; {hint}")
        return []


def _override(source: _Source, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        source.errors.append(f"SET: found {text!r}, valid is key=value, such as optim.lr=2.4")
        return
    *sections, leaf = key.split(".")
    target = source.values
    for number, section in enumerate(sections, 1):
        source.places.setdefault(".".join(sections[:number]), "SET")
        inner = target.get(section)
        target[section] = inner = dict(inner) if isinstance(inner, dict) else {}
        target = inner
    try:
        target[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # the latter: a date that is none
        hint = _BLANKS if value.startswith(("[", "{")) else ""
        source.errors.append(f"SET: {key}: found {value!r}, which is not a YAML value{hint}")
    source.places[key] = "SET"


def _explained(error: ValidationError, source: _Source, name: str) -> list[str]:
    """A line for each mistake; one inside a list is not told again as a mistake of the list."""
    found = error.errors()
    around = {d["loc"][:n] for d in found for n in range(len(d["loc"]))}
    return [_explain(source, name, d) for d in found if not (d["type"] == "too_short" and d["loc"] in around)]


def _explain(source: _Source, name: str, error: Any) -> str:
    dotted = ".".join(str(part) for part in error["loc"])
    place = _place(dotted, source) or name
    if error["type"] == "extra_forbidden":
        return f"{place}: {dotted}: unknown key (found {error['input']!r}); {_valid_keys(error['loc'])}"
    if error["type"] == "missing":
        return f"{place}: {dotted}: missing; it has no default, so set it"
    message = what_is_valid(error["msg"])
    if error["type"] != "value_error":
        return f"{place}: {dotted}: found {error['input']!r}; valid is {message}"
    if not isinstance(error["input"], Mapping | BaseModel):
        return f"{place}: {dotted}: found {error['input']!r}: {message}"
    # a check of a section's keys together, which says what it found, and mostly begins with one of them
    key = ".".join(filter(None, (dotted, message.partition(":")[0])))
    return ": ".join(filter(None, (_place(key, source) or name, dotted, message)))


def _place(dotted: str, source: _Source) -> str | None:
    """Where a key stands, or else the innermost that it lies in."""
    keys = dotted.split(".")
    return next((source.places[k] for n in range(len(keys), 0, -1) if (k := ".".join(keys[:n])) in source.places), None)


def _valid_keys(loc: Sequence[str | int]) -> str:
    model: type[Section] = Config
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = section_in(model.model_fields[part].annotation) or model
    near = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1)
    return f"valid: {', '.join(model.model_fields)}" + (f"; did you mean {near[0]}?" if near else "")


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field's annotation is or holds, as in `tuple[CropSettings, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_in(inner))), None)
