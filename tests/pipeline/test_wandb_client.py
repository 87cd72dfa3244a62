"""Where W&B's client writes: online with a key for its server, else offline."""

from pathlib import Path

import pytest

from pipeline.wandb_client import wandb_mode

SECRET = "planted-0123456789abcdef0123456789abcdef"


pytestmark = pytest.mark.usefixtures("no_wandb_key")


def netrc(tmp_path: Path, host: str) -> str:
    path = tmp_path / "netrc"
    path.write_text(f"machine {host}\n  login user\n  password {SECRET}\n")
    return str(path)


def test_wandb_is_offline_without_a_key_and_online_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("NETRC", netrc(tmp_path, "api.wandb.ai"))
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("NETRC", netrc(tmp_path, "example.org"))
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert wandb_mode("auto") == "online"
    for mode in ("online", "offline", "disabled"):
        assert wandb_mode(mode) == mode


def test_the_key_of_an_own_wandb_server_counts_only_for_that_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
    monkeypatch.setenv("NETRC", netrc(tmp_path, "wandb.example.org:8080"))
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("NETRC", netrc(tmp_path, "api.wandb.ai"))
    assert wandb_mode("auto") == "offline"


def test_without_netrc_variable_the_home_folder_is_looked_into_and_a_broken_file_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode("auto") == "offline"
    Path(netrc(tmp_path, "api.wandb.ai")).rename(tmp_path / ".netrc")
    assert wandb_mode("auto") == "online"
    (tmp_path / ".netrc").write_text("machine without a word of sense")
    assert wandb_mode("auto") == "offline"
