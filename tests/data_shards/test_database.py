"""DuckDB as it is opened here."""

from pathlib import Path

import pytest

from data_shards.database import connect


def test_no_progress_bar_goes_to_stdout_and_nothing_is_fetched_from_the_internet(tmp_path: Path) -> None:
    with connect(tmp_path, 2**28) as database:
        for name in ("enable_progress_bar", "autoinstall_known_extensions"):
            assert database.execute(f"select current_setting('{name}')").fetchone() == (False,)


@pytest.mark.slow
def test_memory_is_limited_and_the_rest_goes_into_the_folder(tmp_path: Path) -> None:
    with connect(tmp_path, 64 * 2**20) as database:
        database.execute("create table t as select range as n, hash(range)::varchar as h from range(3000000)")
        assert database.execute("select count(distinct h) from t").fetchone() == (3_000_000,)
    assert (tmp_path / "work.duckdb").stat().st_size > 2**20
