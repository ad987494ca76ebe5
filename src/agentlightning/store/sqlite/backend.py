"""``store.backend.Backend`` on SQLite: in a file, or in memory."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import apsw

from agentlightning.errors import StoreClosed, StoreForked
from agentlightning.lifecycle.records import Moment
from agentlightning.store.backend import Event, Measure, ReadTransaction, Transaction
from agentlightning.store.sources import Clock
from agentlightning.store.sqlite.backup import copy_database
from agentlightning.store.sqlite.connections import Durability, OwnerLock, open_reader, open_writer
from agentlightning.store.sqlite.faults import FAULTS, disk_room, stops_store, translate
from agentlightning.store.sqlite.group_commit import GroupCommit, run_to_end
from agentlightning.store.sqlite.reads import SqliteReads

# --- The thread that waits for the disk, so that no event loop has to ---

Work = Callable[[], None]


def commit_here(work: Work) -> None:
    """Commit in the calling thread: where there is no disk to wait for."""
    work()


class CommitThread:
    """Runs what it is given, one after another, in one thread of its own.

    The thread starts with the first work and ends with ``close``, or when nobody holds this
    object any more.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, work: Work) -> None:
        """Run ``work`` soon, after all that was given before."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._queue,), name="agl-commit", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._queue.put, None).atexit = False
        self._queue.put(work)

    def close(self) -> None:
        """End the thread after what it was given; idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()


def _serve(work_queue: queue.SimpleQueue[Work | None]) -> None:
    while (work := work_queue.get()) is not None:
        work()
        del work


# --- Connections that only read ---

_IDLE_LIMIT = 4


class ReaderPool:
    """Lends connections, each to one borrower at a time; any thread may borrow.

    Args:
        connect: opens a connection that only reads.
    """

    def __init__(self, connect: Callable[[], apsw.Connection]) -> None:
        self._connect = connect
        self._idle: deque[apsw.Connection] = deque()
        self._closed = False

    @contextmanager
    def snapshot(self) -> Generator[apsw.Connection]:
        """A connection inside a read transaction: everything read through it stands at one moment."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if self._closed or len(self._idle) >= _IDLE_LIMIT:
                connection.close()
            else:
                self._idle.append(connection)

    def close(self) -> None:
        """Close the idle connections; those on loan are closed when they come back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


# ---

T = TypeVar("T")

_CHECKPOINT_PAGES = 1000
"""8 MB of log, after which it is copied into the database: a log that is short is overwritten, not extended."""
_LONG_READ_ROWS = 256
"""A read of more rows runs in a thread of its own; a shorter one takes less time than changing threads."""


