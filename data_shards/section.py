"""The base of every section of a run's config; each module owns the section that it reads."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and refuses keys that it does not know.

    `affects_results` says whether a change of the section changes what is learned: the fingerprint of a run, checked
    when it resumes, is the hash of those sections.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    affects_results: ClassVar[bool] = True
