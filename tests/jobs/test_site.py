import os
from pathlib import Path

import pytest

from data_shards.errors import UserError
from jobs.site import SITES, Site, export_lines, load_site


@pytest.fixture(autouse=True)
def no_store_of_ours(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_site_is_read_with_its_name_and_defaults(tmp_path):
    name = write(tmp_path, "shared_dir: /shared\nnodes: 4\nranks_per_node: 8")
    site = load_site(name)
    assert (site.name, site.executor, site.ranks) == (name, "slurm", 32)
    assert site.option == f" SITE={name}"
    assert Site(name="local", shared_dir="/shared").option == ""
    assert site.run_dir("first") == Path("/shared/first")


def test_every_example_site_is_valid():
    for path in SITES.glob("*.yaml"):
        assert load_site(path.stem).name == path.stem


def test_each_mistake_of_a_site_is_a_line_with_file_key_and_what_is_valid(tmp_path):
    path = write(tmp_path, "nodes: 0\npartitoin: gpu\nexecutor: pbs")
    with pytest.raises(UserError) as refused:
        load_site(path)
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert "shared_dir: missing" in str(refused.value)
    assert "partitoin: unknown key; valid: " in str(refused.value)
    assert "nodes: found 0; valid is greater than 0" in str(refused.value)
    assert "executor: found 'pbs'; valid is 'slurm' or 'local'" in str(refused.value)


@pytest.mark.parametrize("said", ["~/farseer", "$HOME/farseer", "${HOME}/farseer"])
def test_a_shared_folder_in_ones_home_is_where_the_shell_would_look(tmp_path, monkeypatch, said):
    monkeypatch.setenv("HOME", "/home/ada")
    assert load_site(write(tmp_path, f"shared_dir: {said}")).run_dir("first") == Path("/home/ada/farseer/first")


@pytest.mark.parametrize("said", ["runs", "./runs", "$NOT_SET_ANYWHERE/x", "/data/$NOT_SET_ANYWHERE", "~nobody_here/x"])
def test_a_shared_folder_that_another_folder_or_node_would_take_for_another_one_is_refused(tmp_path, said):
    path = write(tmp_path, f"shared_dir: {said}")
    with pytest.raises(UserError) as refused:
        load_site(path)
    line = f"{path}: shared_dir: found '{said}'; valid is an absolute path, such as /shared/farseer or ~/farseer"
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("nodes: 4", "no nodes: the site says it by nodes"),
        ("cpus-per-task: 4", "no cpus-per-task: the site says it by cpus_per_rank"),
        ("job_name: mine", "no job_name: Farseer has its own"),
        ("comment: mine", "no comment: Farseer has its own"),
        ("no-requeue: true", "no no-requeue: Farseer has its own"),
    ],
)
def test_an_option_that_follows_from_other_keys_or_is_farseers_is_refused(tmp_path, option, why):
    (tmp_path / "mine.yaml").write_text(f"shared_dir: /shared\nextra: {{{option}}}\n")
    with pytest.raises(UserError, match=why):
        load_site(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("option", ["gpus-per-task: 1", "gpus_per_task: 1", "gpu-bind: closest"])
def test_an_option_that_would_hide_gpus_from_a_rank_is_refused(tmp_path, option):
    path = write(tmp_path, f"shared_dir: /shared\ngpus_per_node: 8\nextra: {{{option}}}")
    with pytest.raises(UserError, match=r"extra: .*with gpus_per_node each rank takes one of its node by itself"):
        load_site(path)


@pytest.mark.parametrize("text", ["", "- a", "a: b: c", "\tx"])
def test_a_site_file_that_holds_no_settings_is_refused_in_a_line(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=r"mine\.yaml") as refused:
        load_site(path)
    assert "\n" not in str(refused.value)


def test_a_site_file_that_cannot_be_read_is_refused_in_a_line(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("shared_dir: /geräte".encode("latin-1"))
    (tmp_path / "open.yaml").write_text("nodes: 2\nshared_dir: {\n")
    (tmp_path / "twice.yaml").write_text("nodes: 2\nshared_dir: /shared\nnodes: 4\n")
    (tmp_path / "date.yaml").write_text("shared_dir: /shared\naccount: 2024-02-30\n")
    said = {
        "folder.yaml": ": cannot be read: Is a directory",
        "latin.yaml": ": not valid YAML: 'utf-8' codec can't decode .*",
        "open.yaml": ":3: not valid YAML: expected the node content, .*",
        "twice.yaml": ":3: not valid YAML: nodes is there twice; keep one",
        "date.yaml": ": not valid YAML: day is out of range for month",
    }
    for name, words in said.items():
        with pytest.raises(UserError, match=rf"^{tmp_path}/{name}{words}$"):
            load_site(str(tmp_path / name))


def test_before_there_is_a_cluster_on_this_machine_its_site_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.site.LOCAL", tmp_path / "site.yaml")
    with pytest.raises(UserError, match="SITE=local: no cluster runs on this machine; make cluster-up starts one"):
        load_site("local")
    (tmp_path / "site.yaml").write_text("shared_dir: /shared")
    assert load_site("local").name == "local"


def test_the_partition_is_the_sites_else_that_of_who_submits(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "theirs")
    assert Site(shared_dir="/shared", partition="gpu").used_partition == "gpu"
    assert Site(shared_dir="/shared").used_partition == "theirs"
    monkeypatch.setenv("SBATCH_PARTITION", "")
    assert Site(shared_dir="/shared").used_partition is None


def test_an_unknown_site_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"SITE=nope: .*there are: local, .*slurm_example"):
        load_site("nope")


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "db_password"]
)
def test_a_secret_in_a_site_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} holds a secret"):
        Site(shared_dir="/x", environment={name: "abc"})


