"""The base of every section of a run's config; each module owns the section that it reads."""

import re
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

_IN_WORDS = {
    r"^(Value error, |Input should be )": "",
    r"\ba valid integer": "an integer",
    r"\ba valid ": "a ",
    r"a dictionary or instance of \w+": "a mapping of its keys",
    r", (unable to parse|got) .*": "",
    r"^\w+ should have (.+) after validation, not \d+": r"\1",
}


class Section(BaseModel):
    """Frozen, and refuses keys that it does not know.

    `affects_results` says whether a change of the section changes what is learned: the fingerprint of a run, checked
    when it resumes, is the hash of those sections.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    affects_results: ClassVar[bool] = True


def what_is_valid(message: str) -> str:
    """What pydantic says of a value that it refuses, so that it may stand behind "valid is"."""
    for pattern, words in _IN_WORDS.items():
        message = re.sub(pattern, words, message)
    return message
