"""The reader through a wire on which things go wrong: the batches are those of an undisturbed one, each time."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.fetch import HEDGE_SHARE
from data_shards.reader import Reader
from data_shards.store import Denied, Unavailable
from jobs.daemons import wait_until
from tests.proxy import Wire
from tests.real.test_reader_s3 import ORDER, STEPS, check, opened, reader_of, samples, url

__all__ = ["samples", "url"]  # fixtures

pytestmark = pytest.mark.slow


@pytest.fixture
def wire(s3: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A proxy that later clients go through; the set is there already."""
    wire = Wire(s3.server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.url)
    yield wire
    wire.close()


def disturbed(wire: Wire, url: str, faults: list[str], **changes: Any) -> Reader:
    """A reader of a set that was opened in peace."""
    shards = opened(url, changes.get("retry_seconds", 20.0))
    wire.faults = faults
    return reader_of(url, shards=shards, **changes)


@pytest.mark.parametrize("fault", ["reset", "unwell", "a page", "cut", "torn", "wrong", "expired"])
def test_a_fault_at_every_third_request_replaces_nothing(
    url: str, wire: Wire, samples: list[bytes], fault: str
) -> None:
    with disturbed(wire, url, [fault, "", ""] * 12) as reader:
        for step in STEPS:
            check(reader.batch(step), step, samples)
        assert reader.bad == []
        assert reader.counters["retries"] >= 1  # a reset before an answer, aiohttp asks again by itself


def test_all_of_them_at_once_with_a_cache_replace_nothing(
    url: str, wire: Wire, samples: list[bytes], tmp_path: Path
) -> None:
    faults = ["torn", "wrong", "unwell", "", "cut", "reset", "late", "wrong"] * 6
    with disturbed(wire, url, faults, cache_dir=str(tmp_path)) as reader:
        for step in STEPS:
            check(reader.batch(step), step, samples)
        assert reader.bad == []
    with reader_of(url, cache_dir=str(tmp_path)) as again:  # nothing wrong has come into the cache
        for step in STEPS:
            check(again.batch(step), step, samples)
        assert again.counters["retries"] == 0
        assert again.counters["cache_hits"] > 0


def test_a_burst_of_503_is_waited_out(url: str, wire: Wire, samples: list[bytes]) -> None:
    with disturbed(wire, url, ["unwell"] * 24) as reader:
        for step in STEPS:
            check(reader.batch(step), step, samples)
        assert reader.bad == []
        assert reader.counters["retries"] >= 24


def test_latency_changes_nothing(url: str, wire: Wire, samples: list[bytes]) -> None:
    wire.delay_s = 0.2
    with disturbed(wire, url, ["late"] * 1000) as reader:
        for step in STEPS:
            check(reader.batch(step), step, samples)
        assert reader.counters["retries"] == 0
        assert reader.counters["in_flight"] <= 16


@pytest.mark.parametrize("fault", ["slow", "silence"])
def test_an_answer_that_stalls_is_given_up_at_the_attempts_deadline_and_asked_for_again(
    url: str, wire: Wire, samples: list[bytes], fault: str
) -> None:
    wire.delay_s = 60.0
    with disturbed(wire, url, ["", fault, ""] * 4, retry_seconds=12.0, hedge=False) as reader:  # attempts of 3 s
        for step in STEPS:
            check(reader.batch(step), step, samples)
        assert reader.bad == []
        assert reader.counters["retries"] >= 1


@pytest.mark.parametrize("fault", ["late", "slow", "silence"])
def test_a_second_request_brings_what_a_stalled_one_does_not(
    url: str, wire: Wire, samples: list[bytes], fault: str
) -> None:
    wire.delay_s = 300.0  # an attempt is given up after 30 s, and then counts as a retry
    with disturbed(wire, url, [""] * 50 + [fault], retry_seconds=600.0) as reader:
        for step in STEPS:
            check(reader.batch(step), step, samples)
        assert wait_until(lambda: reader.counters["hedged"] >= 1, 20)  # also for what is fetched ahead
        assert reader.counters["hedged"] <= 1 + HEDGE_SHARE * reader.counters["requests"]
        assert reader.counters["retries"] == 0
        assert reader.bad == []


def test_few_requests_have_a_second_one_however_many_stall(url: str, wire: Wire, samples: list[bytes]) -> None:
    wire.delay_s = 3.0
    with disturbed(wire, url, [""] * 50 + ["late"] * 30) as reader:
        for step in STEPS:
            check(reader.batch(step), step, samples)
        assert 1 <= reader.counters["hedged"] <= 1 + HEDGE_SHARE * reader.counters["requests"]


def test_a_server_that_is_gone_ends_the_reading_within_its_time_in_one_line_and_no_sample_is_bad(
    url: str, wire: Wire, samples: list[bytes]
) -> None:
    one_window = int(4 * ORDER.window_samples * 17_000)
    with reader_of(url, retry_seconds=8, prefetch_bytes=one_window) as reader:
        check(reader.batch(0), 0, samples)
        wire.close()
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="has not answered for") as error:
            _ = [reader.batch(step) for step in range(1, 2000)]
        assert "\n" not in str(error.value)
        assert time.monotonic() - begun < 30
        assert reader.bad == []


def test_a_token_that_has_expired_for_good_ends_the_reading_in_one_line(
    url: str, wire: Wire, samples: list[bytes]
) -> None:
    with disturbed(wire, url, [], retry_seconds=8, prefetch_bytes=int(4 * ORDER.window_samples * 17_000)) as reader:
        check(reader.batch(0), 0, samples)
        wire.faults = ["expired"] * 10_000
        with pytest.raises(Denied, match=r"access denied at .* \(ExpiredToken\); renew it") as error:
            _ = [reader.batch(step) for step in range(1, 2000)]
        assert "\n" not in str(error.value)
        assert reader.bad == []


def test_nothing_is_listed_and_only_what_is_needed_is_asked_for(url: str, wire: Wire, samples: list[bytes]) -> None:
    with reader_of(url, start=100) as reader:
        check(reader.batch(100), 100, samples)
        settled = time.monotonic() + 20
        while reader.counters["in_flight"] and time.monotonic() < settled:
            time.sleep(0.02)
    asked = [request.split("?")[0].rpartition("/")[2] for request in wire.requests]
    assert asked[0] == "MANIFEST.json"
    assert {name.rpartition(".")[2] for name in asked[1:]} == {"idx", "tar"}
    assert all(request.startswith("GET ") for request in wire.requests)
    assert not [request for request in wire.requests if "list-type" in request or "prefix=" in request]
    assert asked.count("000000.idx") == 1
