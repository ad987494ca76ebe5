"""Running blocking work where an event loop is already running, as in a notebook."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["loop_is_running", "run_beside_loop"]

T = TypeVar("T")

_LOOK_SECONDS = 0.2


def loop_is_running() -> bool:
    """Whether this thread is inside a running event loop, where ``asyncio.run`` is refused."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_beside_loop(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """Run ``work`` in a thread of its own and wait for its result, in a thread whose loop is running.

    A Ctrl+C reaches only the main thread. It is passed on by ``interrupt``, and raised here when the work has ended.

    Raises:
        KeyboardInterrupt: Ctrl+C while waiting.
        Exception: what ``work`` raised.
    """
    outcome = Future[T]()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread, whatever it is
            outcome.set_exception(error)

    to_start = [threading.Thread(target=run, name="agentlightning-fit", daemon=True)]
    interrupted = False
    while True:
        try:  # around the start as well: from then on an interrupt has something to end
            while to_start:
                to_start.pop().start()
            # Not by Thread.join, which takes a thread for ended when a signal interrupts it; and not without a limit,
            # because a signal that comes just before a thread begins to wait does not wake it.
            while not outcome.done():
                wait([outcome], timeout=_LOOK_SECONDS)
            break
        except KeyboardInterrupt:
            interrupted = True
            interrupt()
    if interrupted:
        raise KeyboardInterrupt
    return outcome.result()