class SqliteBackend(ABC):
    """What both kinds share: opening, closing, the clocks, and who may use it.

    Args:
        path: the name of the database in errors.
        clock: where time comes from.
    """

    name: str

    def __init__(self, path: str, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._opening = threading.Lock()
        self._forked = False
        self._closed = False
        self._lease_anchor = 0.0
        self._writer: GroupCommit | None = None

    def open(self, publish: Callable[[list[Event]], None]) -> None:
        """Take possession of the data; idempotent.

        Raises:
            StoreOwned, ForeignFile, NewerSchema, CorruptStore, StoreUnavailable: it cannot be had.
        """
        self._check_process()
        with self._opening:
            if self._closed:
                raise StoreClosed(f"the store on {self._path!r} was closed; open a new one")
            if self._writer is None:
                self._lease_anchor = self._clock.wall() - self._clock.monotonic()
                try:
                    self._writer = self._open_writer(publish)
                except apsw.Error as error:
                    raise translate(error, self._path) from error
                _call_in_children(self._leak_in_child)

    def lease_now(self) -> float:
        """The lease clock: wall time when the store was opened, and real time since."""
        return self._lease_anchor + self._clock.monotonic()

    @abstractmethod
    def disk(self) -> tuple[int, int] | None:
        """Free and total bytes of the disk that holds the data; None if that is not known here."""

    def measures(self) -> Sequence[Measure]:
        """How many operations shared how many commits, and how long the log is."""
        writer = self._writer
        if writer is None:
            return ()
        return (
            Measure("commits", "Transactions committed.", writer.commits, grows=True),
            Measure("committed_operations", "Operations that shared them.", writer.operations, grows=True),
            Measure("last_commit_operations", "Operations in the last transaction.", writer.last_batch),
            Measure("log_bytes", "Size of the write-ahead log in use.", writer.log_bytes),
        )

    def moment(self) -> Moment:
        """Both clocks."""
        return Moment(self._clock.wall(), self.lease_now())

    @property
    def stopped(self) -> bool:
        """Whether a fault has ended all writing."""
        return self._writer is not None and self._writer.stopped

    @property
    def forked(self) -> bool:
        """Whether this process inherited the store by fork."""
        return self._forked

    def write(self, op: Callable[[Transaction], Awaitable[T]]) -> Awaitable[T]:
        """Run ``op`` in a transaction; the result comes when it is durable."""
        return self._use().run(op)

    def write_blocking(self, op: Callable[[Transaction], Awaitable[T]]) -> T:
        """``write`` for a thread without an event loop."""
        return self._use().run_blocking(op)

    @abstractmethod
    async def read(self, op: Callable[[ReadTransaction], Awaitable[T]], *, rows: int = 1) -> T:
        """Run ``op`` on a snapshot."""

    @abstractmethod
    async def backup(self, target: Path) -> None:
        """Copy the data as they stand into a new file, while writes go on."""

    async def close(self) -> None:
        """Finish what was accepted, then let go of the data; idempotent. In a forked child: does nothing."""
        if not self._forked:
            await asyncio.to_thread(self.close_blocking)

    def close_blocking(self) -> None:
        """``close`` for a thread without an event loop."""
        with self._opening:
            already, self._closed = self._closed, True
            if not already and self._writer is not None:
                try:
                    self._writer.close()
                finally:
                    self._let_go()

    @abstractmethod
    def _open_writer(self, publish: Callable[[list[Event]], None]) -> GroupCommit: ...

    @abstractmethod
    def _let_go(self) -> None:
        """Free what the kind holds besides the writer, which is closed already."""

    def _inherited(self) -> list[Any]:
        return [self._writer]

    def _check_process(self) -> None:
        if self._forked:
            raise StoreForked(
                f"the store on {self._path!r} was opened by the parent of process {os.getpid()} and inherited by "
                "fork; use a LightningStoreClient here, or open the store after the fork"
            )

    def _use(self) -> GroupCommit:
        self._check_process()
        if self._writer is None or self._closed:
            raise StoreClosed(f"the store on {self._path!r} was closed; open a new one")
        return self._writer

    def _leak_in_child(self) -> None:
        """Keep inherited handles for ever: closing one in a child would harm the parent's locks."""
        self._forked = True
        _leaked.extend(self._inherited())


_leaked: list[Any] = []
"""Handles of the parent, in a forked child. Empty in every other process."""


def _call_in_children(method: Callable[[], None]) -> None:
    """Call a bound method in every process forked from this one, as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        living = reference()
        if living is not None:
            living()

    os.register_at_fork(after_in_child=call)


class MemoryBackend(SqliteBackend):
    """A database in memory: one connection, which is also read through."""

    name = "memory"

    def __init__(self, clock: Clock) -> None:
        super().__init__(":memory:", clock)

    def disk(self) -> tuple[int, int] | None:
        """None: there is no disk."""
        return None

    async def read(self, op: Callable[[ReadTransaction], Awaitable[T]], *, rows: int = 1) -> T:
        """Run ``op`` between two writes."""
        return await self._use().run(op)

    async def backup(self, target: Path) -> None:
        """Copy the data into a new file; writes wait meanwhile."""
        writer = self._use()
        await asyncio.to_thread(writer.exclusively, lambda connection: copy_database(connection, target))

    def _open_writer(self, publish: Callable[[list[Event]], None]) -> GroupCommit:
        return GroupCommit(
            open_writer(":memory:", "none", vfs=None),
            path=self._path,
            moment=self.moment,
            publish=publish,
            hand_over=commit_here,
            checkpoint_pages=_CHECKPOINT_PAGES,
        )

    def _let_go(self) -> None:
        pass


class FileBackend(SqliteBackend):
    """A database in a file that this process owns.

    Args:
        path: the file; made if it does not exist, in a folder that does.
        durability: what an acknowledged write survives: ``full`` power loss, ``process`` the death
            of the process, ``none`` the death of the process too, but a power loss may damage the file.
        clock: where time comes from.
        vfs: the name of the apsw VFS to use; None for the default.
        checkpoint_pages: how many pages of 8 KB the write-ahead log may grow to before it is copied
            into the database.
    """

    name = "sqlite"

    def __init__(
        self,
        path: Path,
        durability: Durability,
        clock: Clock,
        vfs: str | None = None,
        checkpoint_pages: int = _CHECKPOINT_PAGES,
    ) -> None:
        path = Path(os.path.realpath(path))  # one file, one owner: by whatever links, and wherever the process goes
        super().__init__(str(path), clock)
        self._durability: Durability = durability
        self._vfs = vfs
        self._checkpoint_pages = checkpoint_pages
        self._owner = OwnerLock(path)
        self._commit_thread = CommitThread()
        self._readers = ReaderPool(lambda: open_reader(self._path, vfs=vfs))
        self._long_reads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="agl-read")

    def disk(self) -> tuple[int, int] | None:
        """As the file system tells an ordinary user."""
        return disk_room(Path(self._path))

    async def read(self, op: Callable[[ReadTransaction], Awaitable[T]], *, rows: int = 1) -> T:
        """Run ``op`` on a snapshot: short ones at once, long ones in a thread."""
        self._use()
        if rows <= _LONG_READ_ROWS:
            return self._read(op)
        return await asyncio.get_running_loop().run_in_executor(self._long_reads, self._read, op)

    async def backup(self, target: Path) -> None:
        """Copy the data as they stand into a new file; writes go on meanwhile."""
        self._use()
        await asyncio.to_thread(self._backup, target)

    def _backup(self, target: Path) -> None:
        with self._readers.snapshot() as connection:
            copy_database(connection, target)

    def _read(self, op: Callable[[ReadTransaction], Awaitable[T]]) -> T:
        try:
            with self._readers.snapshot() as connection:
                return run_to_end(op(SqliteReads(connection, self.moment(), self._use().cache)))
        except FAULTS as error:
            known = translate(error, self._path)
            if stops_store(known) and self._writer is not None:
                self._writer.stop(known)
            raise known from error

    def _open_writer(self, publish: Callable[[list[Event]], None]) -> GroupCommit:
        self._owner.acquire()
        try:
            connection = open_writer(self._path, self._durability, vfs=self._vfs)
            try:
                _rebase_leases(connection, self.lease_now())
            except BaseException:
                connection.close()
                raise
        except BaseException:
            self._owner.release()
            raise
        return GroupCommit(
            connection,
            path=self._path,
            moment=self.moment,
            publish=publish,
            hand_over=self._commit_thread,
            checkpoint_pages=self._checkpoint_pages,
        )

    def _let_go(self) -> None:
        self._commit_thread.close()
        self._long_reads.shutdown()
        try:
            self._readers.close()
        finally:
            self._owner.release()

    def _inherited(self) -> list[Any]:
        self._owner.release()
        return [self._writer, self._readers, self._commit_thread]


def _rebase_leases(connection: apsw.Connection, now: float) -> None:
    """Give every lease a full new term, so that the time the store was closed expires none.

    Time-outs go on from where they stood at the last sign of life that was written. Deadlines are lower bounds: set
    to now, the first sweep computes the true ones. The last sequence id of each live attempt may be known from its
    spans only, because a span does not write the row of its attempt.
    """
    with connection:
        connection.execute(
            """UPDATE attempts SET
                version = version + 1,
                started_lease = started_lease + :now - (SELECT max(beaten_lease) FROM attempts WHERE live),
                beaten_lease = :now,
                deadline = iif(deadline IS NULL, NULL, :now),
                span_sequence = max(
                    span_sequence,
                    (SELECT coalesce(max(sequence_id), 0) FROM spans WHERE attempt_seq = attempts.seq)
                )
            WHERE live""",
            {"now": now},
        )
        connection.execute(
            "UPDATE workers SET version = version + 1, beaten_lease = :now, deadline = :now WHERE deadline IS NOT NULL",
            {"now": now},
        )
