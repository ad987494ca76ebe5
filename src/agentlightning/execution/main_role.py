"""The side of a run that stays in this thread, and how it is ended from another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["MainRole"]

_log = logging.getLogger(__name__)


class MainRole:
    """Runs one coroutine in the thread that calls ``run``.

    Args:
        graceful_timeout: seconds that it gets to end after each request, before the next, stronger one.
        force: raises ``KeyboardInterrupt`` in that thread.
    """

    def __init__(self, graceful_timeout: float, force: Callable[[], None]) -> None:
        self._graceful_timeout = graceful_timeout
        self._force = force
        self._lock = threading.Lock()
        self._working: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._asked: list[float] = []
        self._done = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def asked_to_end(self) -> bool:
        """Whether ``end`` was called before it had ended."""
        return bool(self._asked)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the coroutine to its end. Raises what it raises; nothing if it was asked to end, and did."""
        try:
            with asyncio.Runner() as runner:
                runner.run(self._work(work))
        except (asyncio.CancelledError, KeyboardInterrupt):
            if not self._asked:
                raise
        finally:
            work.close()
            self._done.set()
            if self._watch is not None:
                self._watch.join()

    def end(self, *, patience: float = 0.0) -> None:
        """Ask it to end, from any thread: cancel it, and if that does not help, interrupt the thread. Idempotent.

        Args:
            patience: seconds to wait before, because it may end by itself.
        """
        with self._lock:
            if self._asked or self._done.is_set():
                return
            self._asked.append(patience)
            self._watch = threading.Thread(target=self._press, args=(patience,), name="agl-main-role", daemon=True)
            self._watch.start()

    async def _work(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._working = (asyncio.get_running_loop(), task)
        try:
            await task
        finally:
            self._working = None

    def _press(self, patience: float) -> None:
        if self._done.wait(patience):
            return
        self._cancel()
        while not self._done.wait(self._graceful_timeout):
            _log.warning(
                "what runs in the main thread does not end within %g s; interrupting it", self._graceful_timeout
            )
            self._force()

    def _cancel(self) -> None:
        """As soon as it has begun."""
        while not self._done.wait(0.01):
            working = self._working
            if working is not None:
                loop, task = working
                with contextlib.suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(task.cancel)
                return
