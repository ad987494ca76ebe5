"""How many of the latest calls failed."""

from __future__ import annotations

__all__ = ["FailureWindow"]

_SLOTS = 10


class FailureWindow:
    """Counts of calls and failures over a sliding window, kept in ten slots of it.

    Args:
        seconds: the length of the window.
    """

    def __init__(self, seconds: float) -> None:
        self._slot_seconds = seconds / _SLOTS
        self._slots: dict[int, list[int]] = {}

    def add(self, now: float, *, ok: bool) -> None:
        """A call ended at ``now``, monotonic seconds."""
        number = int(now / self._slot_seconds)
        slot = self._slots.get(number)
        if slot is None:
            self._forget(number)
            slot = self._slots[number] = [0, 0]
        slot[0] += 1
        slot[1] += not ok

    def totals(self, now: float) -> tuple[int, int]:
        """(calls, failures) in the window that ends at ``now``."""
        self._forget(int(now / self._slot_seconds))
        return sum(calls for calls, _ in self._slots.values()), sum(failed for _, failed in self._slots.values())

    def clear(self) -> None:
        """Forget all calls."""
        self._slots.clear()

    def _forget(self, newest: int) -> None:
        for number in [number for number in self._slots if number <= newest - _SLOTS]:
            del self._slots[number]
