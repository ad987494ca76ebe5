"""A bound on how much retries may add to the load of a server that is already in trouble."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["RetryBudget"]


class RetryBudget:
    """Tokens for retries: some for each first try, some with time. Who finds none waits for one; nobody is refused.

    Args:
        ratio: retries earned by each first try.
        per_second: retries earned by each second, so that a quiet client can retry too.
        capacity: the most that can be saved up.
        monotonic: seconds since some moment.
    """

    def __init__(self, *, ratio: float, per_second: float, capacity: float, monotonic: Callable[[], float]) -> None:
        self._ratio = ratio
        self._per_second = per_second
        self._capacity = capacity
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._tokens = capacity
        self._at = monotonic()

    def earn(self) -> None:
        """A first try is made."""
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + self._ratio)

    def spend(self) -> float:
        """Take a token for a retry; returns the seconds to wait until it is there."""
        with self._lock:
            now = self._monotonic()
            self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._per_second)
            self._at = now
            self._tokens -= 1
            return max(0.0, -self._tokens / self._per_second)

    def refund(self) -> None:
        """A token that was taken is not used after all."""
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + 1)
