"""The stop event: how the two sides of a run are told to come to an end."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.context import BaseContext
from typing import Protocol

__all__ = ["ExecutionEvent", "MultiprocessingEvent", "ThreadingEvent"]


class ExecutionEvent(Protocol):
    """A flag that one side sets and the other sees."""

    def set(self) -> None:
        """Raise the flag; idempotent."""
        ...

    def clear(self) -> None:
        """Lower the flag."""
        ...

    def is_set(self) -> bool:
        """Whether the flag is up."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Block the calling thread until the flag is up, or for ``timeout`` seconds; whether it is up."""
        ...


class ThreadingEvent:
    """A flag for the threads of one process."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._event.wait(timeout)


class MultiprocessingEvent:
    """A flag for processes that are started by ``multiprocessing``, to which it is given at their start.

    Args:
        ctx: the context that starts them; None: the default one.
    """

    __slots__ = ("_event",)

    def __init__(self, *, ctx: BaseContext | None = None) -> None:
        self._event = (ctx or multiprocessing.get_context()).Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._event.wait(timeout)
