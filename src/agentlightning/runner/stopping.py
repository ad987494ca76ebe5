"""Waits, in a coroutine, for an event that belongs to threads or processes."""

from __future__ import annotations

import asyncio
import threading
from typing import Protocol

__all__ = ["StopEvent", "StopWatch"]

_LOOK_SECONDS = 0.5


class StopEvent(Protocol):
    """What this needs of an ``ExecutionEvent``."""

    def is_set(self) -> bool:
        """Whether it is set."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it, at most ``timeout`` seconds."""
        ...


class StopWatch:
    """``stopped`` is set, in this loop, as soon as the event is. The waiting happens in a thread.

    Use as a context manager, inside of the loop.

    Args:
        event: what to wait for; None: for ever.
    """

    def __init__(self, event: StopEvent | None) -> None:
        self.stopped = asyncio.Event()
        self._event = event
        self._done = False

    def __enter__(self) -> StopWatch:
        if self._event is not None:
            if self._event.is_set():
                self.stopped.set()
            else:
                loop = asyncio.get_running_loop()
                threading.Thread(target=self._watch, args=(self._event, loop), name="agl-stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True

    def _watch(self, event: StopEvent, loop: asyncio.AbstractEventLoop) -> None:
        while not self._done:
            if event.wait(_LOOK_SECONDS):
                if not self._done and not loop.is_closed():
                    loop.call_soon_threadsafe(self.stopped.set)
                return