def test_a_file_of_secrets_may_be_named():
    named = {"AWS_SHARED_CREDENTIALS_FILE": "/etc/farseer/credentials", "AWS_WEB_IDENTITY_TOKEN_FILE": "/run/token"}
    assert Site(shared_dir="/x", environment=named).environment == named


@pytest.mark.parametrize(
    "said", ["{AWS_SECRET_ACCESS_KEY: wJalrX}", "AWS_SECRET_ACCESS_KEY=wJalrX", "{HF_HOME: [wJalrX]}"]
)
def test_no_value_of_a_refused_environment_is_shown(tmp_path, said):
    path = write(tmp_path, f"shared_dir: /x\nenvironment: {said}")
    with pytest.raises(UserError, match=r"environment.*: valid is ") as refused:
        load_site(path)
    assert "wJalrX" not in str(refused.value)


def test_a_site_that_names_a_profile_is_not_overruled_by_what_was_inherited(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.setenv(name, "inherited")
    monkeypatch.setenv("AWS_PROFILE", "inherited")
    monkeypatch.setenv("WANDB_MODE", "offline")
    Site(shared_dir="/x", environment={"AWS_PROFILE": "farseer"}).activate()
    assert {name: value for name, value in os.environ.items() if name.startswith("AWS_")} == {"AWS_PROFILE": "farseer"}
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_job_that_submits_hands_nothing_of_itself_on_but_where_slurm_is(monkeypatch):
    own = {"SLURM_MEM_PER_NODE": "4096", "SLURM_JOB_ID": "7", "SBATCH_EXPORT": "ALL", "SRUN_DEBUG": "3"}
    own |= {"SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "low"}
    for name, value in {**own, "SLURM_CONF": "/etc/slurm.conf", "SLURMD_NODENAME": "node1"}.items():
        monkeypatch.setenv(name, value)
    Site(shared_dir="/x", executor="local").activate()
    assert os.environ.items() >= own.items()
    Site(shared_dir="/x", partition="gpu", environment={"SBATCH_RESERVATION": "ours"}).activate()
    left = {name: os.environ[name] for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    assert left == {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_RESERVATION": "ours", "SBATCH_ACCOUNT": "mine"}
    assert os.environ["SLURMD_NODENAME"] == "node1"


def test_what_a_profile_has_set_for_slurms_tools_does_not_change_what_they_answer(monkeypatch):
    names = ("SQUEUE_USERS", "SQUEUE_STATES", "SINFO_PARTITION", "SCANCEL_NAME", "SCONTROL_ALL")
    for name in names:
        monkeypatch.setenv(name, "mine")
    Site(shared_dir="/x").activate()
    assert not os.environ.keys() & set(names)


def test_a_key_in_the_environment_is_refused_for_slurm_because_it_would_not_travel(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY would not travel") as refused:
        Site(shared_dir="/x").activate()
    assert "abc" not in str(refused.value)
    Site(shared_dir="/x", executor="local").activate()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a" * 65, "a b", "-x", "a\n"])
def test_a_run_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(UserError, match="RUN: found"):
        Site(shared_dir="/shared").run_dir(name)


def test_values_with_quotes_and_spaces_survive_the_shell():
    assert export_lines({"A": "it's $HOME"}) == ["export A='it'\"'\"'s $HOME'"]
