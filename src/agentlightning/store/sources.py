"""The clocks of a store: one that people read, and one that deadlines are compared with."""

from __future__ import annotations

import os
import random
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol

_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""On Linux CLOCK_MONOTONIC, and with it ``time.monotonic``, stands still with the machine; elsewhere it does not."""


class Clock(Protocol):
    """Where time comes from; tests bring their own."""

    def wall(self) -> float:
        """Unix seconds; may jump when the machine's clock is set."""
        ...

    def monotonic(self) -> float:
        """Seconds since some moment; never jumps."""
        ...

    def boot(self) -> float:
        """Seconds since some moment, at which a running process looks all the time. If it could not look for a while,
        it stood still: it was stopped, or its machine was suspended."""
        ...


class SystemClock:
    """The machine's clocks."""

    wall = staticmethod(time.time)

    monotonic = boot = staticmethod(partial(time.clock_gettime, _BOOT_CLOCK))
    """Seconds since the machine was started, also those in which it was suspended."""


# --- Ids that sort by time, so that indexes grow at their end instead of everywhere ---

_VERSION_7 = 0x7 << 76
_VARIANT = 0b10 << 62
_RANDOM_BITS = (1 << 12) - 1 << 64 | (1 << 62) - 1


class IdSource(Protocol):
    """Makes ids that never repeat."""

    def mint(self, prefix: str) -> str:
        """A new id that begins with ``prefix``, such as ``ro-``."""
        ...


class TimeOrderedIds:
    """UUIDv7 bodies behind a prefix.

    The random bits come from a generator of its own, seeded by the system, and again in every
    forked child; ids are unique, not secret.

    Args:
        wall: Unix seconds.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._random = random.Random()
        generator = weakref.ref(self._random)
        os.register_at_fork(after_in_child=lambda: _seed(generator()))

    def mint(self, prefix: str) -> str:
        """A new id that begins with ``prefix``."""
        milliseconds = int(self._wall() * 1000) & 0xFFFF_FFFF_FFFF
        noise = self._random.getrandbits(80) & _RANDOM_BITS
        return f"{prefix}{milliseconds << 80 | _VERSION_7 | noise | _VARIANT:032x}"


def _seed(generator: random.Random | None) -> None:
    if generator is not None:
        generator.seed()
