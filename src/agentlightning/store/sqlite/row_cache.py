"""The rows that the writer of a SQLite store keeps in memory."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from msgspec.structs import replace

from agentlightning.lifecycle.records import AttemptRow, RolloutRow, WorkerRow
from agentlightning.store.sqlite.rows import ATTEMPTS, ROLLOUTS, WORKERS, Codec


class Shelf:
    """The cached rows of one kind, the oldest first.

    Args:
        codec: how rows of the kind are stored.
        key: the name of the field that identifies a row.
        size: the bytes of JSON in a row.
    """

    __slots__ = ("codec", "key", "rows", "size", "stored")

    def __init__(self, codec: Codec[Any], key: str, size: Callable[[Any], int]) -> None:
        self.codec = codec
        self.key = attrgetter(key)
        self.size = size
        self.rows: dict[str, Any] = {}
        """The newest state of each row."""
        self.stored: dict[str, Any] = {}
        """The state in the database, of the rows whose newest state differs. If the versions are equal, too, only
        a sign of life is missing in the database, which may stay so; if not, the row is written with its batch."""


Undo = tuple[Shelf, str, Any, Any]
"""What a shelf held under a key before a change: (shelf, key, newest row, stored row). A plain tuple, because several
are made for each operation and a named one takes three times as long to make."""


class RowCache:
    """Rollouts, attempts and workers as the running transaction sees them."""

    def __init__(self) -> None:
        self.shelves: dict[type[Any], Shelf] = {
            RolloutRow: Shelf(ROLLOUTS, "rollout_id", lambda row: len(row.input) + len(row.metadata or b"")),
            AttemptRow: Shelf(ATTEMPTS, "attempt_id", lambda row: len(row.metadata or b"")),
            WorkerRow: Shelf(
                WORKERS, "worker_id", lambda row: len(row.heartbeat_stats or b"") + len(row.registration or b"")
            ),
        }
        self._attempts = self.shelves[AttemptRow].rows
        self._workers = self.shelves[WorkerRow].rows

    def attempt_now(self, row: AttemptRow) -> AttemptRow:
        """An attempt as read from the database, with the newest sign of life.

        A newer version in memory belongs to a transaction that is not committed yet. Its sign of life counts all
        the same, or the reader would take a live attempt for an expired one.
        """
        newest: AttemptRow | None = self._attempts.get(row.attempt_id)
        if newest is None or newest is row:
            return row
        if newest.version == row.version:
            return newest
        if row.live and newest.beaten_lease > row.beaten_lease:
            return replace(row, last_heartbeat_time=newest.last_heartbeat_time, beaten_lease=newest.beaten_lease)
        return row

    def worker_now(self, row: WorkerRow) -> WorkerRow:
        """A worker as read from the database, with the newest sign of life."""
        newest: WorkerRow | None = self._workers.get(row.worker_id)
        return newest if newest is not None and newest.version == row.version else row

    def restore(self, log: list[Undo], since: int) -> None:
        """Take back the changes in ``log[since:]``, and drop them from it."""
        for shelf, key, row, stored in reversed(log[since:]):
            for rows, before in ((shelf.rows, row), (shelf.stored, stored)):
                if before is None:
                    rows.pop(key, None)
                else:
                    rows[key] = before
        del log[since:]
