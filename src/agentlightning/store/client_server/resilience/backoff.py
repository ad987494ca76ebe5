"""How long to wait before the next try."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["Backoff", "FixedDelays", "FullJitter", "retry_after_seconds"]

_LONGEST_RETRY_AFTER = 3600.0


class Backoff(Protocol):
    """Says how long to wait after a number of failed tries."""

    def delay(self, failed_tries: int) -> float | None:
        """Seconds before the next try; None: there shall be none."""
        ...


class FullJitter:
    """Exponential back-off with full jitter: a random time up to ``base * 2 ** n``, at most ``cap``.

    Spreading over the whole interval is what keeps many clients from returning together (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    Args:
        base_seconds: the most that is waited before the second try.
        cap_seconds: the most that is waited before any try.
        random: a number from 0 up to 1.
    """

    def __init__(self, base_seconds: float, cap_seconds: float, random: Callable[[], float]) -> None:
        self._base = base_seconds
        self._cap = cap_seconds
        self._random = random

    def delay(self, failed_tries: int) -> float | None:
        return self._random() * min(self._cap, self._base * 2.0 ** min(failed_tries - 1, 60))


class FixedDelays:
    """The delays that a caller lists, and no more tries than they allow.

    Args:
        delays: seconds before the second, third, … try.
    """

    def __init__(self, delays: Sequence[float]) -> None:
        self._delays = tuple(delays)

    def delay(self, failed_tries: int) -> float | None:
        return self._delays[failed_tries - 1] if failed_tries <= len(self._delays) else None


def retry_after_seconds(value: str | None, wall: Callable[[], float] = time.time) -> float | None:
    """What a ``Retry-After`` header asks for (RFC 9110, section 10.2.3: seconds, or a date); None if it is no such.

    Args:
        value: the header's text, or None if there was none.
        wall: Unix seconds now, which a date is compared with.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), _LONGEST_RETRY_AFTER)
    try:
        moment = email.utils.parsedate_to_datetime(text)
        seconds = moment.timestamp() - wall()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)
