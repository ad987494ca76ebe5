"""The event loop of runners, which an agent cannot end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, TypeVar

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


class _Ended(Exception):
    """What a loop was to run has raised something that would end a loop."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class SteadyLoop(asyncio.SelectorEventLoop):
    """A loop that goes on when a task or a callback raises ``SystemExit`` or ``KeyboardInterrupt``.

    Other loops end then, and everything in them. Here only those who await the task get the exception.
    """

    _was_stopped = False

    def stop(self) -> None:
        self._was_stopped = True
        super().stop()

    def run_forever(self) -> None:
        self._was_stopped = False
        while True:
            try:
                return super().run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                _logger.debug("something in this loop raised %r; the loop goes on", error)
            if self._was_stopped:  # in the same turn
                return None

    def run_until_complete(self, future: Generator[Any, None, _T] | Awaitable[_T]) -> _T:
        try:
            return super().run_until_complete(_guarded(future))
        except _Ended as end:
            raise end.error from None


async def _guarded(work: Any) -> Any:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise _Ended(error) from None


def run_steadily(work: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run`` with a ``SteadyLoop``. Raises what the work raises."""
    with asyncio.Runner(loop_factory=SteadyLoop) as runner:
        return runner.run(work)
