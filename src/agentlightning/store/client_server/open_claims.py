"""Claims whose reply has not been seen: the next claim like them repeats them, so that no rollout is stranded."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["OpenClaims"]

_MOST = 1000


class OpenClaims:
    """Request ids of claims that were sent and not answered, by worker and limit. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[tuple[str | None, int], deque[str]] = {}

    def take(self, worker_id: str | None, limit: int) -> str | None:
        """The id of a claim like this one that had no answer; it is the caller's now."""
        with self._lock:
            key = (worker_id, limit)
            waiting = self._ids.get(key)
            if not waiting:
                return None
            taken = waiting.popleft()
            if not waiting:
                del self._ids[key]
            return taken

    def keep(self, worker_id: str | None, limit: int, request_id: str) -> None:
        """A claim had no answer. Of very many, the oldest are let go: the server hands their rollouts out again."""
        with self._lock:
            self._ids.setdefault((worker_id, limit), deque(maxlen=_MOST)).append(request_id)
