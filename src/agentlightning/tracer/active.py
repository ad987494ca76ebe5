"""Which tracer the code that runs right now is traced by.

Many rollouts run at once in one process, so the answer belongs to the context of a task or thread (`contextvars`),
which tasks and ``asyncio.to_thread`` pass on. A bare ``threading.Thread`` does not; there, the tracer that this
process was given is the answer.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentlightning.tracer.base import Tracer

__all__ = ["activated", "clear_active_tracer", "get_active_tracer", "set_active_tracer"]

_of_context: ContextVar[Tracer | None] = ContextVar("agentlightning_tracer", default=None)
_of_process: list[Tracer] = []
"""Tracers that are at work in this process, each once for each time; the newest is last."""
_lock = threading.Lock()


def set_active_tracer(tracer: Tracer) -> None:
    """Trace by ``tracer`` from here on: what this context runs, and what has no context of its own."""
    _of_context.set(tracer)
    with _lock:
        _of_process.append(tracer)


def clear_active_tracer() -> None:
    """Undo the last ``set_active_tracer`` of this context."""
    tracer = _of_context.get()
    _of_context.set(None)
    _forget(tracer)


def get_active_tracer() -> Tracer | None:
    """The tracer of this context, else the newest that is at work in this process; None if there is none."""
    tracer = _of_context.get()
    if tracer is not None:
        return tracer
    try:
        return _of_process[-1]
    except IndexError:
        return None


@contextmanager
def activated(tracer: Tracer) -> Generator[None]:
    """Trace by ``tracer`` inside of the block, then as before."""
    before = _of_context.get()
    set_active_tracer(tracer)
    try:
        yield
    finally:
        _of_context.set(before)
        _forget(tracer)


def _forget(tracer: Tracer | None) -> None:
    with _lock:
        for position in range(len(_of_process) - 1, -1, -1):
            if _of_process[position] is tracer:
                del _of_process[position]
                return
