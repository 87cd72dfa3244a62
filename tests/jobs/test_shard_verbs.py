import os
from pathlib import Path

import pytest

from jobs import site
from jobs.shard_verbs import use_keys
from tests.conftest import kept_environment

SITE = "name: local\nexecutor: local\nshared_dir: /tmp\nenvironment: {AWS_PROFILE: of-the-site}\n"


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The local site is up, and the environment names no keys."""
    (tmp_path / "site.yaml").write_text(SITE)
    monkeypatch.setattr(site, "LOCAL", tmp_path / "site.yaml")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("up")
def test_without_a_site_the_keys_are_the_local_ones_unless_the_environment_names_some() -> None:
    with kept_environment():
        use_keys(None)
        assert os.environ["AWS_PROFILE"] == "of-the-site"
    with kept_environment():
        os.environ["AWS_PROFILE"] = "mine"
        use_keys(None)
        assert os.environ["AWS_PROFILE"] == "mine"
        use_keys("local")
        assert os.environ["AWS_PROFILE"] == "of-the-site"


@pytest.mark.usefixtures("up")
@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS"])
def test_a_variable_that_names_no_keys_leaves_the_local_ones(name: str) -> None:
    with kept_environment():
        os.environ[name] = "something"
        use_keys(None)
        assert os.environ["AWS_PROFILE"] == "of-the-site"


@pytest.mark.usefixtures("up")
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL_S3", "AWS_CONTAINER_CREDENTIALS_FULL_URI"])
def test_a_variable_that_names_keys_or_a_store_is_obeyed(name: str) -> None:
    with kept_environment():
        os.environ[name] = "something"
        use_keys(None)
        assert "AWS_PROFILE" not in os.environ
