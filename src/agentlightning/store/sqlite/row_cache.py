"""The rows written last, so that the next operation on them need not read them again.

There is one writing connection and every change goes through it, so the cache knows them all.
Should it be wrong all the same, nothing is harmed: a write is conditional on the version of
the row that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from agentlightning.lifecycle.records import AttemptRow, RolloutRow, WorkerRow

__all__ = ["RowCache"]

_ROWS_OF_A_KIND = 2048
_LARGEST = 4096
"""Bytes of JSON in one row: a larger row is not kept, so that the cache stays within some tens of megabytes."""

_KEYS = {
    RolloutRow: attrgetter("rollout_id"),
    AttemptRow: attrgetter("attempt_id"),
    WorkerRow: attrgetter("worker_id"),
}
_BLOBS: dict[type[Any], Callable[[Any], tuple[bytes | None, ...]]] = {
    RolloutRow: lambda row: (row.input, row.metadata),
    AttemptRow: lambda row: (row.metadata,),
    WorkerRow: lambda row: (row.heartbeat_stats, row.registration),
}


class RowCache:
    """Rollouts, attempts and workers as the running transaction sees them; the oldest make way."""

    def __init__(self) -> None:
        self._rows: dict[type[Any], dict[str, Any]] = {kind: {} for kind in _KEYS}

    def get(self, kind: type[Any], key: str) -> Any | None:
        """The row, if it is here."""
        return self._rows[kind].get(key)

    def keep(self, row: Any) -> None:
        """Take in a row as it has just been written; rows of other kinds are passed over."""
        kind: type[Any] = type(row)
        rows = self._rows.get(kind)
        if rows is None:
            return
        key = _KEYS[kind](row)
        if sum([len(blob) for blob in _BLOBS[kind](row) if blob is not None]) > _LARGEST:
            rows.pop(key, None)
            return
        rows[key] = row
        if len(rows) > _ROWS_OF_A_KIND:
            del rows[next(iter(rows))]

    def forget(self, row: Any) -> None:
        """Drop a row, because its write was undone or it was deleted."""
        kind: type[Any] = type(row)
        if kind in _KEYS:
            self._rows[kind].pop(_KEYS[kind](row), None)

    def forget_attempts_of(self, rollout_id: str) -> None:
        """Drop the attempts of a rollout, because they were deleted."""
        attempts = self._rows[AttemptRow]
        for key in [key for key, row in attempts.items() if row.rollout_id == rollout_id]:
            del attempts[key]

    def clear(self) -> None:
        """Drop everything, because a whole transaction was undone."""
        for rows in self._rows.values():
            rows.clear()
