"""The rows that the writer of a SQLite store keeps in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, cast

import apsw
from msgspec.structs import replace

from agentlightning.lifecycle.records import AttemptRow, ResourcesRow, RolloutRow, WorkerRow
from agentlightning.store.sqlite.rows import ATTEMPTS, ROLLOUTS, WORKERS, Codec

LARGEST = 4096
"""Bytes of content in one row: a larger row is not kept, so that the cache stays within some tens of megabytes."""

_LIVE_ATTEMPTS = (
    "SELECT CAST(worker_id AS BLOB), seq, CAST(attempt_id AS BLOB) FROM attempts "
    "WHERE live AND worker_id IS NOT NULL ORDER BY seq"
)
"""As bytes, so that a damaged id does not keep the store from being opened: whoever reads the row is told of it."""


class Shelf:
    """The cached rows of one kind, the oldest first.

    Args:
        codec: how rows of the kind are stored.
        key: the name of the field that identifies a row.
        contents: the names of the fields that callers can make large.
    """

    __slots__ = ("codec", "contents", "key", "rows", "stored")

    def __init__(self, codec: Codec[Any], key: str, contents: Sequence[str]) -> None:
        self.codec = codec
        self.key = attrgetter(key)
        self.contents = attrgetter(*contents)
        self.rows: dict[str, Any] = {}
        """The newest state of each row."""
        self.stored: dict[str, Any] = {}
        """The state in the database, of the rows whose newest state differs. If the versions are equal, too, only
        a sign of life is missing in the database, which may stay so; if not, the row is written with its batch."""

    def size(self, row: Any) -> int:
        """How many bytes a row has of what callers can make large."""
        return sum(map(len, filter(None, cast("tuple[bytes | str | None, ...]", self.contents(row)))))


Undo = tuple[dict[Any, Any], Any, Any]
"""What a dictionary held under a key before a change: (dictionary, key, value or None). A plain tuple, because several
are made for each operation and a named one takes three times as long to make."""


class RowCache:
    """Rollouts, attempts and workers as the running transaction sees them.

    Args:
        connection: the database, as it is stored.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self.live: dict[str, dict[int, str]] = {}
        """By ``worker_id`` all live attempts: their ids by ``seq``. It is complete, so no search of the database is
        needed to tell what else a worker holds when an attempt of it ends."""
        for worker, seq, attempt in cast("Iterable[tuple[bytes, int, bytes]]", connection.execute(_LIVE_ATTEMPTS)):
            worker_id, attempt_id = worker.decode(errors="replace"), attempt.decode(errors="replace")
            self.live.setdefault(worker_id, {})[seq] = attempt_id
        self.shelves: dict[type[Any], Shelf] = {
            RolloutRow: Shelf(ROLLOUTS, "rollout_id", ("input", "metadata", "reason_message")),
            AttemptRow: Shelf(ATTEMPTS, "attempt_id", ("metadata", "reason_message")),
            WorkerRow: Shelf(WORKERS, "worker_id", ("heartbeat_stats", "registration", "reason_message")),
        }
        self._attempts = self.shelves[AttemptRow].rows
        self._workers = self.shelves[WorkerRow].rows
        self.newest_resources: dict[str, tuple[ResourcesRow | None]] = {}
        """By ``resources_id``, and by "" for the latest of all, a tuple of the newest version, or of None."""

    def note_live(self, before: AttemptRow | None, after: AttemptRow, log: list[Undo]) -> None:
        """Keep ``live`` true when an attempt is inserted or changed."""
        held_by = before.worker_id if before is not None and before.live else None
        holds = after.worker_id if after.live else None
        if held_by == holds:
            return
        live, seq = self.live, after.seq
        if held_by is not None:
            held = live[held_by]
            log.append((held, seq, held.pop(seq)))
            if not held:
                log.append((live, held_by, live.pop(held_by)))
        if holds is not None:
            if holds not in live:
                log.append((live, holds, None))
                live[holds] = {}
            log.append((live[holds], seq, None))
            live[holds][seq] = after.attempt_id

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
        for values, key, before in reversed(log[since:]):
            if before is None:
                values.pop(key, None)
            else:
                values[key] = before
        del log[since:]
