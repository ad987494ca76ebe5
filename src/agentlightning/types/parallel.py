"""What is set up once, then once more in each worker process, and taken down in the opposite order."""

from __future__ import annotations

from typing import Any

__all__ = ["ParallelWorkerBase"]


class ParallelWorkerBase:
    """The life of a component that works in several processes.

    ``init`` in the process that makes it, ``init_worker`` in each that uses it (it may be the same), ``run``,
    then ``teardown_worker`` and ``teardown``. Both ends may be called again and then do nothing new.
    """

    worker_id: int | None = None
    """The index of the worker that this one was set up in; None outside of any."""

    def __init__(self) -> None:
        """Only assigns; everything that takes time or a thread happens in ``init`` and ``init_worker``."""
        self.worker_id = None

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Set up what all workers share."""

    def init_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Set up what one worker needs. ``worker_id`` counts the workers from 0."""
        self.worker_id = worker_id

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do the work; what it is, subclasses say."""

    def teardown_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Release what ``init_worker`` took."""
        self.worker_id = None

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Release what ``init`` took."""
