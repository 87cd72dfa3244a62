"""What every section of a config refuses, whichever it is."""

from typing import Any

import pytest
from pydantic import ValidationError

from data_shards.section import Section, what_is_valid


class Example(Section):
    count: int = 1
    rate: float | None = None
    widths: tuple[int, ...] = (2, 3)
    name: str = ""
    switch: bool = False
    options: dict[str, str | int | bool] | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        ({"count": True}, "a number, not true or false"),
        ({"rate": False}, "a number, not true or false"),
        ({"widths": [True, 3]}, "a number, not true or false"),
        ({"rate": float("inf")}, "a finite number"),
        ({"rate": float("nan")}, "a finite number"),
        ({"name": True}, "a string"),
    ],
)
def test_a_switch_is_no_number_and_a_number_has_an_end(values: dict[str, Any], valid: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Example.model_validate(values)
    assert [what_is_valid(error["msg"]) for error in refused.value.errors()] == [valid]


def test_switches_stay_where_they_belong() -> None:
    values = {"switch": True, "options": {"exclusive": True, "exclude": "node9"}, "anything": True, "rate": 1}
    assert Example.model_validate(values).model_dump(exclude_unset=True) == values
