"""How ranks come to one mind about an error."""

import errno

import pytest

from data_shards.errors import BadHost, UserError
from data_shards.store import Unavailable
from pipeline.ranks import Ranks
from tests.pipeline import distributed

pytestmark = pytest.mark.slow  # starts two processes

ERRORS = {
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "code": TypeError("no number"),
    "config": UserError("data.lanes: 3 does not divide"),
    "store": Unavailable("s3://runs: has not answered"),
    "host": BadHost("node7", "its disk is broken"),
}
Heard = tuple[str, str, int | None, bool]


def raise_on_the_last(rank: int) -> dict[str, Heard]:
    """Type, text, exit code and `passing` of what this rank raises for each error of the last one."""
    heard = {}
    ranks = Ranks(rank, 2, None)

    def work(error: Exception) -> str:
        if rank == 1:
            raise error
        return "done"

    for name, error in ERRORS.items():
        try:
            ranks.together(lambda error=error: work(error))
        except Exception as raised:  # noqa: BLE001 - whatever it is, the test looks at it
            passing = getattr(raised, "passing", False)
            heard[name] = (type(raised).__name__, str(raised), getattr(raised, "exit_code", None), passing)
    assert ranks.together(lambda: rank) == [0, 1]
    return heard


@pytest.fixture(scope="module")
def heard() -> list[dict[str, Heard]]:
    return distributed.run(2, raise_on_the_last)


def test_the_rank_itself_raises_its_own_error(heard: list[dict[str, Heard]]) -> None:
    assert {name: (kind, text) for name, (kind, text, *_) in heard[1].items()} == {
        name: (type(error).__name__, str(error)) for name, error in ERRORS.items()
    }


def test_the_others_raise_one_that_is_judged_as_it_is(heard: list[dict[str, Heard]]) -> None:
    said = heard[0]
    assert said["disk"][:2] == ("UserError", "rank 1: OSError: [Errno 28] No space left on device")
    assert said["config"] == ("UserError", "rank 1: data.lanes: 3 does not divide", 2, False)
    assert said["store"] == ("Unavailable", "rank 1: s3://runs: has not answered", 2, True)
    assert said["host"][:2] == ("UserError", "rank 1: bad host node7: its disk is broken")
    assert said["code"] == ("UserError", "rank 1: TypeError: no number", 1, False)
    assert said["disk"][3]  # another start, or another node, may have room
    assert said["host"][3]
