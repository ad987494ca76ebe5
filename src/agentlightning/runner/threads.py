"""Threads for agents that are plain functions.

Not ``ThreadPoolExecutor``, whose threads are waited for when Python ends: an agent that hangs would keep its
process alive for ever. These are daemons, and there is always one free, since a thread that was given up on may
never come back.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

__all__ = ["AgentThreads"]

T = TypeVar("T")


class _Call(NamedTuple):
    future: Future[object]
    function: Callable[[], object]
    context: contextvars.Context


class AgentThreads:
    """Calls functions, each in a thread of its own for as long as it takes; threads are used again until ``close``.

    Args:
        name: what the threads are called.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._free = 0
        self._threads = 0
        self._lock = threading.Lock()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call ``function`` in a thread, in a copy of the running context. Any exception ends up in the future."""
        future: Future[T] = Future()
        with self._lock:
            new = self._free == 0
            if new:
                self._threads += 1
            else:
                self._free -= 1
        if new:
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._calls.put(_Call(future, function, contextvars.copy_context()))  # pyright: ignore[reportArgumentType]
        return future

    def close(self) -> None:
        """Let the threads end when they have nothing to do any more."""
        with self._lock:
            threads, self._threads, self._free = self._threads, 0, 0
        for _ in range(threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if call.future.set_running_or_notify_cancel():
                self._carry_out(call)
            else:
                self._free_again()
            del call  # or it would keep its result alive until the next one

    def _carry_out(self, call: _Call) -> None:
        try:
            result = call.context.run(call.function)
        except BaseException as error:  # noqa: BLE001 - also SystemExit: it is the agent that wants to end
            self._free_again()
            call.future.set_exception(_to_await(error))
        else:
            self._free_again()  # before anybody learns of the result, and calls again
            call.future.set_result(result)

    def _free_again(self) -> None:
        with self._lock:
            self._free += 1


def _to_await(error: BaseException) -> BaseException:
    """The error, or what stands for one that cannot be raised by ``await``: as PEP 479 has it for generators."""
    if not isinstance(error, StopIteration):
        return error
    standing_for = RuntimeError(f"a function raised StopIteration({error.value!r})")
    standing_for.__cause__ = error
    return standing_for
