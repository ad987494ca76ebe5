"""The thread that waits for the disk, so that no event loop has to."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

__all__ = ["CommitThread", "commit_here"]

Work = Callable[[], None]


def commit_here(work: Work) -> None:
    """Commit in the calling thread: where there is no disk to wait for."""
    work()


class CommitThread:
    """Runs what it is given, one after another, in one thread of its own.

    The thread starts with the first work and ends with ``close``, or when nobody holds this
    object any more.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, work: Work) -> None:
        """Run ``work`` soon, after all that was given before."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._queue,), name="agl-commit", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._queue.put, None).atexit = False
        self._queue.put(work)

    def close(self) -> None:
        """End the thread after what it was given; idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()


def _serve(work_queue: queue.SimpleQueue[Work | None]) -> None:
    while (work := work_queue.get()) is not None:
        work()
        del work
