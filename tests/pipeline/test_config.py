"""Configs: what a file may say, and what is said of its mistakes."""

import re
from pathlib import Path

import pytest

from jobs.site import ROOT
from pipeline.config import Config, ConfigError, differences, load, parse
from pipeline.optim import lr_at

GOOD = """
data: {url: memory://set, batch: 8, lanes: 4, chunk_samples: 4, window_chunks: 2}
train: {steps: 10}
"""

BAD = """\
store: 5
data:
  url: memory://set
  batch: minus one
  lanes: 4
  chunk_samples: 4
  window_chunks: 2
  lanes: 8
optim:
  lerning_rate: 0.1
  name: sgd
  warmup_steps: -3
swav:
  prototypes: 0
  epsilon: [0.1]
model:
  trunk: regnety_161
augment:
  crops:
    - {size: 64, count: 2, scal: [0.1, 1.0], scale: [0.1, 1.0]}
train: {steps: 10}
wandb: true
"""

MISTAKES = {
    "store": "5",
    "data.batch": "'minus one'",
    "data.lanes": "twice",
    "optim.lerning_rate": "0.1",
    "optim.name": "'sgd'",
    "optim.warmup_steps": "-3",
    "swav.prototypes": "0",
    "swav.epsilon": "[0.1]",
    "model.trunk": "regnety_161",
    "augment.crops.0.scal": "[0.1, 1.0]",
    "wandb": "True",
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def test_every_mistake_of_a_file_is_reported_at_once_with_file_line_key_and_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(MISTAKES), "\n".join(lines)
    for key, found in MISTAKES.items():
        (line,) = [line for line in lines if f": {key}: " in line]
        assert line.startswith(f"{path}:"), line
        assert found in line, line


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"train:\n  {steps: 1", [":2: not valid YAML: expected ',' or '}', but got '<stream end>'"]),
        (b"store: !env STORE", [":1: not valid YAML: could not determine a constructor for the tag '!env'"]),
        (b"train: {start_from: 2026-13-45}", [": not valid YAML: month must be in 1..12"]),
        (b"store: ger\xe4t", [": not valid YAML: 'utf-8' codec can't decode byte 0xe4 in position 10: .*"]),
        (b"- a\n", [": found no mapping; valid is a mapping of sections, such as `optim: {lr: 0.3}`"]),
        (b"", [": data: missing; it has no default, so set it", ": train: missing; it has no default, so set it"]),
        (b"train: {steps: 1}\ndata: 3\n", [":2: data: found 3; valid is a mapping of its keys"]),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_its_lines(tmp_path: Path, text: bytes, lines: list[str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(text)
    said = "\n".join(f"{tmp_path}/bad.yaml{line}" for line in map(as_pattern, lines))
    with pytest.raises(ConfigError, match=f"^{said}$"):
        load(tmp_path / "bad.yaml")


def as_pattern(line: str) -> str:
    """Words as they stand, but for what the system says at the end."""
    return re.escape(line).replace(r"\.\*", ".*")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("optim.lr", "SET: found 'optim.lr', valid is key=value, such as optim.lr=2.4"),
        ("=3", "SET: found '=3', valid is key=value, such as optim.lr=2.4"),
        ("optim.lr='{'", "SET: optim.lr: found '{', which is not a YAML value; a value with blanks goes between .*"),
        ("optim.lr=fast", "SET: optim.lr: found 'fast'; valid is a number"),
        ("data.batch=1.5", "SET: data.batch: found 1.5; valid is an integer"),
        ("model.w_0=9", "SET: model.w_0: found 9; valid is a multiple of 8"),
        ("optim.name=sgd", "SET: optim.name: found 'sgd'; valid is 'larc' or 'adamw'"),
        ("swav.head=[]", "SET: swav.head: found []; valid is at least 1 item"),
        ("swav.head=[0]", "SET: swav.head.0: found 0; valid is greater than 0"),
        ("augment.sigma=[2,1]", "SET: augment: sigma: [2.0, 1.0] is no range above 0, smaller end first"),
        ("augment.flip=2", "SET: augment.flip: found 2; valid is less than or equal to 1"),
        ("model.batch_norm_lanes=3", "SET: model.batch_norm_lanes: 3 does not divide data.lanes (4)"),
        ("no.such=1", "SET: no: unknown key (found {'such': 1}); valid: store, data, .*"),
        ("data.urll=1", "SET: data.urll: unknown key (found 1); valid: url, .*, seed; did you mean url?"),
        ("optim.trust_=1", "SET: optim.trust_: unknown key (found 1); valid: name, lr, .*, trust; did you mean trust?"),
    ],
)
def test_an_override_that_cannot_be_is_one_line(good: Path, given: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{as_pattern(line)}$"):
        load(good, given)


def test_a_record_that_is_no_config_is_told_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^run\.json: data\.lanes: missing; it has no default, so set it$"):
        parse({"data": {"url": "s3://a", "batch": 4}, "train": {"steps": 1}}, "run.json")


def test_an_unknown_key_is_answered_with_the_valid_ones_and_the_nearest(good: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"SET: optim\.lerning_rate: unknown key \(found 0\.1\); valid: .*warmup_steps"
    ) as caught:
        load(good, "optim.lerning_rate=0.1")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean warmup_steps"):
        load(good, "optim.warmup_step=1")


def test_a_quote_that_is_not_closed_in_an_override_is_a_line(good: Path) -> None:
    with pytest.raises(ConfigError, match=r"^SET: found \"monitor\.project=it's\": no closing quotation") as caught:
        load(good, "monitor.project=it's")
    assert "\n" not in str(caught.value)


def test_a_queue_that_does_not_divide_among_the_lanes_is_refused_with_one_that_does(good: Path) -> None:
    with pytest.raises(ConfigError, match=r'swav\.queue: 25 samples .* 4 lanes; 24 would \(SET="swav\.queue=24"\)'):
        load(good, "swav.queue=25")


@pytest.mark.parametrize("key", ["checkpoint.local_dir", "reader.cache_dir"])
@pytest.mark.parametrize("folder", ["~/local", "/local/$USER", "local"])
def test_a_nodes_folder_that_would_be_another_one_in_the_job_is_refused(good: Path, key: str, folder: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(good, [f"{key}={folder}"])
    valid = "an absolute path on the node's own disk, without variables"
    assert str(caught.value) == f"SET: {key}: found {folder!r}; valid is {valid}"
    assert load(good, [f"{key}=/local"]).dump()[key.partition(".")[0]][key.partition(".")[2]] == "/local"


def test_a_file_holds_only_what_differs_from_the_one_that_it_extends(good: Path) -> None:
    child = good.with_name("child.yaml")
    child.write_text("extends: good.yaml\ndata: {lanes: 2}\n")
    assert load(child).data.lanes == 2
    assert load(child).data.batch == load(good).data.batch == 8


def test_a_chain_of_extends_that_comes_back_is_refused(good: Path) -> None:
    good.write_text("extends: other.yaml\n" + GOOD)
    good.with_name("other.yaml").write_text("extends: good.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load(good)


def test_overrides_win_over_files_and_take_scientific_notation(good: Path) -> None:
    config = load(good, "optim.lr=1e-3 data.lanes=2 swav.head=[64,16]")
    assert (config.optim.lr, config.data.lanes, config.swav.head) == (1e-3, 2, (64, 16))


def test_a_missing_file_is_answered_with_those_that_there_are(good: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config; in .*: good\.yaml"):
        load(good.with_name("god.yaml"))
    with pytest.raises(ConfigError, match=r"no such config; in .*: good\.yaml"):
        load(good.parent)


@pytest.mark.parametrize("length", ["train.epochs=1", "train.images=100 train.epochs=2"])
def test_a_run_has_exactly_one_length(good: Path, length: str) -> None:
    with pytest.raises(ConfigError, match="exactly one of epochs, steps, images"):
        load(good, length)


def test_the_fingerprint_changes_with_what_affects_results_and_with_nothing_else(good: Path) -> None:
    base = load(good)
    assert load(good, "optim.lr=0.7").fingerprint() != base.fingerprint()
    assert load(good, "data.seed=7").fingerprint() != base.fingerprint()
    for same in ("data.url=s3://moved/set", "reader.connections=3", "checkpoint.every_steps=7", "store=memory://runs"):
        assert load(good, same).fingerprint() == base.fingerprint(), same


def test_a_dumped_config_reads_back_as_the_same(good: Path) -> None:
    config = load(good)
    assert Config.model_validate(config.dump()) == config


def test_differences_name_the_keys_that_changed(good: Path) -> None:
    old, new = load(good), load(good, "optim.lr=0.7")
    assert differences(old.results(), new.results()) == ["optim.lr: 0.3 -> 0.7"]


@pytest.mark.parametrize("path", sorted(Path("conf").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_that_is_shipped_loads(path: Path) -> None:
    assert load(path).data.batch > 0


SMALL, BIG, ONE = (
    f"{{size: {size}, count: {count}, scale: [0.1, 1.0]}}" for size, count in ((64, 4), (96, 2), (96, 1))
)


@pytest.mark.parametrize("crops", [f"[{SMALL}, {BIG}]", f"[{ONE}, {SMALL}]", f"[{ONE}]"])
def test_codes_must_come_from_two_of_the_largest_crops(good: Path, crops: str) -> None:
    with pytest.raises(ConfigError, match=r"^SET: augment\.crops: found .*; codes come from the first two") as caught:
        load(good, f"augment.crops='{crops}'")
    assert "\n" not in str(caught.value)


def test_ranks_wait_for_each_other_longer_than_one_of_them_for_the_store(good: Path) -> None:
    with pytest.raises(ConfigError, match=r"^SET: efficiency\.timeout_s: 300 s .* reader\.retry_seconds \(300 s\)"):
        load(good, "reader.retry_seconds=300 efficiency.timeout_s=300")
    assert load(good, "reader.retry_seconds=300 efficiency.timeout_s=301").efficiency.timeout_s == 301


def test_the_record_of_an_older_run_is_read_whatever_a_new_start_is_refused_for(good: Path) -> None:
    old = load(good).dump() | {"efficiency": {"timeout_s": 600.0}, "reader": {"retry_seconds": 600.0}}
    assert parse(old, "run.json").efficiency.timeout_s == 600


# Learning rates at step 0, at the end of the warm-up and at the end of the run. SwAV: scripts of its repository, batch
# 4096 and 256; SEER: arXiv 2103.01988, batch 8192, and for 128GF half of that, constant by its weights' name. VISSL, by
# which 128GF and 10B were trained, starts from the rate of one node's images.
PUBLISHED = {
    "swav_regnety_160.yaml": (0.3, 4.8, 0.0048),
    "swav_regnety_016.yaml": (0.6, 0.6, 0.0006),
    "seer_regnety_256gf.yaml": (0.15, 9.6, 0.0096),
    "seer_regnety_128gf.yaml": (0.3, 4.8, 4.8),
    "seer_regnety_10b.yaml": (0.15, 9.3, 0.0093),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rates_of_a_recipe_are_the_published_ones(name: str) -> None:
    config, steps = load(Path("conf") / name), 100_000
    moments = (0, max(0, config.optim.warmup_steps - 1), steps)
    rates = [lr_at(step, config.optim, config.data.batch, steps) for step in moments]
    assert rates == pytest.approx(PUBLISHED[name])


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_recipes_of_seer_are_one_epoch_of_a_billion_images_through_the_trunk_of_their_name(size: int) -> None:
    config, billion = load(Path("conf") / f"seer_regnety_{size}gf.yaml"), 10**9
    assert config.model.trunk == f"regnety_{size}0"
    if config.train.epochs is None:
        assert config.train.steps is not None
        assert config.train.steps * config.data.batch == pytest.approx(billion, rel=1e-3)
    else:
        assert config.train.epochs == 1


SOURCES = "data.url=null data.sources='[{url: s3://a, weight: 3}, {url: s3://b, weight: 1}]'"


def sources(text: str) -> str:
    return f"data.url=null data.sources='{text}'"


def test_a_mixture_s_fingerprint_changes_with_its_shares_and_not_with_its_places(good: Path) -> None:
    mixed = load(good, SOURCES).fingerprint()
    assert load(good, sources("[{url: s3://c, weight: 0.75}, {url: s3://d, weight: 0.25}]")).fingerprint() == mixed
    others = ["[{url: s3://a, weight: 2}, {url: s3://b, weight: 1}]", "[{url: s3://b}, {url: s3://a, weight: 3}]"]
    others += ["[{url: s3://a, weight: 3}, {url: s3://b, weight: 1}, {url: s3://c, weight: 1}]", "[{url: s3://a}]"]
    assert mixed not in {load(good, sources(one)).fingerprint() for one in others}
    assert load(good, sources("[{url: s3://a}]")).fingerprint() == load(good).fingerprint()
    assert differences(load(good, SOURCES).results(), load(good, sources(others[0])).results()) == [
        "data.shares: [3, 1] -> [2, 1]"
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.sources='[{url: s3://a}]'", "give one of data.url .* and data.sources .*; found both"),
        ("data.url=null", "found neither"),
        (sources("[{url: s3://a, share: 1}]"), r"data\.sources\.0\.share: unknown key .*; valid: url, weight"),
        (sources("[{url: s3://a, weight: 0}]"), r"data\.sources\.0\.weight: found 0"),
        (sources("[{url: s3://a}, {url: s3://a/}]"), "s3://a is there twice; give it once"),
        (sources("[{url: s3://a, weight: 1e6}, {url: s3://b}]"), "a weight of 1 is less than one in 10,000"),
    ],
)
def test_a_mixture_that_cannot_be_is_told_in_words(good: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(good, given)


def test_a_recipe_by_its_name_alone_is_one_that_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("demo", "demo.yaml"):
        with pytest.raises(ConfigError, match=f"^{name}: no such config; did you mean conf/demo.yaml\\?$"):
            load(name)
