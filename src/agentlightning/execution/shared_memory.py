"""``SharedMemoryExecutionStrategy``: both sides in one process, on one store, each in a thread with its own loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, Literal

from agentlightning.errors import ExecutionFailed, InvalidValue
from agentlightning.execution.abort import SignalHandlers
from agentlightning.execution.base import (
    LINGER_SHARE,
    AlgorithmBundle,
    ExecutionStrategy,
    RunnerBundle,
    ThreadingEvent,
    cancel_all_tasks,
    prepare_store,
    resolve_managed_store_flag,
)
from agentlightning.execution.membership import deregister_worker, failure_when_unserved, waiting_rollouts
from agentlightning.runner.heartbeat import worker_name
from agentlightning.runner.steady_loop import SteadyLoop
from agentlightning.store.base import LightningStore

_log = logging.getLogger(__name__)

_JOIN_POLL_SECONDS = 0.1

_Side = Callable[[], Coroutine[Any, Any, None]]
"""The algorithm or one runner."""


class SharedMemoryExecutionStrategy(ExecutionStrategy):
    """Runs the algorithm and the runners in threads of this process: the quickest way to try something out.

    Nothing is pickled and nothing is served. But an agent that crashes the interpreter ends everything, and the Python
    code of all threads shares one processor. Every store of this package is safe across threads and loops.

    Args:
        n_runners: how many runners there are.
        main_thread: which side runs in the thread that calls ``execute``; ``runner`` needs ``n_runners=1``.
        join_timeout: seconds that threads get to end after everything in them was cancelled. A thread that blocks for
            longer is abandoned, with a warning.
        graceful_delay: seconds that a side may go on after the stop event, before it is cancelled.
        poll_interval: how often, in seconds, each side checks whether it shall stop.
        managed_store: of 0.3, which wrapped stores to make them safe for threads. No store needs that any more, so
            both values mean the same. Default: ``AGL_MANAGED_STORE``, else True.

    Raises:
        InvalidValue: an argument is not valid. (It is a ``ValueError``, too.)
    """

    alias: ClassVar[str] = "shm"

    def __init__(
        self,
        n_runners: int = 1,
        main_thread: Literal["algorithm", "runner"] = "runner",
        join_timeout: float = 15.0,
        graceful_delay: float = 5.0,
        poll_interval: float = 0.05,
        managed_store: bool | None = None,
    ) -> None:
        if n_runners < 1:
            raise InvalidValue(f"n_runners {n_runners} is not valid; give at least 1")
        if main_thread not in ("algorithm", "runner"):
            raise InvalidValue(f"main_thread {main_thread!r} is neither 'algorithm' nor 'runner'")
        if main_thread == "runner" and n_runners != 1:
            raise InvalidValue(
                f"main_thread='runner' keeps the one runner in this thread, and n_runners is {n_runners}; "
                "for more runners give main_thread='algorithm'"
            )
        if poll_interval <= 0 or join_timeout < 0 or graceful_delay < 0:
            raise InvalidValue("join_timeout and graceful_delay are seconds, 0 or more; poll_interval is above 0")
        self.n_runners = n_runners
        self.main_thread: Literal["algorithm", "runner"] = main_thread
        self.join_timeout = join_timeout
        self.graceful_delay = graceful_delay
        self.poll_interval = poll_interval
        self.managed_store = resolve_managed_store_flag(managed_store)

    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle, store: LightningStore) -> None:
        _ThreadedRun(store, self).execute(algorithm, runner)

    def linger_seconds(self) -> float:
        """A part of ``graceful_delay``."""
        return LINGER_SHARE * self.graceful_delay


class _ThreadedRun:
    """What the threads of one run share; the strategy has the time limits of each step."""

    def __init__(self, store: LightningStore, limits: SharedMemoryExecutionStrategy) -> None:
        self._event = ThreadingEvent()
        self._failure: BaseException | None = None
        """What the first side that failed raised."""
        self._store = store
        self._limits = limits
        self._runners_left = limits.n_runners
        self._lock = threading.Lock()
        self._hurry = False
        self._main_thread_is_busy = False

    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle) -> None:
        """Run both sides. Raises as ``ExecutionStrategy.execute``."""
        limits = self._limits
        sides: list[tuple[str, _Side]] = [
            ("algorithm", partial(algorithm, self._store, self._event)),
            *((f"runner {index}", partial(self._run_runner, runner, index)) for index in range(limits.n_runners)),
        ]
        if limits.main_thread == "runner":
            sides.reverse()
        with SignalHandlers(self._event.set, self._interrupt) as signals:
            prepare_store(algorithm, self._store)
            threads = [
                threading.Thread(target=self._run_side, args=side, name=f"agl-{side[0]}", daemon=True)
                for side in sides[1:]
            ]
            for thread in threads:
                thread.start()
            self._run_side(*sides[0], limits.join_timeout)
            self._event.set()
            until = time.monotonic() + limits.graceful_delay + limits.join_timeout
            for thread in threads:
                while thread.is_alive() and time.monotonic() < until:
                    thread.join(_JOIN_POLL_SECONDS)  # not longer: Python runs signal handlers only between calls
                if thread.is_alive():
                    _log.warning("%s blocks and does not end; its thread is abandoned", thread.name)
            signals.check()
        if self._failure is not None:
            raise self._failure

    def _interrupt(self) -> None:
        """Cancel at once, whatever ``graceful_delay`` is, and interrupt a side that blocks the main thread."""
        self._hurry = True
        if self._main_thread_is_busy:
            raise KeyboardInterrupt

    def _run_side(self, name: str, side: _Side, join_timeout: float = math.inf) -> None:
        """Run one side to its end, in this thread. What it raises stops the others, and is kept.

        If it was cancelled and goes on nevertheless, it is abandoned after ``join_timeout`` seconds.
        """
        loop = SteadyLoop()
        asyncio.set_event_loop(loop)
        task = loop.create_task(self._work(side))
        is_main = threading.current_thread() is threading.main_thread()
        try:
            self._main_thread_is_busy |= is_main
            loop.run_until_complete(self._watch(name, task, join_timeout))
        except BaseException as error:  # noqa: BLE001 - the boundary of a side: raised by `execute`
            with self._lock:
                first, self._failure = self._failure is None, self._failure or error
            if not first:
                _log.error("%s failed, too", name, exc_info=error)
            self._event.set()
        finally:
            self._main_thread_is_busy &= not is_main
            asyncio.set_event_loop(None)
            if name == "algorithm":
                self._event.set()
        if task.done() or self._hurry:
            loop.run_until_complete(cancel_all_tasks())
            loop.close()

    async def _run_runner(self, runner: RunnerBundle, index: int) -> None:
        """Run one runner, and say goodbye to the store, so that nobody takes the worker for lost."""
        error: BaseException | None = None
        try:
            await runner(self._store, index, self._event)
        except BaseException as raised:
            error = raised
            raise
        finally:
            await deregister_worker(self._store, worker_name(index), error)

    async def _work(self, side: _Side) -> None:
        try:
            await side()
        except KeyboardInterrupt:
            if not self._hurry:  # else `_interrupt` has raised it, and it has done its work
                raise

    async def _watch(self, name: str, task: asyncio.Task[None], join_timeout: float) -> None:
        """Wait for the end of a side, and cancel it some time after the stop event."""
        await self._wait(task, self._event.is_set)
        await self._wait(task, lambda: self._hurry, self._limits.graceful_delay)
        if not task.done():
            task.cancel()
            await self._wait(task, lambda: False, join_timeout)
        if not task.done():
            raise ExecutionFailed(f"{name} was cancelled and goes on nevertheless; it is abandoned")
        with contextlib.suppress(asyncio.CancelledError):
            task.result()
        if name == "algorithm":
            return
        with self._lock:
            self._runners_left -= 1
        if self._runners_left == 0:  # the last one stays, to fail a run whose algorithm would wait for ever
            failure = asyncio.create_task(failure_when_unserved(partial(waiting_rollouts, self._store)))
            await self._wait(failure, self._event.is_set)
            if failure.done():
                raise failure.result()

    async def _wait(self, task: asyncio.Future[Any], met: Callable[[], bool], seconds: float = math.inf) -> None:
        """Wait until the task is done, or the condition is met, or the time is up."""
        until = time.monotonic() + seconds
        while not task.done() and not met() and time.monotonic() < until:
            await asyncio.wait([task], timeout=self._limits.poll_interval)
