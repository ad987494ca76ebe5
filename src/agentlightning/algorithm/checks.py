"""What the numbers that algorithms are given must be like."""

from __future__ import annotations

import math

from agentlightning.errors import InvalidValue

__all__ = ["check_counts", "check_seconds"]


def check_counts(*, least: int = 1, **counts: int) -> None:
    """Whether all are whole numbers of at least ``least``.

    Raises:
        InvalidValue: one is not.
    """
    for name, count in counts.items():
        if type(count) is not int or count < least:
            raise InvalidValue(f"{name} is {count!r}; give a whole number, at least {least}")


def check_seconds(**times: float) -> None:
    """Whether all are finite times, longer than nothing.

    Raises:
        InvalidValue: one is not.
    """
    for name, seconds in times.items():
        if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
            raise InvalidValue(f"{name} is {seconds!r}; give seconds, more than 0")
