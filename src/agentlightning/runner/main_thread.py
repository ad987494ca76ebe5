"""The main thread of a runner's process, for agents that are plain functions, one at a time.

Python lets only the main thread set signal handlers, and many reward functions limit their time by ``signal.alarm``.
So in a process that is ours the runner's event loop runs in another thread, and the main thread makes the agent's
calls. It can be interrupted there, too: when an attempt is given up, the agent gets ``AgentInterrupted``.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, NoReturn, TypeVar

from agentlightning.runner.steady_loop import run_steadily

_T = TypeVar("_T")
_WAKE_SECONDS = 1.0
"""How often the idle main thread looks for signals: outside Linux, one may be delivered to another thread."""
_POLL_SECONDS = 0.02
_CLEANUP_SECONDS = 2.0
"""How long the process of an interrupted agent waits for its end."""
_logger = logging.getLogger(__name__)


class AgentInterrupted(KeyboardInterrupt):
    """Raised inside an agent whose attempt is given up, wherever it is, so that it can clean up and end."""


class MainThread:
    """Makes calls in the main thread, where this object must be made, one after the other."""

    def __init__(self) -> None:
        self._thread_id = threading.get_ident()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], None]]] = SimpleQueue()
        self._last: Future[Any] | None = None
        self._current: Future[Any] | None = None
        self._given_up: Future[Any] | None = None
        """The call for which a SIGINT of ``interrupt`` is on its way."""
        self._interrupted = False
        self._cancel_work: Callable[[], object] = lambda: None

    # --- In the main thread ----------------------------------------------------------------------

    def serve(self, work: Callable[[], NoReturn]) -> NoReturn:
        """Start ``work`` in a thread, with this object as ``MAIN_THREAD``, and make calls until it ends the process.

        SIGINT, unless it is handled already, cancels what ``run`` runs and interrupts the agent.
        """
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
        context = contextvars.copy_context()
        context.run(MAIN_THREAD.set, self)
        threading.Thread(target=context.run, args=(work,), name="agl-runner", daemon=True).start()
        while True:
            try:
                self._make_calls()
            except BaseException as error:  # noqa: BLE001 - of a timer or handler that an agent has left behind
                call, self._current = self._current, None
                if call is not None and not call.done():
                    call.set_exception(error)
                if not isinstance(error, AgentInterrupted):
                    _logger.warning("%r was raised between two agents; the last one has left a signal behind", error)

    def _make_calls(self) -> NoReturn:
        while True:
            try:
                self._current, call = self._calls.get(timeout=_WAKE_SECONDS)
            except Empty:
                continue
            call()
            del call  # otherwise this frame keeps the result alive until the next call

    def release(self) -> None:
        """A call has been made, and its result is about to be known. An alarm that it has left does not go off."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._current = None

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        given_up, self._given_up = self._given_up, None
        if given_up is None:
            self._interrupted = True
            self._cancel_work()
        if self._current is not None and given_up in (None, self._current):
            raise AgentInterrupted("the attempt is given up")

    # --- In other threads ------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in a loop of this thread.

        Raises:
            KeyboardInterrupt: SIGINT has cancelled it.
        """

        async def interruptible() -> _T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._cancel_work = lambda: loop.is_closed() or loop.call_soon_threadsafe(task.cancel)
            if self._interrupted:
                task.cancel()
            return await work

        try:
            return run_steadily(interruptible())
        except asyncio.CancelledError:
            if self._interrupted:
                raise KeyboardInterrupt from None
            raise
        finally:
            work.close()
            if self._last is not None:  # an interrupted agent cleans up, while this process still is
                wait([self._last], timeout=_CLEANUP_SECONDS)

    async def is_free(self, seconds: float) -> bool:
        """Whether the last call has ended, or ends within so many seconds."""
        until = time.monotonic() + seconds
        while self._last is not None and not self._last.done() and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)
        return self._last is None or self._last.done()

    def put(self, future: Future[Any], call: Callable[[], None]) -> None:
        """Make a call, which calls ``release`` and then settles ``future``, as soon as those before it have ended."""
        self._last = future
        self._calls.put((future, call))

    def interrupt(self, future: Future[Any]) -> None:
        """Raise ``AgentInterrupted`` in this call, if it is under way and the agent has not taken SIGINT for itself.

        Native code is interrupted only when it returns to Python.
        """
        if self._interrupted:  # that has interrupted the agent, which is cleaning up
            return
        if self._current is future and signal.getsignal(signal.SIGINT) == self._handle:
            self._given_up = future
            # A real signal, because only that ends a system call in which the agent may be blocked.
            signal.pthread_kill(self._thread_id, signal.SIGINT)


MAIN_THREAD: ContextVar[MainThread | None] = ContextVar("agentlightning_main_thread", default=None)
"""Of the process that this code runs in, where it makes calls for runners."""
