"""An event loop whose clock moves only when there is nothing else to do, and then at once to the next deadline."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["VirtualLoop", "in_virtual_time"]

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Never waits: the time that it should have waited has passed when it returns."""

    passed = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits for something that no clock brings")
        self.passed += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """``asyncio.sleep(3600)`` takes an hour of ``time()``, and none of anybody's."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._virtual.passed


def in_virtual_time(test: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function to its end; it is given the clock, in seconds since the beginning."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        return runner.run(test(loop.time))
