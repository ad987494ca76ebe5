"""The row primitives of ``store.backend`` on one SQLite connection.

No method ever suspends: an operation made of these can be stepped to its end without an
event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import apsw
import msgspec
from msgspec.structs import replace

from agentlightning.errors import Conflict
from agentlightning.lifecycle.records import AttemptRow, Moment, ResourcesRow, RolloutRow, SpanRow, WorkerRow
from agentlightning.store.backend import AttemptsBy, Event, Page, PageQuery, ResourcesBy, Row, Table, Unreadable
from agentlightning.store.sqlite.rows import (
    ATTEMPTS,
    RESOURCES,
    ROLLOUTS,
    WORKERS,
    Codec,
    Statement,
    codec_of,
    counted_by,
    page_statement,
    total_statement,
)

# --- The rows written last, so that the next operation on them need not read them again ---

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


# ---

R = TypeVar("R", RolloutRow, AttemptRow, WorkerRow)

_INSERT_SPAN = (
    "INSERT INTO spans (attempt_seq, sequence_id, issued, span_id, body) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (attempt_seq, span_id) DO NOTHING"
)
_SCAN_SPANS = (
    "SELECT seq, attempt_seq, sequence_id, issued, span_id, body FROM spans WHERE seq > ? ORDER BY seq LIMIT ?"
)
_GETS: dict[type[Any], tuple[Codec[Any], str]] = {
    RolloutRow: (ROLLOUTS, f"{ROLLOUTS.select} WHERE rollout_id = ?"),
    AttemptRow: (ATTEMPTS, f"{ATTEMPTS.select} WHERE attempt_id = ?"),
    WorkerRow: (WORKERS, f"{WORKERS.select} WHERE worker_id = ?"),
}
_TABLES: dict[Table, Codec[Any]] = {each.table: each for each in (ROLLOUTS, ATTEMPTS, RESOURCES, WORKERS)}
_ROLLOUT_WIDTH = len(ROLLOUTS.fields)


class SqliteReads:
    """``ReadTransaction`` on a connection that is inside a transaction."""

    def __init__(self, connection: apsw.Connection, now: Moment) -> None:
        self._connection = connection
        self._execute = connection.cursor().execute
        self._now = now

    def now(self) -> Moment:
        return self._now

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return self._execute(sql, values).fetchall()

    async def get(self, kind: type[R], key: str) -> R | None:
        codec, sql = _GETS[kind]
        rows = self._rows(sql, (key,))
        return codec.decode(rows[0]) if rows else None

    async def get_resources(self, selection: ResourcesBy) -> ResourcesRow | None:
        match selection:
            case ResourcesBy(request_id=str(request_id)):
                where, values = "WHERE request_id = ?", (request_id,)
            case ResourcesBy(resources_id=None):
                where, values = "ORDER BY seq DESC LIMIT 1", ()
            case ResourcesBy(resources_id, None):
                where, values = "WHERE resources_id = ? ORDER BY version DESC LIMIT 1", (resources_id,)
            case ResourcesBy(resources_id, version):
                where, values = "WHERE resources_id = ? AND version = ?", (resources_id, version)
        rows = self._rows(f"{RESOURCES.select} {where}", values)
        return RESOURCES.decode(rows[0]) if rows else None

    async def attempts_by(self, selection: AttemptsBy) -> list[AttemptRow]:
        live = " AND live" if selection.live_only else ""
        rows = self._rows(
            f"{ATTEMPTS.select} WHERE {selection.key} = ?{live} ORDER BY seq DESC LIMIT ?",
            (selection.value, selection.limit),
        )
        return [ATTEMPTS.decode(row) for row in rows]

    async def page(self, query: PageQuery) -> Page:
        raw = self._rows(*page_statement(query))
        rows = [_DECODE[query.table](row) for row in raw]
        whole = query.limit == -1 or len(rows) < query.limit
        if not query.with_total or (whole and (rows or query.offset == 0)):
            return Page(rows, query.offset + len(rows))
        return Page(rows, await self._total(query))

    async def _total(self, query: PageQuery) -> int:
        names = counted_by(query)
        if names is None:
            statement: Statement = total_statement(query)
            return self._rows(*statement)[0][0]
        if names == ["rollouts.*"]:
            return self._rows("SELECT coalesce(sum(value), 0) FROM counters WHERE name GLOB 'rollouts.*'")[0][0]
        counters = await self.counters()
        return sum(counters.get(name, 0) for name in names)

    async def counters(self) -> dict[str, int]:
        return dict(self._rows("SELECT name, value FROM counters"))

    async def scan(self, table: Table, after: int, limit: int) -> list[Any]:
        if table == "spans":
            return self._rows(_SCAN_SPANS, (after, limit))
        codec = _TABLES[table]
        columns = ", ".join(codec.columns)
        rows = self._rows(f"SELECT {columns} FROM {table} WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))
        return [found for row in rows for found in _decode_or_tell(codec, row)]

    async def integrity(self) -> list[str]:
        return [row[0] for row in self._rows("PRAGMA integrity_check(100)") if row[0] != "ok"]


class CannotUndo(Exception):
    """An operation failed after it had written, in a transaction without savepoints."""


class SqliteTransaction(SqliteReads):
    """``Transaction``: many operations, one after another, in one SQLite transaction.

    It counts on none of them failing after it has written: nearly all check first. One that does
    cannot be undone alone, so ``undo`` raises, and all have to be run again in a
    ``GuardedTransaction``. Going without savepoints saves SQLite a copy of every page that an
    operation touches.
    """

    def __init__(self, connection: apsw.Connection, cache: RowCache) -> None:
        super().__init__(connection, Moment(0.0, 0.0))
        self._cache = cache
        self._own_rows: list[Row] = []
        self.events: list[Event] = []
        """What the operations that succeeded have published."""
        self.wrote = False
        """Whether any operation that succeeded has written."""
        self._counts: list[tuple[str, int]] = []
        self._writing = False
        self._own_events: list[Event] = []
        self._own_counts: list[tuple[str, int]] = []

    def begin(self, now: Moment) -> None:
        """The next operation begins."""
        self._now = now
        self._writing = False
        self._own_events = []
        self._own_counts = []
        self._own_rows = []

    def keep(self) -> None:
        """The operation succeeded: its effects stay."""
        if self._writing:
            self.wrote = True
        self.events += self._own_events
        self._counts += self._own_counts

    def undo(self) -> None:
        """The operation failed: as if it had never been.

        Raises:
            CannotUndo: it has written.
        """
        if self._writing:
            raise CannotUndo

    async def get(self, kind: type[R], key: str) -> R | None:
        row = self._cache.get(kind, key)
        if row is None:
            row = await super().get(kind, key)
            if row is not None:
                self._cache.keep(row)
        return row

    def flush_counters(self) -> None:
        """Write what the operations counted. Call once, after the last one."""
        sums: dict[str, int] = {}
        for name, change in self._counts:
            sums[name] = sums.get(name, 0) + change
        for name, change in sums.items():
            if change:
                self._execute(
                    "INSERT INTO counters VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                    (name, change),
                )

    def _write(self) -> None:
        self._writing = True

    def _remember(self, row: Row) -> None:
        self._cache.keep(row)
        self._own_rows.append(row)

    async def insert(self, row: Row) -> int:
        self._write()
        codec = codec_of(row)
        self._execute(codec.insert, codec.encode(row)[1:])
        seq = self._connection.last_insert_rowid()
        self._remember(replace(row, seq=seq))
        return seq

    async def put(self, old: R, new: R) -> R:
        self._write()
        self._execute(*codec_of(new).update(old, new))
        if self._connection.changes() != 1:
            raise Conflict(f"{type(old).__name__} {old.seq} has changed since it was read; read it again")
        written = replace(new, version=old.version + 1)
        self._remember(written)
        return written

    async def insert_spans(self, rows: Sequence[SpanRow]) -> list[bool]:
        self._write()
        execute, changes = self._execute, self._connection.total_changes
        fresh: list[bool] = []
        before = changes()
        for row in rows:
            execute(_INSERT_SPAN, (row.attempt_seq, row.sequence_id, int(row.issued), row.span_id, row.body))
            after = changes()
            fresh.append(after != before)
            before = after
        return fresh

    async def next_claimable(self, limit: int) -> list[RolloutRow]:
        rows = self._rows(f"{ROLLOUTS.select} WHERE claimable ORDER BY priority DESC, seq LIMIT ?", (limit,))
        return [ROLLOUTS.decode(row) for row in rows]

    async def due(self, lease: float, limit: int) -> list[AttemptRow | WorkerRow]:
        attempts = self._rows(f"{ATTEMPTS.select} WHERE deadline <= ? ORDER BY deadline LIMIT ?", (lease, limit))
        workers = self._rows(f"{WORKERS.select} WHERE deadline <= ? ORDER BY deadline LIMIT ?", (lease, limit))
        return [*map(ATTEMPTS.decode, attempts), *map(WORKERS.decode, workers)]

    async def next_deadline(self) -> float | None:
        sql = (
            "SELECT min(at) FROM (SELECT min(deadline) AS at FROM attempts WHERE deadline IS NOT NULL "
            "UNION ALL SELECT min(deadline) FROM workers WHERE deadline IS NOT NULL)"
        )
        return self._rows(sql)[0][0]

    async def delete_spans(self, attempt: AttemptRow, limit: int) -> tuple[int, int]:
        self._write()
        doomed = self._rows("SELECT seq, length(body) FROM spans WHERE attempt_seq = ? LIMIT ?", (attempt.seq, limit))
        for seq, _ in doomed:
            self._execute("DELETE FROM spans WHERE seq = ?", (seq,))
        return len(doomed), sum(size for _, size in doomed)

    async def delete_rollout(self, rollout: RolloutRow) -> int:
        self._write()
        self._execute("DELETE FROM attempts WHERE rollout_id = ?", (rollout.rollout_id,))
        attempts = self._connection.changes()
        self._execute("DELETE FROM rollouts WHERE seq = ?", (rollout.seq,))
        self._cache.forget(rollout)
        self._cache.forget_attempts_of(rollout.rollout_id)
        return attempts

    def count(self, changes: Mapping[str, int]) -> None:
        self._own_counts += changes.items()

    def publish(self, event: Event) -> None:
        self._own_events.append(event)


class GuardedTransaction(SqliteTransaction):
    """A transaction in which each operation can be undone alone: it has a savepoint of its own."""

    def keep(self) -> None:
        """The operation succeeded: its effects stay."""
        if self._writing:
            self._execute("RELEASE operation")
        super().keep()

    def undo(self) -> None:
        """The operation failed: as if it had never been."""
        if self._writing:
            self._execute("ROLLBACK TO operation; RELEASE operation")
            for row in self._own_rows:
                self._cache.forget(row)

    def _write(self) -> None:
        if not self._writing:
            self._execute("SAVEPOINT operation")
            self._writing = True


def _decode_or_tell(codec: Codec[Any], values: tuple[Any, ...]) -> list[Any]:
    width = len(codec.fields)
    try:
        row = codec.decode(values[:width])
        derived = codec.encode(row)[width:]
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        return [Unreadable(values[0], str(error))]
    names = codec.columns[width:]
    wrong = [
        Unreadable(values[0], f"its column {name} is {stored!r} and should be {true!r}")
        for name, stored, true in zip(names, values[width:], derived, strict=True)
        if stored != true
    ]
    return [*wrong, row]


def _with_latest(row: tuple[Any, ...]) -> tuple[RolloutRow, AttemptRow | None]:
    latest = None if row[_ROLLOUT_WIDTH] is None else ATTEMPTS.decode(row[_ROLLOUT_WIDTH:])
    return ROLLOUTS.decode(row[:_ROLLOUT_WIDTH]), latest


_DECODE: dict[Table, Callable[[tuple[Any, ...]], Any]] = {
    "rollouts": _with_latest,
    "attempts": ATTEMPTS.decode,
    "spans": SpanRow._make,
    "resources": RESOURCES.decode,
    "workers": WORKERS.decode,
}
