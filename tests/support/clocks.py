"""A clock that goes only when a test says so."""

from __future__ import annotations

import threading

__all__ = ["ManualClock"]


class ManualClock:
    """Both clocks of a store, standing still until moved. Safe from any thread.

    Args:
        wall: Unix seconds at which the wall clock starts.
        monotonic: seconds at which the monotonic clock starts.
    """

    def __init__(self, wall: float = 1_800_000_000.0, monotonic: float = 1_000.0) -> None:
        self._lock = threading.Lock()
        self._wall = wall
        self._monotonic = monotonic
        self._boot = monotonic

    def wall(self) -> float:
        """Unix seconds."""
        with self._lock:
            return self._wall

    def monotonic(self) -> float:
        """Seconds since some moment."""
        with self._lock:
            return self._monotonic

    def boot(self) -> float:
        """Seconds since some moment, in which nobody saw this process stand still."""
        with self._lock:
            return self._boot

    def stand_still(self, seconds: float) -> None:
        """Time passes while the process is stopped, or its machine is suspended."""
        with self._lock:
            self._wall += seconds
            self._monotonic += seconds
            self._boot += seconds

    def advance(self, seconds: float) -> None:
        """Time passes: both clocks go forward."""
        if seconds < 0:
            raise ValueError(f"time does not go back by {seconds} s; use jump_wall to set the machine's clock")
        with self._lock:
            self._wall += seconds
            self._monotonic += seconds

    def jump_wall(self, seconds: float) -> None:
        """Somebody sets the machine's clock: the wall clock alone moves, forward or back."""
        with self._lock:
            self._wall += seconds
