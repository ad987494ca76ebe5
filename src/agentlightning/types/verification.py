"""What a consistency check of a store reports."""

from __future__ import annotations

from pydantic import BaseModel

__all__ = ["VerificationReport", "Violation"]


class Violation(BaseModel):
    """One record that breaks one rule."""

    rule: str
    """Stable name of the rule, such as ``attempts_numbered``."""
    record: str
    """Which record: its kind and id, such as ``rollout ro-…``."""
    detail: str
    """What was found, and what should have been."""


class VerificationReport(BaseModel):
    """The outcome of a consistency check."""

    checked: dict[str, int]
    """How many records of each kind were looked at."""
    violations: list[Violation]
    complete: bool = True
    """Whether every violation is named; if not, there were more than the report has room for."""

    @property
    def ok(self) -> bool:
        """Whether every rule holds."""
        return not self.violations
