"""What a plan says before anything is spent, and what it refuses; on folders in the place of a bucket."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_shards.errors import UserError
from data_shards.index import Manifest
from data_shards.store import Store
from jobs.cli import main
from jobs.device_memory import held_bytes
from jobs.feasible import Assumed
from jobs.plan import RESTART_S, make_plan, takes
from jobs.site import ROOT, Site
from pipeline.config import Config, load
from pipeline.module import SwAV

SEER = ROOT / "conf" / "seer_regnety_256gf.yaml"


def put_set(folder: Path, samples: int, sample_bytes: int) -> str:
    """The manifest of a set of that size, which is all that a plan reads of it."""
    each = min(samples, 10_000)
    shards = (each,) * (samples // each)
    url = f"file://{folder}/set"
    Manifest("layout", "contents", samples, shards, tuple(n * sample_bytes for n in shards), {}, {}).save(Store(url))
    return url


def site(folder: Path, **changed: Any) -> Site:
    values: dict[str, Any] = {"name": "here", "shared_dir": str(folder / "shared"), "executor": "local"}
    return Site(**{**values, **changed})


def small(url: str, *overrides: str) -> Config:
    return load(ROOT / "conf" / "demo.yaml", [f"data.url={url}", "store=file:///nowhere", *overrides])


def values(config: Config, where: Site, images_s: float | None = None) -> dict[str, Any]:
    return make_plan(config, where, images_s=images_s).to_json()


@pytest.mark.slow
def test_seers_published_figures_give_its_published_steps_and_eight_days(tmp_path):
    config = load(SEER, [f"data.url={put_set(tmp_path, 10**9, 120_000)}", "data.batch=8704"])
    where = site(tmp_path, nodes=64, ranks_per_node=8, gpus_per_node=8, price_per_gpu_hour=2.0, failures_per_node_day=0)
    said = values(config, where, images_s=8704 / 6.125)
    assert said["steps"] == 114_890  # as SEER's paper has it
    assert said["images"] == 114_890 * 8704
    assert said["step"] == pytest.approx(6.125)
    assert said["days"] == pytest.approx(8.14, abs=0.01)
    assert said["learning_rate"] == pytest.approx(0.3 * 34)
    assert said["bytes_read"] == pytest.approx(1.2e14, rel=1e-5)
    assert said["GPU_hours"] == pytest.approx(512 * (8.14 * 24 + 8 * 300 / 3600), rel=1e-3)
    assert said["money"] == pytest.approx(2 * said["GPU_hours"])
    text = "\n".join(make_plan(config, where, images_s=8704 / 6.125).text())
    assert re.search(r"^  days +8\.1 of steps, ", text, re.MULTILINE)
    assert "512 ranks" in text


@pytest.mark.slow
def test_a_model_that_no_gpu_of_the_site_holds_is_refused_before_one_is_spent(tmp_path):
    url = put_set(tmp_path, 10**9, 120_000)
    where = site(tmp_path, nodes=64, ranks_per_node=8, gpus_per_node=8, gpu_memory_gb=80)
    config = load(SEER, [f"data.url={url}"])
    said = values(config, where)
    assert 16e9 < said["model_bytes"] < 18e9  # three numbers of 4 bytes for each of its 1.4 billion parameters
    assert said["device_bytes"] == said["model_bytes"] + said["step_bytes"]
    with pytest.raises(
        UserError, match=r"regnety_10b takes 1\d\d GB before any image of each GPU, .* is 80; SET="
    ) as refused:
        make_plan(load(SEER, [f"data.url={url}", "model.trunk=regnety_10b"]), where)
    (hint,) = re.findall(r'SET="(.*?)" takes', str(refused.value))
    fits = values(load(SEER, [f"data.url={url}", "model.trunk=regnety_10b", *hint.split()]), where)
    assert "sharded" in hint
    assert fits["model_bytes"] < 1e9  # a 512th of it
    assert fits["device_bytes"] < 80e9
    assert 8 * 37e9 < fits["while_starting"] < 8 * 40e9


@pytest.mark.slow
def test_a_node_that_cannot_hold_what_its_ranks_draw_as_they_start_is_refused(tmp_path):
    url = put_set(tmp_path, 10**9, 120_000)
    node = site(tmp_path, nodes=64, ranks_per_node=8, memory_gb=40)
    with pytest.raises(UserError, match=r"memory_gb: 40 is too little for 8 ranks that draw 5.\d+ GB of weights each"):
        make_plan(load(SEER, [f"data.url={url}"]), node)


@pytest.mark.slow
def test_a_step_that_no_gpu_of_the_site_holds_is_refused_with_what_would_make_it_fit(tmp_path):
    url = put_set(tmp_path, 10**9, 120_000)
    v100 = site(tmp_path, nodes=64, ranks_per_node=8, gpus_per_node=8, gpu_memory_gb=32)
    with pytest.raises(UserError, match=r"a step of 16 images with regnety_2560 takes .* GB of each GPU") as refused:
        make_plan(load(SEER, [f"data.url={url}"]), v100)
    (hint,) = re.findall(r'SET="(.*?)" takes', str(refused.value))
    fits = values(load(SEER, [f"data.url={url}", hint]), v100)  # as it did in the paper
    assert fits["device_bytes"] < 32e9
    with pytest.raises(UserError, match=r"gpu_memory_gb is 4; more ranks.* have less each$"):
        make_plan(load(SEER, [f"data.url={url}", hint]), v100.model_copy(update={"gpu_memory_gb": 4}))


def test_failures_cost_a_restart_and_half_of_what_lies_between_two_checkpoints():
    where = Site(shared_dir="/x", nodes=64, failures_per_node_day=1 / 64, time_limit_min=1440)
    whole = takes(steps=864_000, step_s=1.0, every_steps=1000, site=where)
    assert (whole.failures, whole.time_limits) == (10, 10)
    assert whole.seconds - whole.step_seconds == 10 * (RESTART_S + 500) + 10 * RESTART_S


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["larc", "adamw"])
def test_the_bytes_of_a_checkpoint_are_those_of_the_trainers_own_state(optimizer):
    changed = [f"optim.name={optimizer}", "swav.queue=64"]
    config = small("memory://set", *changed)
    module = SwAV(config, range(config.data.lanes), 0, 1, steps=10)
    made = module.configure_optimizers()
    module.optimizers = lambda use_pl_optimizer=True: made  # type: ignore[method-assign,assignment]
    state = module.state()
    assert held_bytes(config, 1).checkpoint == sum(t.numel() * t.element_size() for t in state.values())


def test_all_that_cannot_work_is_said_at_once_a_line_each(tmp_path):
    config = small(put_set(tmp_path, 1000, 4000), "data.lanes=6", "data.batch=60")
    where = site(tmp_path, nodes=2, ranks_per_node=2, gpus_per_node=1, time_limit_min=1)
    with pytest.raises(UserError) as refused:
        make_plan(config, where)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith("data.lanes: 6 does not divide among 4 ranks (SITE=here: 2 nodes x 2); 2, 3, 6 ranks")
    assert "ranks_per_node: 2 ranks for 1 GPUs" in lines[1]
    assert "signal_delay_s: 120 is not below the time limit" in lines[2]


def test_a_gpu_that_no_node_has_is_not_asked_for(tmp_path):
    config = small(put_set(tmp_path, 1000, 4000), "loader.device=cuda")
    with pytest.raises(UserError, match=r"loader\.device: cuda, and SITE=here has no GPUs \(gpus_per_node: 0\)"):
        make_plan(config, site(tmp_path, nodes=2))


def test_lanes_that_fit_neither_the_batch_nor_the_ranks_are_both_said(tmp_path):
    config = small(put_set(tmp_path, 1000, 4000), "data.lanes=12", "model.batch_norm_lanes=4")
    with pytest.raises(UserError) as refused:
        make_plan(config, site(tmp_path, nodes=8))
    ranks, batch = str(refused.value).splitlines()
    assert "12 does not divide among 8 ranks" in ranks
    assert 'SET="data.lanes=16"' in ranks
    assert "12 does not divide data.batch (64)" in batch


@pytest.mark.slow
def test_windows_above_the_prefetch_and_above_the_nodes_memory_are_refused(tmp_path):
    url = put_set(tmp_path, 100_000, 400_000)
    window = 4 * 16 * 8 * 400_000  # lanes, chunks, samples, bytes
    with pytest.raises(UserError, match=rf'prefetch_bytes=({window})" would do'):
        make_plan(small(url, f"reader.prefetch_bytes={window - 1}"), site(tmp_path))
    held = small(url, f"reader.prefetch_bytes={window}")
    assert values(held, site(tmp_path, memory_gb=1))["1_ranks"] == window
    with pytest.raises(UserError, match=r"memory_gb: 0.1 is too little for 1 ranks that hold 205 MB"):
        make_plan(held, site(tmp_path, memory_gb=0.1))


@pytest.mark.slow
def test_the_prefetch_that_a_refusal_names_is_enough_for_the_plan_too(tmp_path):
    sizes = (4_000_000_007,) * 10  # a window of samples of their mean size is no whole number of bytes
    url = f"file://{tmp_path}/set"
    Manifest("layout", "contents", 100_000, (10_000,) * 10, sizes, {}, {}).save(Store(url))
    with pytest.raises(UserError) as refused:
        make_plan(small(url, "reader.prefetch_bytes=1000"), site(tmp_path))
    (named,) = re.findall(r'SET="(reader\.prefetch_bytes=\d+)" would do', str(refused.value))
    assert values(small(url, named), site(tmp_path))["1_ranks"] == int(named.partition("=")[2])


def test_a_length_of_no_steps_is_refused(tmp_path):
    config = small(put_set(tmp_path, 1000, 4000), "train.steps=null", "train.epochs=0.01")
    with pytest.raises(UserError, match=r"train\.epochs: 0\.01 is less than one step of 64 images"):
        make_plan(config, site(tmp_path))


def earlier_run(where: Site, name: str, config: Config, images_s: list[float], ranks: int) -> None:
    attempt = where.run_dir(name) / "a01"
    attempt.mkdir(parents=True)
    (where.run_dir(name) / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    rows = [{"result": {"step": i}, "run": {"images_s": value}} for i, value in enumerate(images_s, 1)]
    (attempt / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (attempt / "events.jsonl").write_text(json.dumps({"time": 1.0, "event": "started", "ranks": ranks}) + "\n")


@pytest.mark.slow
def test_the_speed_comes_from_the_newest_earlier_run_that_computes_the_same_and_is_scaled_to_the_ranks(tmp_path):
    url, where = put_set(tmp_path, 1000, 4000), site(tmp_path, nodes=4, images_per_s=7.0)
    config = small(url)
    assert values(config, where)["speed"] == 7.0
    earlier_run(where, "other-batch", small(url, "data.batch=128"), [900.0] * 9, 4)
    earlier_run(where, "short", config, [900.0] * 3, 4)
    assert values(config, where)["speed"] == 7.0
    earlier_run(where, "like-it", small(url, "train.steps=9"), [1.0, 90.0, 100.0, 100.0, 100.0, 300.0], 2)
    plan = make_plan(config, where)
    assert plan.to_json()["speed"] == 200.0
    assert "measured: run like-it, scaled from 2 ranks to 4" in "\n".join(plan.text())
    assert values(config, where, images_s=50.0)["speed"] == 50.0


def test_without_any_speed_the_plan_says_so_and_how_to_assume_one(tmp_path):
    plan = make_plan(small(put_set(tmp_path, 1000, 4000)), site(tmp_path))
    assert "days" not in plan.to_json()
    assert "IMAGES_PER_S=" in "\n".join(plan.text())


def test_a_set_that_is_not_packed_yet_is_planned_for_without_a_store(tmp_path):
    nowhere, here = small("s3://no-such-bucket/set"), site(tmp_path)
    made = make_plan(nowhere, here, assumed=Assumed(1000, 4000))
    packed = make_plan(small(put_set(tmp_path, 1000, 4000)), here)
    assert made.to_json() | {"config": {}} == packed.to_json() | {"config": {}}
    assert "assumed: 1,000 images of 4 kB, 4 MB in all" in "\n".join(made.text())
    with pytest.raises(UserError, match=r"the set of 100 samples has 12"):
        make_plan(nowhere, here, assumed=Assumed(100, 4000))
    several = small("null", "data.sources=[{url: 's3://a'}, {url: 's3://b'}]")
    with pytest.raises(UserError, match=r"data\.sources: SAMPLES= stands for one set, not for 2"):
        make_plan(several, here, assumed=Assumed(1000, 4000))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sample-bytes", "4000"], "SAMPLE_BYTES= is of the images that SAMPLES= counts; give both"),
        (["--samples", "0"], "'0' is no whole number above 0"),
        (["--images-per-s", "0"], "'0' is no number above 0"),
        (["--images-per-s", "nan"], "'nan' is no number above 0"),
        (["--images-per-s", "fast"], "'fast' is no number above 0"),
    ],
)
def test_what_cannot_be_assumed_is_said_in_a_line(options, said, tmp_path, capsys):
    place = tmp_path / "here.yaml"
    place.write_text(f"shared_dir: {tmp_path}/shared\nexecutor: local\n")
    assert main(["plan", str(ROOT / "conf/demo.yaml"), "--site", str(place), *options]) == 2
    assert said in capsys.readouterr().err


def test_the_mistakes_of_config_and_site_are_told_together(tmp_path, capsys):
    conf, place = tmp_path / "bad.yaml", tmp_path / "bad_site.yaml"
    conf.write_text("data: {url: 's3://x', batch: 4, lanes: 4, lane: 3}\ntrain: {steps: 1}\n")
    place.write_text("shared_dir: /x\npartitoin: gpu\n")
    assert main(["plan", str(conf), "--site", str(place)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "partitoin: unknown key" in told.err
    assert "data.lane: unknown key" in told.err


def test_the_plan_is_json_for_scripts_and_holds_the_script_and_the_config(tmp_path, capsys):
    url = put_set(tmp_path, 1000, 4000)
    place = tmp_path / "here.yaml"
    place.write_text(f"shared_dir: {tmp_path}/shared\nexecutor: local\n")
    arguments = ["plan", str(ROOT / "conf/demo.yaml"), "--set", f"data.url={url}", "--site", str(place)]
    assert main([*arguments, "--json", "--images-per-s", "64"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], said["speed"], said["step"]) == (560, 64.0, 1.0)
    assert said["config"]["data"]["url"] == url
    assert "supervise serve" in said["script"]
    assert not (tmp_path / "shared").exists()


def test_the_plan_of_a_mixture_says_the_share_and_the_epochs_of_each_set(tmp_path):
    large = put_set(tmp_path / "large", 10_000, 4000)
    small_url = f"file://{tmp_path}/small"
    Manifest("other", "contents", 1000, (1000,), (4_000_000,), {}, {}).save(Store(small_url))
    pairs = f"[{{url: '{large}', weight: 3}}, {{url: '{small_url}', weight: 1}}]"
    made = make_plan(small("null", f"data.sources={pairs}", "train.steps=100"), site(tmp_path))
    text = "\n".join(made.text())
    images = 100 * made.config.data.batch
    assert f"75.00% of the images, {0.75 * images / 10_000:,.2f} epochs of its 10,000" in text
    assert f"25.00% of the images, {0.25 * images / 1000:,.2f} epochs of its 1,000" in text


@pytest.mark.parametrize(
    ("url", "said"),
    [("s3:/runs", "store: s3:/runs: not the url of a store"), ("memory://x", "store: memory://x is the memory of one")],
)
def test_a_store_that_no_rank_could_use_is_refused(tmp_path, url, said):
    with pytest.raises(UserError, match=said):
        make_plan(small(put_set(tmp_path, 1000, 4000), f"store={url}"), site(tmp_path))
