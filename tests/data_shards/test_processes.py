import os
from collections.abc import Iterator

import pytest

from data_shards.errors import UserError
from data_shards.processes import unordered


def square(number: int) -> int:
    return number * number


def end(number: int) -> int:
    os._exit(number)


def test_one_worker_is_this_process_and_takes_no_item_ahead() -> None:
    taken = []

    def numbers() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    results = unordered(square, numbers(), 1)
    assert [next(results), next(results)] == [0, 1]
    assert taken == [0, 1]


@pytest.mark.slow
def test_several_workers_give_every_result_and_take_few_items_ahead() -> None:
    taken, got = 0, []

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    for result in unordered(square, numbers(), 2):
        assert taken <= len(got) + 2 * 2 + 1
        got.append(result)
    assert sorted(got) == [number * number for number in range(50)]


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_a_line() -> None:
    with pytest.raises(UserError, match="died") as error:
        list(unordered(end, [1], 2))
    assert "\n" not in str(error.value)
