"""The row primitives of ``store.backend`` that only read, on one SQLite connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import apsw
import msgspec

from agentlightning.lifecycle.records import AttemptRow, Moment, ResourcesRow, RolloutRow, SpanRow, WorkerRow
from agentlightning.store.backend import Page, PageQuery, ResourcesBy, Table, Unreadable
from agentlightning.store.sqlite.row_cache import RowCache
from agentlightning.store.sqlite.rows import (
    ATTEMPTS,
    RESOURCES,
    ROLLOUTS,
    WORKERS,
    Codec,
    Statement,
    counted_by,
    page_statement,
    total_statement,
)

R = TypeVar("R", RolloutRow, AttemptRow, WorkerRow)

_SCAN_SPANS = (
    "SELECT seq, attempt_seq, sequence_id, issued, span_id, body FROM spans WHERE seq > ? ORDER BY seq LIMIT ?"
)
_GETS: dict[type[Any], tuple[Codec[Any], str]] = {
    RolloutRow: (ROLLOUTS, f"{ROLLOUTS.select} WHERE t.rollout_id = ?"),
    AttemptRow: (ATTEMPTS, f"{ATTEMPTS.select} WHERE t.attempt_id = ?"),
    WorkerRow: (WORKERS, f"{WORKERS.select} WHERE t.worker_id = ?"),
}
_TABLES: dict[Table, Codec[Any]] = {each.table: each for each in (ROLLOUTS, ATTEMPTS, RESOURCES, WORKERS)}
_ROLLOUT_WIDTH = len(ROLLOUTS.fields)


class RolloutWithLatest(NamedTuple):
    """A row of a page of rollouts."""

    rollout: RolloutRow
    latest: AttemptRow | None


class SqliteReads:
    """``ReadTransaction`` on a connection that is inside a transaction.

    Args:
        connection: the connection.
        now: the clocks.
        cache: where the writer of this process keeps signs of life; None if another process writes.
    """

    def __init__(self, connection: apsw.Connection, now: Moment, cache: RowCache | None = None) -> None:
        self._connection = connection
        cursor = connection.cursor()
        self._execute = cursor.execute
        self._executemany = cursor.executemany
        self._now = now
        self._heard = cache

    def now(self) -> Moment:
        """Both clocks, as read when the transaction began."""
        return self._now

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return self._execute(sql, values).fetchall()

    async def get(self, kind: type[R], key: str) -> R | None:
        """The rollout, attempt or worker with this id."""
        codec, sql = _GETS[kind]
        rows: list[Any] = self._execute(sql, (key,)).fetchall()
        return self._found(codec.decode(rows[0])) if rows else None

    def _found(self, row: Any) -> Any:
        """What is returned for a row that was looked up."""
        return self._newest(row)

    def _newest(self, row: Any) -> Any:
        """The row with its newest sign of life."""
        cache = self._heard
        if cache is not None:
            if type(row) is AttemptRow:
                return cache.attempt_now(row)
            if type(row) is WorkerRow:
                return cache.worker_now(row)
            if type(row) is RolloutWithLatest and row.latest is not None:
                return RolloutWithLatest(row.rollout, cache.attempt_now(row.latest))
        return row

    async def get_resources(self, selection: ResourcesBy) -> ResourcesRow | None:
        """The version of resources that is selected."""
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

    async def span_bodies(self, attempt: AttemptRow, span_ids: Sequence[str]) -> dict[str, bytes]:
        """The stored bodies of these spans of an attempt, by ``span_id``; unknown ones are left out."""
        return {
            span_id: body
            for each in span_ids
            for span_id, body in self._rows(
                "SELECT span_id, body FROM spans WHERE attempt_seq = ? AND span_id = ?", (attempt.seq, each)
            )
        }

    async def page(self, query: PageQuery) -> Page:
        """The rows of one page, and the number of rows on all pages."""
        raw = self._rows(*page_statement(query))
        decode = _DECODE[query.table]
        rows = [self._newest(decode(row)) for row in raw]
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
        """All counters by name."""
        return dict(self._rows("SELECT name, value FROM counters"))

    async def scan(self, table: Table, after: int, limit: int) -> list[Any]:
        """Rows in the order of ``seq``, with an ``Unreadable`` for each damaged one."""
        if table == "spans":
            return self._rows(_SCAN_SPANS, (after, limit))
        codec = _TABLES[table]
        rows = self._rows(f"{codec.select_all} WHERE t.seq > ? ORDER BY t.seq LIMIT ?", (after, limit))
        return [found for row in rows for found in _decode_or_report(codec, row)]

    async def integrity(self) -> list[str]:
        """What SQLite itself finds damaged."""
        return [row[0] for row in self._rows("PRAGMA integrity_check(100)") if row[0] != "ok"]


def _decode_or_report(codec: Codec[Any], values: tuple[Any, ...]) -> list[Any]:
    width = len(codec.fields)
    try:
        row = codec.decode(values[:width])
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        return [Unreadable(values[0], str(error))]
    if codec.flag is not None and values[width] != codec.flag_of(row):
        wrong = f"its column {codec.flag} is {values[width]!r} and should be {codec.flag_of(row)}"
        return [Unreadable(values[0], wrong), row]
    return [row]


def _with_latest(row: tuple[Any, ...]) -> RolloutWithLatest:
    latest = None if row[_ROLLOUT_WIDTH] is None else ATTEMPTS.decode(row[_ROLLOUT_WIDTH:])
    return RolloutWithLatest(ROLLOUTS.decode(row[:_ROLLOUT_WIDTH]), latest)


_DECODE: dict[Table, Callable[[tuple[Any, ...]], Any]] = {
    "rollouts": _with_latest,
    "attempts": ATTEMPTS.decode,
    "spans": SpanRow._make,
    "resources": RESOURCES.decode,
    "workers": WORKERS.decode,
}
