"""Many operations, one transaction, one fsync.

Callers queue their operations. Whoever gets the *turn* (a lock) takes all that wait, steps
each to its end on the one writing connection, and hands the COMMIT over; when it is durable,
all callers get their results at once, and what was queued meanwhile makes the next batch. So
the batch grows by itself with the load, and an fsync is shared by all who wait for it.

The statements run in the thread of the event loop that queued the operation: a SQLite
driver releases the GIL around every statement, and a separate writer thread would have to
win it back from a busy loop each time. Only the COMMIT, which is one call and mostly waits
for the disk, runs in a thread of its own. A loop that is blocked holds up nobody: any other
loop with an operation in the queue takes the turn, and runs all that wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Generic, TypeVar, cast

import apsw

from agentlightning.errors import AgentLightningError, StoreClosed, StoreStopped, StoreUnavailable
from agentlightning.lifecycle.records import Moment
from agentlightning.store.backend import Event, Stopped, Transaction
from agentlightning.store.sqlite.connections import BUSY_MILLISECONDS
from agentlightning.store.sqlite.faults import FAULTS, stops_store, translate
from agentlightning.store.sqlite.row_cache import RowCache
from agentlightning.store.sqlite.transaction import CannotUndo, GuardedTransaction, SqliteTransaction

T = TypeVar("T")
_log = logging.getLogger(__name__)
Operation = Callable[[Transaction], Awaitable[T]]

_PATIENCE_MILLISECONDS = 250
"""How long writers wait for readers to leave a log that has become long."""
_LIVE_ATTEMPTS = "SELECT worker_id, seq, attempt_id FROM attempts WHERE live AND worker_id IS NOT NULL ORDER BY seq"
_BATCH_LIMIT = 512
"""The most operations under one commit, so that none waits long for the statements of others."""


def run_to_end(operation: Awaitable[T]) -> T:
    """Step an operation that never suspends to its end, without an event loop."""
    coroutine: Coroutine[Any, Any, T] = operation  # pyright: ignore[reportAssignmentType]
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise RuntimeError("a store operation awaited something other than its transaction")


class _Job(Generic[T]):
    """An operation that waits for its turn, and then for its commit."""

    __slots__ = ("error", "future", "loop", "operation", "value")

    def __init__(
        self,
        operation: Operation[T],
        loop: asyncio.AbstractEventLoop | None,
        future: asyncio.Future[T] | concurrent.futures.Future[T],
    ) -> None:
        self.operation = operation
        self.loop = loop
        self.future = future
        self.value: T | None = None
        self.error: Exception | None = None

    def settle(self) -> None:
        """Give the caller its result; one who left meanwhile gets none. Runs in the caller's loop."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.value)  # pyright: ignore[reportArgumentType] - it succeeded
        else:
            self.future.set_exception(self.error)


class _Batch:
    """The jobs of one transaction."""

    def __init__(self, jobs: list[_Job[Any]], transaction: SqliteTransaction) -> None:
        self.jobs = jobs
        self.transaction = transaction

    def fail(self, error: Exception) -> None:
        """None of the jobs succeeded. Each caller gets an error object of its own."""
        for job in self.jobs:
            job.error = type(error)(*error.args)
            job.error.__cause__ = error
        self.transaction.events.clear()


