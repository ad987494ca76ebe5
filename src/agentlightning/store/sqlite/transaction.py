"""The row primitives of ``store.backend`` on one SQLite connection.

No method ever suspends, so an operation made of these can be stepped to its end without an event loop.

The writing connection keeps rows in memory, for two reasons:

* A row that several steps of an operation change is written once, before a statement that searches its table or
  at the end of the batch. ``put`` therefore only notes the change.
* A sign of life (``touch``) need not be durable, because every lease gets a full new term when the file is opened.
  It stays in memory until it is older than the throttle of its row, until the row changes otherwise, or until the
  row has to make way. Readers look into the same memory, so they see the newest sign of life.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import apsw
from msgspec.structs import replace

from agentlightning.errors import Conflict
from agentlightning.lifecycle.records import AttemptRow, Moment, ResourcesRow, RolloutRow, WorkerRow
from agentlightning.store.backend import Event, Page, PageQuery, ResourcesBy, Row, SpanValues
from agentlightning.store.sqlite.connections import rebase_leases
from agentlightning.store.sqlite.reads import SqliteReads
from agentlightning.store.sqlite.row_cache import LARGEST, RowCache, Shelf, Undo
from agentlightning.store.sqlite.rows import ATTEMPTS, CODECS, ROLLOUTS, WORKERS

R = TypeVar("R", RolloutRow, AttemptRow, WorkerRow)
H = TypeVar("H", AttemptRow, WorkerRow)

_ROWS_OF_A_KIND = 2048
_LARGEST_RESOURCES = 4096
"""Bytes of the JSON of resources that are kept."""
_CLAIM_BYTES = 4 * 1024 * 1024
"""About so many bytes of rollouts are handed out at a time."""
_READ_AHEAD_LIMIT = 16
"""The most rollouts that a batch reads from the queue at a time for claims that may follow in it."""
_ATTEMPTS_OF_REQUEST = f"{ATTEMPTS.select} WHERE request_id = ? ORDER BY seq"
_QUEUE = f"{ROLLOUTS.select} WHERE claimable ORDER BY priority DESC, seq LIMIT ?"
_INSERT_SPAN = (
    "INSERT INTO spans (attempt_seq, sequence_id, issued, span_id, body) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (attempt_seq, span_id) DO NOTHING"
)


class CannotUndo(Exception):
    """An operation failed after one of its statements had written, in a transaction without savepoints."""


class SqliteTransaction(SqliteReads):
    """``Transaction``: many operations, one after another, in one SQLite transaction.

    An operation that fails before a statement of it has written is undone in memory. One that fails later cannot
    be undone alone, so ``undo`` raises, and all have to be run again in a ``GuardedTransaction``. This is rare,
    because nearly all operations check first. Going without savepoints saves SQLite a copy of every page that an
    operation touches.
    """

    def __init__(self, connection: apsw.Connection, now: Moment, cache: RowCache) -> None:
        super().__init__(connection, now, cache)
        self._cache = cache
        self._shelves = cache.shelves
        self.events: list[Event] = []
        """What the operations that succeeded have published."""
        self.wrote = False
        """Whether something has changed that must be durable. Known after ``finish``."""
        self.work = 0
        """How much it has done: about so many rows of 4 KB."""
        self._counts: list[tuple[str, int]] = []
        self._changed: list[tuple[Shelf, str]] = []
        """Rows that may have to be written before the commit."""
        self._log: list[Undo] = []
        self._ahead: dict[int, RolloutRow] = {}
        """The next rollouts of the queue, read ahead and not yet taken in this transaction."""
        self._read_ahead = 1
        self._kept = (0, 0, 0, 0)
        """How long the four lists were when the running operation began."""
        self._wrote_statement = False
        """Whether a statement of the running operation has written."""

    def keep(self) -> None:
        """The operation succeeded: its effects stay. The next one begins."""
        self._kept = (len(self._log), len(self._changed), len(self._counts), len(self.events))
        if self._wrote_statement:
            self._wrote_statement = False
            self.wrote = True

    def undo(self) -> None:
        """The operation failed: as if it had never been. The next one begins.

        Raises:
            CannotUndo: a statement of it has written.
        """
        if self._wrote_statement:
            raise CannotUndo
        self._forget_operation()

    def _forget_operation(self) -> None:
        log, changed, counts, events = self._kept
        self._wrote_statement = False
        self._cache.restore(self._log, log)
        self._ahead.clear()
        del self._changed[changed:], self._counts[counts:], self.events[events:]

    def finish(self) -> None:
        """Write what the operations have changed and counted. Call once, after the last one."""
        if self._changed:
            self._flush()
        self.wrote = self.wrote or self._wrote_statement
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

    def rolled_back(self) -> None:
        """The database has undone the whole transaction: so does the cache."""
        self._cache.restore(self._log, 0)

    # --- The cache -------------------------------------------------------------------------------

    def _keep(self, shelf: Shelf, key: str, row: Any) -> None:
        """Take a row that is as stored into the cache."""
        size = shelf.size(row)
        if size > LARGEST:
            self.work += size // LARGEST
            return
        rows = shelf.rows
        self._log.append((rows, key, None))
        rows[key] = row
        if len(rows) > _ROWS_OF_A_KIND:
            oldest = next(iter(rows))
            self._write_now(shelf, oldest)
            self._drop(shelf, oldest)

    def _drop(self, shelf: Shelf, key: str) -> None:
        for values in (shelf.rows, shelf.stored):
            self._log.append((values, key, values.pop(key, None)))

    def _found(self, row: Any) -> Any:
        """The row as the running transaction has it; it is kept, if it was not here."""
        shelf = self._shelves[type(row)]
        key = shelf.key(row)
        cached = shelf.rows.get(key)
        if cached is not None:
            return cached
        self._keep(shelf, key, row)
        return row

    def _write_now(self, shelf: Shelf, key: str) -> None:
        """Write a row whose newest state is not stored, be it only for a sign of life."""
        stored = shelf.stored.get(key)
        if stored is not None:
            row = shelf.rows[key]
            self._log += ((shelf.rows, key, row), (shelf.stored, key, stored))
            if row.version == stored.version:
                row = shelf.rows[key] = replace(row, version=row.version + 1)
            del shelf.stored[key]
            self._update(shelf, stored, row)

    def _flush(self) -> None:
        """Write the rows that were put. Call before a statement that searches their tables, if there are any."""
        for shelf, key in self._changed:
            stored = shelf.stored.get(key)
            if stored is not None:
                row = shelf.rows[key]
                if row.version != stored.version:
                    del shelf.stored[key]
                    self._update(shelf, stored, row)
        self._changed.clear()

    def _update(self, shelf: Shelf, stored: Any, row: Any) -> None:
        self._write()
        self._execute(*shelf.codec.update(stored, row))
        if self._connection.changes() != 1:
            raise Conflict(f"{type(row).__name__} {row.seq} has changed since it was read; read it again")

    def _write(self) -> None:
        """A statement that writes follows."""
        self._wrote_statement = True
        self.work += 1

    # --- Primitives ------------------------------------------------------------------------------

    async def get(self, kind: type[R], key: str) -> R | None:
        row = self._shelves[kind].rows.get(key)
        return row if row is not None else await super().get(kind, key)

    async def get_resources(self, selection: ResourcesBy) -> ResourcesRow | None:
        if selection.version is not None or selection.request_id is not None:
            return await super().get_resources(selection)
        newest, key = self._cache.newest_resources, selection.resources_id or ""
        known = newest.get(key)
        if known is not None:
            return known[0]
        row = await super().get_resources(selection)
        if row is None or len(row.resources) <= _LARGEST_RESOURCES:
            if len(newest) >= _ROWS_OF_A_KIND:
                newest.clear()
            self._log.append((newest, key, None))
            newest[key] = (row,)
        return row

    async def insert(self, row: Row) -> Any:
        """Store a new row; returns it with its ``seq``."""
        if type(row) is AttemptRow:
            self._flush()  # the attempt that it replaces must not be live any more in the index of live ones
        elif type(row) is RolloutRow and self._ahead:
            self._note_queue(row, known=False)
        elif type(row) is ResourcesRow:
            newest = self._cache.newest_resources
            for key in (row.resources_id, ""):
                self._log.append((newest, key, newest.pop(key, None)))
        self._write()
        codec = CODECS[type(row)]
        self._execute(codec.insert, codec.encode(row))
        stored = replace(row, seq=self._connection.last_insert_rowid())
        if isinstance(stored, AttemptRow):
            self._cache.note_live(None, stored, self._log)
        shelf = self._shelves.get(type(row))
        if shelf is not None:
            self._keep(shelf, shelf.key(stored), stored)
        return stored

    async def put(self, old: R, new: R) -> R:
        """Replace a row in memory; it is written before the next search of its table, or at the end of the batch."""
        shelf = self._shelves[type(new)]
        key = shelf.key(new)
        row = replace(new, version=old.version + 1)
        self.work += 1
        if isinstance(row, RolloutRow):
            if self._ahead:
                self._note_queue(row, known=True)
        elif isinstance(row, AttemptRow) and isinstance(old, AttemptRow):
            self._cache.note_live(old, row, self._log)
        cached = shelf.rows.get(key)
        if cached is None:  # too large for the cache
            self._update(shelf, old, row)
            self._keep(shelf, key, row)
            return row
        if cached.version != old.version or cached.seq != old.seq:
            raise Conflict(f"{type(old).__name__} {old.seq} has changed since it was read; read it again")
        stored = shelf.stored.get(key)
        self._log += ((shelf.rows, key, cached), (shelf.stored, key, stored))
        if stored is None:
            shelf.stored[key] = cached
        shelf.rows[key] = row
        if shelf.contents(row) != shelf.contents(cached) and shelf.size(row) > LARGEST:
            self._write_now(shelf, key)
            self._drop(shelf, key)
        else:
            self._changed.append((shelf, key))
        return row

    async def touch(self, old: H, new: H, write_after: float) -> H:
        """Replace a row in memory only, unless the stored sign of life is too old."""
        shelf = self._shelves[type(new)]
        key = shelf.key(new)
        cached = shelf.rows.get(key)
        if cached is None or cached.version != old.version:
            return await self.put(old, new)
        stored = shelf.stored.get(key)
        if new.beaten_lease - (stored or cached).beaten_lease >= write_after:
            return await self.put(old, new)
        self._log += ((shelf.rows, key, cached), (shelf.stored, key, stored))
        if stored is None:
            shelf.stored[key] = cached
        shelf.rows[key] = new
        return new

    async def save_touched(self) -> None:
        """Write every sign of life that is only in memory."""
        for shelf in self._shelves.values():
            for key in list(shelf.stored):
                self._write_now(shelf, key)

    async def insert_spans(self, spans: Sequence[SpanValues]) -> list[bool]:
        """Store spans; for each whether it was new."""
        self._write()
        self.work += len(spans) + sum([len(span[4]) for span in spans]) // LARGEST
        connection = self._connection
        before = connection.total_changes()
        self._executemany(_INSERT_SPAN, spans)
        inserted = connection.total_changes() - before
        if inserted == len(spans):
            return [True] * inserted
        # Rows get consecutive numbers, so the newest ones are those that were inserted just now.
        last = connection.last_insert_rowid()
        found = self._rows("SELECT span_id FROM spans WHERE seq > ?", (last - inserted,)) if inserted else ()
        fresh = {span_id for (span_id,) in found}
        return [_take_out(fresh, span[3]) for span in spans]

    async def attempts_of_request(self, request_id: str) -> list[AttemptRow]:
        """The attempts that a claim with this ``request_id`` made, the oldest first."""
        # No flush is needed, because no update changes a request_id.
        rows: list[Any] = self._execute(_ATTEMPTS_OF_REQUEST, (request_id,)).fetchall()
        return [self._found(ATTEMPTS.decode(row)) for row in rows] if rows else []

    async def live_attempts_of(self, worker_id: str) -> Sequence[str]:
        """The ids of the live attempts that name this worker, the oldest first."""
        held = self._cache.live.get(worker_id, {})
        return [held[seq] for seq in sorted(held)]

    async def newest_live_attempt_of(self, worker_id: str) -> str | None:
        """The last of ``live_attempts_of``."""
        held = self._cache.live.get(worker_id)
        return held[max(held)] if held else None

    async def page(self, query: PageQuery) -> Page:
        if self._changed:
            self._flush()
        return await super().page(query)

    async def next_claimable(self, limit: int) -> list[RolloutRow]:
        """Take the next rollouts of the queue."""
        ahead = self._ahead
        if len(ahead) < limit:
            if self._changed:
                self._flush()
            # The first claim of a batch reads no more than it wants; further ones show that more are coming.
            wanted = max(limit, self._read_ahead)
            self._read_ahead = min(4 * wanted, _READ_AHEAD_LIMIT)
            self._ahead = ahead = self._read_queue(wanted)
        taken = [self._found(row) for row in islice(ahead.values(), limit)]
        for row in taken:
            del ahead[row.seq]
        return taken

    def _read_queue(self, wanted: int) -> dict[int, RolloutRow]:
        """So many rollouts at its head, by ``seq``; fewer if they are large."""
        head: dict[int, RolloutRow] = {}
        size = 0
        cursor = self._connection.cursor()
        for values in cursor.execute(_QUEUE, (wanted,)):
            row = head[values[0]] = ROLLOUTS.decode(values)
            size += len(row.input) + len(row.metadata or b"")
            if size >= _CLAIM_BYTES:
                break
        cursor.close()
        return head

    def _note_queue(self, row: RolloutRow, *, known: bool) -> None:
        """A rollout is inserted or changed: what was read ahead of the queue may not be its head any more."""
        ahead = self._ahead
        if known:
            outdated = row.claimable or row.seq in ahead
        else:
            outdated = row.claimable and row.priority > next(reversed(ahead.values())).priority
        if outdated:
            ahead.clear()

    async def due(self, lease: float, limit: int) -> list[AttemptRow | WorkerRow]:
        """Rows whose deadline has passed, the earliest first."""
        if self._changed:
            self._flush()
        attempts = self._rows(f"{ATTEMPTS.select} WHERE deadline <= ? ORDER BY deadline LIMIT ?", (lease, limit))
        workers = self._rows(f"{WORKERS.select} WHERE deadline <= ? ORDER BY deadline LIMIT ?", (lease, limit))
        rows = [*map(ATTEMPTS.decode, attempts), *map(WORKERS.decode, workers)]
        return [self._found(row) for row in rows]

    async def next_deadline(self) -> float | None:
        """The earliest deadline of all rows."""
        if self._changed:
            self._flush()
        sql = (
            "SELECT min(at) FROM (SELECT min(deadline) AS at FROM attempts WHERE deadline IS NOT NULL "
            "UNION ALL SELECT min(deadline) FROM workers WHERE deadline IS NOT NULL)"
        )
        return self._rows(sql)[0][0]

    async def renew_leases(self, lost_seconds: float) -> None:
        """Give every lease a full new term."""
        await self.save_touched()
        self._write()
        rebase_leases(self._connection, self.now().lease, lost_seconds)
        for kind in (AttemptRow, WorkerRow):
            shelf = self._shelves[kind]
            for key in list(shelf.rows):
                self._drop(shelf, key)

    async def delete_spans(self, attempt: AttemptRow, limit: int) -> tuple[int, int]:
        """Delete some spans of an attempt; returns how many, and their bytes."""
        self._write()
        doomed = self._rows("SELECT seq, length(body) FROM spans WHERE attempt_seq = ? LIMIT ?", (attempt.seq, limit))
        for seq, _ in doomed:
            self._execute("DELETE FROM spans WHERE seq = ?", (seq,))
        return len(doomed), sum(size for _, size in doomed)

    async def delete_rollout(self, rollout: RolloutRow) -> int:
        """Delete a rollout and its attempts; returns the number of attempts."""
        if self._changed:
            self._flush()
        self._write()
        self._execute("DELETE FROM attempts WHERE rollout_id = ?", (rollout.rollout_id,))
        deleted = self._connection.changes()
        self._execute("DELETE FROM rollouts WHERE seq = ?", (rollout.seq,))
        self._drop(self._shelves[RolloutRow], rollout.rollout_id)
        attempts = self._shelves[AttemptRow]
        for key in [key for key, row in attempts.rows.items() if row.rollout_id == rollout.rollout_id]:
            self._drop(attempts, key)
        return deleted

    async def delete_worker(self, worker: WorkerRow) -> None:
        """Delete a worker."""
        if self._changed:
            self._flush()
        self._write()
        self._execute("DELETE FROM workers WHERE seq = ?", (worker.seq,))
        self._drop(self._shelves[WorkerRow], worker.worker_id)

    def count(self, changes: Mapping[str, int]) -> None:
        """Add to counters when the batch is committed."""
        self._counts += changes.items()

    def publish(self, event: Event) -> None:
        """Tell the engine when the batch is durable."""
        self.events.append(event)


def _take_out(ids: set[str], span_id: str) -> bool:
    """Whether the id is in the set, and no longer after: of two equal spans in one call only the first is new."""
    if span_id not in ids:
        return False
    ids.remove(span_id)
    return True
