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
from typing import Any, Generic, NoReturn, TypeVar

import apsw

from agentlightning.errors import AgentLightningError, StoreClosed, StoreStopped, StoreUnavailable
from agentlightning.lifecycle.records import Moment
from agentlightning.store.backend import Event, Stopped, Transaction
from agentlightning.store.sqlite.connections import BUSY_MILLISECONDS
from agentlightning.store.sqlite.faults import FAULTS, stops_store, translate
from agentlightning.store.sqlite.guarded import GuardedTransaction
from agentlightning.store.sqlite.row_cache import RowCache
from agentlightning.store.sqlite.transaction import CannotUndo, SqliteTransaction

T = TypeVar("T")
_log = logging.getLogger(__name__)
Operation = Callable[[Transaction], Awaitable[T]]
_running_loop = asyncio._get_running_loop  # pyright: ignore[reportPrivateUsage] - None, where the public one raises

_PATIENCE_MILLISECONDS = 250
"""How long writers wait for readers to leave a log that has become long."""
_BATCH_LIMIT = 512
_BATCH_WORK = 768
"""The most operations, and about the most rows, under one commit, so that none waits long for the statements of others,
nor the event loop."""


def run_to_end(operation: Awaitable[T]) -> T:
    """Step an operation that never suspends to its end, without an event loop."""
    coroutine: Coroutine[Any, Any, T] = operation  # pyright: ignore[reportAssignmentType]
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    return _refuse_to_wait(coroutine)


def _refuse_to_wait(coroutine: Coroutine[Any, Any, Any]) -> NoReturn:
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


