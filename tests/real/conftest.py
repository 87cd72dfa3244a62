"""What tests on real parts share: a small set of photographs packed into the real S3, and a bucket for runs."""

from typing import Any

import pytest

from data_shards.pack import PackSettings, pack
from data_shards.store import Store
from tests.conftest import once
from tests.photos import write_tiles


@pytest.fixture(scope="session")
def tiny_set(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """192 tiles of real photographs in several shards."""

    def make() -> str:
        url: str = s3.bucket("shards")
        pack(write_tiles(tmp_path_factory.mktemp("tiles"), 192), Store(url), PackSettings(shard_bytes=150_000))
        return url

    return once(tmp_path_factory, "tiny-set", make)


@pytest.fixture(scope="session")
def runs(s3: Any) -> str:
    return str(s3.bucket("runs"))
