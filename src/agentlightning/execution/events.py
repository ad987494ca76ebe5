"""The stop event: how the two sides of a run are told to come to an end."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any, Protocol, Self


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


# --- Ctrl+C, and the request of a system that wants this process to end ---

_log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt, SystemExit):
    """The run was stopped by a signal, and everything it had started has ended.

    It is a ``KeyboardInterrupt`` to those who catch one. In a program that lets it pass it ends the process
    without a traceback, with the exit code that shells give to such an end: 128 and the number of the signal,
    which makes 130 for Ctrl+C.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"the run was stopped by {signal.Signals(number).name}")
        self.code = 128 + number


class Interrupts:
    """While it is entered, in the main thread, a signal begins an abort; a second one hurries it.

    SIGINT, SIGTERM, and SIGHUP, which a terminal sends when it is closed; the last two are left to whoever handles
    or ignores them already. In another thread, where Python takes no signals, it does nothing.

    Args:
        on_first: called at the first signal, in the main thread, between two steps of whatever runs there.
        on_second: the same for every signal after; what it raises is raised there.
    """

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None] = lambda: None) -> None:
        self._on_first = on_first
        self._on_second = on_second
        self._before: dict[int, Any] = {}
        self._count = 0
        self._force = False
        self._thread = threading.main_thread().ident
        self.number: int | None = None
        """The signal that came first."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._take)
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def hurry(self) -> bool:
        """Whether there was a second signal."""
        return self._count > 1

    def conclude(self) -> None:
        """The run has come to its end: a signal that comes now only hurries what is left to do.

        If it was a signal that ended it, nobody has asked for hurry yet.
        """
        self._count = max(self._count, 1)

    def check(self) -> None:
        """Raise ``Interrupted`` if there was a signal."""
        if self.number is not None:
            raise Interrupted(self.number)

    def force(self) -> None:
        """Raise ``KeyboardInterrupt`` in the main thread, out of whatever it does or waits for. From any thread."""
        if self._before and self._thread is not None:
            self._force = True
            signal.pthread_kill(self._thread, signal.SIGINT)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._force:
            self._force = False
            raise KeyboardInterrupt
        self._count += 1
        if self._count == 1:
            self.number = number
            self._on_first()
            _log.warning("%s: stopping; once more to kill what is left", signal.Signals(number).name)
        else:
            self._on_second()
