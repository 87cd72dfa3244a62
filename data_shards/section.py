"""The base of every section of a run's config; each module owns the section that it reads."""

import re
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

_IN_WORDS = {
    r"^(Value error, |Input should be )": "",
    r"\ba valid integer": "an integer",
    r"\ba valid tuple": "a list",
    r"\ba valid ": "a ",
    r"a dictionary or instance of \w+": "a mapping of its keys",
    r"a dictionary": "a mapping",
    r", (unable to parse|got) .*": "",
    r"^\w+ should have (.+) after validation, not \d+": r"\1",
}


class Section(BaseModel):
    """Frozen, and refuses keys that it does not know.

    `affects_results` says whether a change of the section changes what is learned: the fingerprint of a run, checked
    when it resumes, is the hash of those sections.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    affects_results: ClassVar[bool] = True

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        switches = any(isinstance(one, bool) for one in (value if isinstance(value, list | tuple) else [value]))
        if switches and _may_be(kind, int, float) and not _may_be(kind, bool):
            raise PydanticCustomError("switch", "Input should be a number, not true or false")
        return value


def _may_be(kind: Any, *types: type) -> bool:
    """Whether an annotation names one of the types."""
    return kind in types or any(_may_be(part, *types) for part in get_args(kind))


def what_is_valid(message: str) -> str:
    """What pydantic says of a value that it refuses, so that it may stand behind "valid is"."""
    for pattern, words in _IN_WORDS.items():
        message = re.sub(pattern, words, message)
    return message