class GroupCommit:
    """Runs operations on the one writing connection.

    Args:
        connection: used by one thread at a time, never by anybody else.
        cache: the rows of this connection that are kept in memory.
        path: the name of the database in errors.
        moment: reads the clocks.
        publish: gets the events of each committed batch, in the thread that committed; and ``Stopped``.
        hand_over: runs a function, which commits; elsewhere if waiting for the disk is to block nobody.
        checkpoint_pages: how long the write-ahead log may grow before it is copied into the database.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        cache: RowCache,
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
        self.cache = cache
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
        with self._lock:
            if self._closed or self._fault is not None:
                self._check_open()
            self._jobs.append(_Job(operation, loop, future))
            if loop in self._woken:
                return future
            self._woken.add(loop)
        loop.call_soon(self._work, loop)
        return future

    def run_blocking(self, operation: Operation[T]) -> T:
        """``run`` for a thread without an event loop."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            self._check_open()
            self._jobs.append(_Job(operation, None, future))
        while not future.done():
            with self._turn:
                if not future.done():
                    self._run_waiting()
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
                self._run_waiting()
            if self._fault is None:  # signs of life are only in memory: time-outs go on from there after the next open
                self._jobs.append(_Job(lambda tx: tx.save_touched(), None, concurrent.futures.Future()))
                self._run_waiting()
            self._connection.close()

    # --- Queue -----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed(f"the store on {self._path!r} was closed; open a new one")
        if self._fault is not None:
            raise type(self._fault)(self._fault.message) from self._fault

    def _work(self, woken: asyncio.AbstractEventLoop | None = None) -> None:
        """Take the turn if it is free and there is something to do.

        Whoever gives the turn back looks at the queue again after, so a job that was queued
        while somebody else had it is never forgotten.

        Args:
            woken: the loop that was woken for this, if one was.
        """
        if woken is not None:
            with self._lock:
                self._woken.discard(woken)
        while self._jobs and self._turn.acquire(blocking=False):
            try:
                jobs, transaction = self._execute_waiting()
            except BaseException:
                self._turn.release()
                raise
            if transaction.wrote:
                self._hand_over(partial(self._conclude, jobs, transaction))  # commits now or later, and ends the turn
            else:
                self._conclude(jobs, transaction)

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
                for job in jobs:
                    job.settle()
                continue
            try:
                loop.call_soon_threadsafe(self._deliver, jobs)
            except RuntimeError:  # the loop was closed: nobody waits there any more
                continue

    def _deliver(self, jobs: list[_Job[Any]]) -> None:
        for job in jobs:
            job.settle()
        if self._jobs:
            self._work()

    # --- Batches: the jobs of one transaction (only with the turn) --------------------------------

    def _run_waiting(self) -> None:
        """Execute and commit what waits, and deliver the results; the turn is kept."""
        jobs, transaction = self._execute_waiting()
        self._commit(jobs, transaction)
        self._wake_waiting(jobs)

    def _conclude(self, jobs: list[_Job[Any]], transaction: SqliteTransaction) -> None:
        """Commit, give the turn back, deliver. Where the log is copied, callers do not wait for that."""
        self._commit(jobs, transaction)
        if self._log_pages >= self._next_checkpoint:
            self._wake_waiting(jobs)
            self._checkpoint()
            self._turn.release()
            self._wake_waiting()
        else:
            self._turn.release()
            self._wake_waiting(jobs)
        if self._jobs and _running_loop() is None:
            with self._lock:
                orphans = all(job.loop is not None and job.loop.is_closed() for job in self._jobs)
            if orphans:  # the loops of all jobs that wait were closed: accepted operations are carried out all the same
                self._work()

    def _execute_waiting(self) -> tuple[list[_Job[Any]], SqliteTransaction]:
        """Run the statements of all jobs that wait, in one transaction, which is open after; it may be that none do."""
        with self._lock:
            if len(self._jobs) <= _BATCH_LIMIT:
                jobs = list(self._jobs)
                self._jobs.clear()
            else:
                jobs = [self._jobs.popleft() for _ in range(_BATCH_LIMIT)]
        # The clocks are read after the jobs were taken: a job must not see a moment before it was queued.
        transaction = SqliteTransaction(self._connection, self._moment(), self.cache)
        try:
            if self._fault is not None:
                raise self._fault
            try:
                self._run_some(jobs, transaction)
            except CannotUndo:
                self._connection.execute("ROLLBACK")
                transaction.rolled_back()
                transaction = GuardedTransaction(self._connection, transaction.now(), self.cache)
                self._run_some(jobs, transaction)
        except Exception as error:  # noqa: BLE001 - the boundary of a batch: every caller gets the error
            self._abandon(jobs, transaction, error)
        except BaseException:
            self._abandon(jobs, transaction, StoreUnavailable("interrupted before the commit; nothing was written"))
            self._wake_waiting(jobs)
            raise
        return jobs, transaction

    def _run_some(self, jobs: list[_Job[Any]], transaction: SqliteTransaction) -> None:
        """Run jobs in their order. Those after much work go back to the queue, and out of the list."""
        self._connection.execute("BEGIN IMMEDIATE")
        for place, job in enumerate(jobs):
            if transaction.work >= _BATCH_WORK:
                with self._lock:
                    self._jobs.extendleft(reversed(jobs[place:]))
                del jobs[place:]
                break
            job.error = None
            try:
                coroutine: Coroutine[Any, Any, Any] = job.operation(transaction)  # pyright: ignore[reportAssignmentType]
                try:
                    coroutine.send(None)
                except StopIteration as stop:
                    job.value = stop.value
                else:
                    _refuse_to_wait(coroutine)
                transaction.keep()
            except Exception as error:  # noqa: BLE001 - the boundary of an operation: its caller gets the error
                job.error = known = self._translated(error)
                fatal = isinstance(known, AgentLightningError) and stops_store(known)
                if fatal or not self._connection.in_transaction:
                    raise known from known.__cause__
                transaction.undo()
        transaction.finish()

    def _translated(self, error: Exception) -> Exception:
        """The error as one of ours, if it is one of the database."""
        if not isinstance(error, FAULTS):
            return error
        known = translate(error, self._path)
        known.__cause__ = error
        return known

    def _abandon(self, jobs: list[_Job[Any]], transaction: SqliteTransaction, error: Exception) -> None:
        """Undo a whole batch, because its transaction is lost or must not be committed."""
        known = self._translated(error)
        if isinstance(known, AgentLightningError) and stops_store(known):
            self.stop(known)
        self._fail(jobs, transaction, known)

    def _fail(self, jobs: list[_Job[Any]], transaction: SqliteTransaction, error: Exception) -> None:
        """None of the jobs succeeded. Each caller gets an error object of its own."""
        for job in jobs:
            job.error = type(error)(*error.args)
            job.error.__cause__ = error
        transaction.events.clear()
        transaction.wrote = False
        transaction.rolled_back()
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except apsw.Error as failure:
                self.stop(StoreStopped(f"a rollback on {self._path!r} failed ({failure}); open the store again"))

    def _commit(self, jobs: list[_Job[Any]], transaction: SqliteTransaction) -> None:
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
            self._fail(jobs, transaction, known)
            return
        self.commits += 1
        self.operations += len(jobs)
        self.last_batch = len(jobs)
        if transaction.events:
            self._tell(transaction.events)

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