class GroupCommit:
    """Runs operations on the one writing connection.

    Args:
        connection: used by one thread at a time, never by anybody else.
        path: the name of the database in errors.
        moment: reads the clocks.
        publish: gets the events of each committed batch, in the thread that committed; and ``Stopped``.
        hand_over: runs a function, which commits; elsewhere if waiting for the disk is to block nobody.
        checkpoint_pages: how long the write-ahead log may grow before it is copied into the database.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        *,
        path: str,
        moment: Callable[[], Moment],
        publish: Callable[[list[Event]], None],
        hand_over: Callable[[Callable[[], None]], None],
        checkpoint_pages: int,
    ) -> None:
        self._connection = connection
        self._path = path
        self._moment = moment
        self._publish = publish
        self._hand_over = hand_over
        self._checkpoint_pages = checkpoint_pages
        self._next_checkpoint = checkpoint_pages
        self._next_restart = 4 * checkpoint_pages
        self._log_pages = 0
        self._page_bytes = int(connection.pragma("page_size"))
        self.commits = 0
        """Transactions committed."""
        self.operations = 0
        """Operations that they carried."""
        self.last_batch = 0
        """How many of them the last one carried."""
        self.cache = RowCache(cast("list[tuple[str, int, str]]", connection.execute(_LIVE_ATTEMPTS).fetchall()))
        """Rows that were used last, and signs of life that are not stored."""
        self._lock = threading.Lock()
        self._jobs: deque[_Job[Any]] = deque()
        self._woken: set[asyncio.AbstractEventLoop] = set()
        self._turn = threading.Lock()
        self._fault: AgentLightningError | None = None
        self._closed = False
        connection.set_wal_hook(self._note_log_pages)

    def run(self, operation: Operation[T]) -> asyncio.Future[T]:
        """Run an operation; the future has its result when it is durable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._accept(_Job(operation, loop, future))
        return future

    def run_blocking(self, operation: Operation[T]) -> T:
        """``run`` for a thread without an event loop."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._accept(_Job(operation, None, future))
        while not future.done():
            with self._turn:
                if not future.done():
                    self._run_batch(self._commit)
        self._wake_waiting()
        return future.result()

    def stop(self, error: AgentLightningError) -> None:
        """Accept nothing any more, because of ``error``."""
        if self._fault is None:
            self._fault = error
            self._tell([Stopped(error)])

    @property
    def stopped(self) -> bool:
        """Whether a fault has stopped it."""
        return self._fault is not None

    @property
    def log_bytes(self) -> int:
        """Bytes of the write-ahead log that are not in the database yet, or may still be read."""
        return self._log_pages * self._page_bytes

    def exclusively(self, function: Callable[[apsw.Connection], T]) -> T:
        """Call ``function`` with the connection while no batch runs. Blocks."""
        with self._turn:
            self._check_open()
            result = function(self._connection)
        self._wake_waiting()
        return result

    def close(self) -> None:
        """Finish what was accepted, then close the connection; idempotent. Blocks."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with self._turn:
            while self._jobs:
                self._run_batch(self._commit)
            if self._fault is None:
                self._save_touched()
            self._connection.close()

    def _save_touched(self) -> None:
        """Write the signs of life that are only in memory: time-outs go on from there when the file is opened."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._jobs.append(_Job(lambda tx: tx.save_touched(), None, future))
        self._run_batch(self._commit)

    # --- Queue -----------------------------------------------------------------------------------

    def _accept(self, job: _Job[Any]) -> None:
        with self._lock:
            if self._closed or self._fault is not None:
                self._check_open()
            self._jobs.append(job)
            loop = job.loop
            if loop is None or loop in self._woken:
                return
            self._woken.add(loop)
        loop.call_soon(self._wake_in, loop)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed(f"the store on {self._path!r} was closed; open a new one")
        if self._fault is not None:
            raise type(self._fault)(self._fault.message) from self._fault

    def _wake_in(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._woken.discard(loop)
        self._work()

    def _work(self) -> None:
        """Take the turn if it is free and there is something to do.

        Whoever gives the turn back looks at the queue again after, so a job that was queued
        while somebody else had it is never forgotten.
        """
        while self._jobs and self._turn.acquire(blocking=False):
            try:
                batch = self._execute_batch()
            except BaseException:
                self._turn.release()
                raise
            if batch is None:
                self._turn.release()
            elif batch.transaction.wrote:
                self._hand_over(partial(self._conclude, batch))  # where it commits here, the turn is free again
            else:
                self._conclude(batch)

    def _wake_waiting(self, delivered: Iterable[_Job[Any]] = ()) -> None:
        """Deliver results, one wake-up for each loop, and wake every loop that has jobs in the queue."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Job[Any]]] = {}
        for job in delivered:
            if job.loop is None:
                job.settle()
            else:
                by_loop.setdefault(job.loop, []).append(job)
        with self._lock:
            for job in self._jobs:
                if job.loop is not None:
                    by_loop.setdefault(job.loop, [])
        here = _running_loop()
        for loop, jobs in by_loop.items():
            if loop is here and jobs:
                _settle_all(jobs)
                continue
            try:
                loop.call_soon_threadsafe(self._deliver, jobs)
            except RuntimeError:  # the loop was closed: nobody waits there any more
                continue

    def _deliver(self, jobs: list[_Job[Any]]) -> None:
        _settle_all(jobs)
        self._work()

    # --- Batches (only with the turn) ------------------------------------------------------------

    def _run_batch(self, conclude: Callable[[_Batch], None]) -> None:
        """Execute and commit a batch here, and deliver its results; the turn is kept."""
        batch = self._execute_batch()
        if batch is not None:
            conclude(batch)
            self._wake_waiting(batch.jobs)

    def _conclude(self, batch: _Batch) -> None:
        """Commit, give the turn back, deliver. Where the log is copied, callers do not wait for that."""
        self._commit(batch)
        if self._log_pages >= self._next_checkpoint:
            self._wake_waiting(batch.jobs)
            self._checkpoint()
            self._turn.release()
            self._wake_waiting()
        else:
            self._turn.release()
            self._wake_waiting(batch.jobs)
        if _running_loop() is None:
            self._work_for_closed_loops()

    def _work_for_closed_loops(self) -> None:
        """Run jobs whose loops were closed: accepted operations are carried out all the same."""
        with self._lock:
            orphans = bool(self._jobs) and all(job.loop is not None and job.loop.is_closed() for job in self._jobs)
        if orphans:
            self._work()

    def _execute_batch(self) -> _Batch | None:
        """Run the statements of all jobs that wait, in one open transaction."""
        with self._lock:
            jobs = [self._jobs.popleft() for _ in range(min(len(self._jobs), _BATCH_LIMIT))]
        if not jobs:
            return None
        batch = _Batch(jobs, SqliteTransaction(self._connection, self.cache))
        try:
            if self._fault is not None:
                raise self._fault
            try:
                self._run_all(batch)
            except CannotUndo:
                self._connection.execute("ROLLBACK")
                batch.transaction.rolled_back()
                batch.transaction = GuardedTransaction(self._connection, self.cache)
                self._run_all(batch)
        except Exception as error:  # noqa: BLE001 - the boundary of a batch: every caller gets the error
            self._abandon(batch, error)
        except BaseException:
            self._abandon(batch, StoreUnavailable("interrupted before the commit; nothing was written"))
            self._wake_waiting(jobs)
            raise
        return batch

    def _run_all(self, batch: _Batch) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        now = self._moment()
        for job in batch.jobs:
            self._step(batch.transaction, job, now)
        batch.transaction.finish()

    def _step(self, transaction: SqliteTransaction, job: _Job[Any], now: Moment) -> None:
        transaction.begin(now)
        job.error = None
        try:
            job.value = run_to_end(job.operation(transaction))
            transaction.keep()
        except Exception as error:
            job.error = translate(error, self._path) if isinstance(error, FAULTS) else error
            if job.error is not error:
                job.error.__cause__ = error
            fatal = isinstance(job.error, AgentLightningError) and stops_store(job.error)
            if fatal or not self._connection.in_transaction:
                raise job.error from error
            transaction.undo()

    def _abandon(self, batch: _Batch, error: Exception) -> None:
        """Undo a whole batch, because its transaction is lost or must not be committed."""
        known = translate(error, self._path) if isinstance(error, FAULTS) else error
        if known is not error:
            known.__cause__ = error
        if isinstance(known, AgentLightningError) and stops_store(known):
            self.stop(known)
        batch.fail(known)
        batch.transaction.wrote = False
        batch.transaction.rolled_back()
        self._roll_back()

    def _commit(self, batch: _Batch) -> None:
        """COMMIT. If that fails the outcome is unknown, and nothing can be acknowledged any more."""
        if not self._connection.in_transaction:  # the batch was abandoned
            return
        try:
            self._connection.execute("COMMIT")
        except apsw.Error as error:
            known = translate(error, self._path)
            if not stops_store(known):
                known = StoreStopped(f"a commit to {self._path!r} failed ({error}); its outcome is unknown")
            known.__cause__ = error
            self.stop(known)
            batch.fail(known)
            batch.transaction.rolled_back()
            self._roll_back()
        else:
            self.commits += 1
            self.operations += len(batch.jobs)
            self.last_batch = len(batch.jobs)
        if batch.transaction.events:
            self._tell(batch.transaction.events)

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except apsw.Error as error:
                self.stop(StoreStopped(f"a rollback on {self._path!r} failed ({error}); open the store again"))

    def _note_log_pages(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self) -> None:
        """Copy the log into the database, as far as readers allow.

        A log can begin anew only at a moment when nobody reads from it. When it has grown to four
        times its measure, wait for such a moment, but not long, and not again before it has grown by
        as much: a reader that stays makes the log longer, and holds nobody up.
        """
        pages = self._log_pages
        patient = pages >= self._next_restart
        mode = apsw.SQLITE_CHECKPOINT_RESTART if patient else apsw.SQLITE_CHECKPOINT_PASSIVE
        self._log_pages = 0
        self._next_checkpoint = pages + self._checkpoint_pages
        try:
            self._connection.set_busy_timeout(_PATIENCE_MILLISECONDS)
            self._connection.wal_checkpoint(mode=mode)
        except apsw.BusyError:
            self._next_restart = pages + 4 * self._checkpoint_pages
        except apsw.Error as error:
            self.stop(translate(error, self._path))
        else:
            self._next_checkpoint = self._checkpoint_pages
            if patient:
                self._next_restart = 4 * self._checkpoint_pages
        finally:
            self._connection.set_busy_timeout(BUSY_MILLISECONDS)

    def _tell(self, events: list[Event]) -> None:
        """Publish. An error there is a bug of ours; the commit stands, and nobody is left waiting for it."""
        try:
            self._publish(events)
        except Exception as error:  # noqa: BLE001 - the boundary between the commit and those who listen
            _log.exception("events of a commit could not be taken in")
            if self._fault is None:
                self._fault = StoreStopped(f"events of a commit to {self._path!r} could not be taken in: {error}")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _settle_all(jobs: list[_Job[Any]]) -> None:
    for job in jobs:
        job.settle()
