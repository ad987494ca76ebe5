"""``store.backend.Backend`` on SQLite: in memory, in a file, or beside the process that owns the file."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import apsw

from agentlightning.errors import InvalidValue, StoreClosed, StoreForked, StoreStopped, StoreUnavailable
from agentlightning.lifecycle.records import Moment
from agentlightning.store.backend import Backend, Event, Measure, ReadTransaction, Stopped, Transaction
from agentlightning.store.sources import Clock
from agentlightning.store.sqlite.backup import copy_database
from agentlightning.store.sqlite.connections import (
    MIGRATIONS,
    Durability,
    OwnerLock,
    check_identity,
    open_reader,
    open_writer,
    rebase_leases,
)
from agentlightning.store.sqlite.faults import FAULTS, disk_room, stops_store, translate
from agentlightning.store.sqlite.group_commit import GroupCommit, run_to_end
from agentlightning.store.sqlite.reads import SqliteReads
from agentlightning.store.sqlite.row_cache import RowCache

T = TypeVar("T")
Work = Callable[[], None]
Write = Callable[[Transaction], Awaitable[T]]
Read = Callable[[ReadTransaction], Awaitable[T]]

_CHECKPOINT_PAGES = 1000
"""8 MB of log, after which it is copied into the database: a log that is short is overwritten, not extended."""
_LONG_READ_ROWS = 256
"""A read of more rows runs in a thread of its own; a shorter one takes less time than changing threads."""
_IDLE_LIMIT = 4
"""The most connections for reading that are kept open while nobody reads."""


class CommitThread:
    """Runs what it is given, one after another, in one thread of its own, so that no event loop waits for the disk.

    The thread starts with the first work and ends with ``close``, or when nobody holds this object any more.
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


class ReaderPool:
    """Reads through connections, each lent to one borrower at a time; any thread may borrow.

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

    def read(self, op: Read[T], now: Moment, cache: RowCache | None = None) -> T:
        """Run ``op`` on a snapshot, here. ``cache``: as for ``SqliteReads``."""
        with self.snapshot() as connection:
            return run_to_end(op(SqliteReads(connection, now, cache)))

    def copy(self, target: Path) -> None:
        """Copy a snapshot into a new file. Raises as ``copy_database``."""
        with self.snapshot() as connection:
            copy_database(connection, target)

    def close(self) -> None:
        """Close the idle connections; those on loan are closed when they come back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class SqliteBackend(Backend):
    """A database in memory, with one connection, which is also read through.

    Args:
        clock: where time comes from.
        path: the name of the database in errors.
    """

    name = "memory"

    def __init__(self, clock: Clock, path: str = ":memory:") -> None:
        self.forked = False
        self._path = path
        self._clock = clock
        self._hand_over: Callable[[Work], None] = _run  # there is no disk to wait for
        self._checkpoint_pages = _CHECKPOINT_PAGES
        self._opening = threading.Lock()
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
            if self._writer is not None:
                return
            self._lease_anchor = self._clock.wall() - self._clock.monotonic()
            try:
                connection, cache = self._connect()
                self._writer = GroupCommit(
                    connection,
                    cache,
                    path=self._path,
                    moment=self.moment,
                    publish=publish,
                    hand_over=self._hand_over,
                    checkpoint_pages=self._checkpoint_pages,
                )
            except apsw.Error as error:
                raise translate(error, self._path) from error
            backend = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _leave(backend()))

    def _connect(self) -> tuple[apsw.Connection, RowCache]:
        """The connection that writes, and what the writer has in memory."""
        connection = open_writer(self._path, "none", vfs=None)
        return connection, RowCache(connection)

    def lease_now(self) -> float:
        """The lease clock: wall time when the store was opened, and real time since."""
        return self._lease_anchor + self._clock.monotonic()

    def boot_now(self) -> float:
        return self._clock.boot()

    def moment(self) -> Moment:
        """Both clocks."""
        return Moment(self._clock.wall(), self._lease_anchor + self._clock.monotonic())

    def disk(self) -> tuple[int, int] | None:
        return None

    def measures(self) -> Sequence[Measure]:
        writer = self._writer
        if writer is None:
            return ()
        return (
            Measure("agl_store_commits", "Transactions committed.", writer.commits, grows=True),
            Measure("agl_store_committed_operations", "Operations that shared them.", writer.operations, grows=True),
            Measure("agl_store_last_commit_operations", "Operations in the last transaction.", writer.last_batch),
            Measure("agl_store_log_bytes", "Size of the write-ahead log in use.", writer.log_bytes),
        )

    @property
    def stopped(self) -> bool:
        return self._writer is not None and self._writer.stopped

    def write(self, op: Write[T]) -> Awaitable[T]:
        writer = self._writer
        if writer is None or self._closed or self.forked:
            writer = self._use()  # raises
        return writer.run(op)

    def write_blocking(self, op: Write[T]) -> T:
        return self._use().run_blocking(op)

    async def read(self, op: Read[T], *, rows: int = 1) -> T:
        return await self._use().run(op)  # between two writes

    async def backup(self, target: Path) -> None:
        writer = self._use()
        await asyncio.to_thread(writer.exclusively, lambda connection: copy_database(connection, target))

    async def close(self) -> None:
        """Finish what was accepted, then let go of the data; idempotent. In a forked child: does nothing."""
        if not self.forked:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._opening:
            already, self._closed = self._closed, True
            if not already and self._writer is not None:
                try:
                    self._writer.close()
                finally:
                    self._let_go()

    def _let_go(self) -> None:
        """Free what there is besides the writer, which is closed already."""

    def _check_process(self) -> None:
        if self.forked:
            raise StoreForked(
                f"the store on {self._path!r} was opened by the parent of process {os.getpid()} and inherited by "
                "fork; use a LightningStoreClient here, or open the store after the fork"
            )

    def _use(self) -> GroupCommit:
        self._check_process()
        if self._writer is None or self._closed:
            raise StoreClosed(f"the store on {self._path!r} was closed; open a new one")
        return self._writer

    def leave_to_parent(self) -> None:
        """In a forked child: keep inherited handles for ever, because to close one would harm the parent's locks."""
        self.forked = True
        _left.append(self)


_left: list[SqliteBackend] = []
"""The parent's, in a forked child. Empty in every other process."""


def _leave(backend: SqliteBackend | None) -> None:
    if backend is not None:
        backend.leave_to_parent()


def _run(work: Work) -> None:
    work()


class FileBackend(SqliteBackend):
    """A database in a file that this process owns.

    Args:
        path: the file; made if it does not exist, in a folder that does.
        durability: as for ``SqliteLightningStore``.
        clock: where time comes from.
        vfs: the name of the apsw VFS to use; None for the default.
        checkpoint_pages: how many pages of 8 KB the log may have before it is copied into the database.
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
        super().__init__(clock, str(path))
        self._durability: Durability = durability
        self._vfs = vfs
        self._checkpoint_pages = checkpoint_pages
        self._owner = OwnerLock(path)
        self._hand_over = self._commit_thread = CommitThread()
        self._readers = ReaderPool(lambda: open_reader(str(path), vfs=vfs))
        self._long_reads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="agl-read")

    def disk(self) -> tuple[int, int] | None:
        return disk_room(Path(self._path))

    async def read(self, op: Read[T], *, rows: int = 1) -> T:
        self._use()
        if rows <= _LONG_READ_ROWS:
            return self._read(op)
        return await asyncio.get_running_loop().run_in_executor(self._long_reads, self._read, op)

    def _read(self, op: Read[T]) -> T:
        try:
            return self._readers.read(op, self.moment(), self._use().cache)
        except FAULTS as error:
            known = translate(error, self._path)
            if stops_store(known) and self._writer is not None:
                self._writer.stop(known)
            raise known from error

    async def backup(self, target: Path) -> None:
        self._use()
        await asyncio.to_thread(self._readers.copy, target)

    def _connect(self) -> tuple[apsw.Connection, RowCache]:
        with ExitStack() as undo:
            self._owner.acquire()
            undo.callback(self._owner.release)
            connection = open_writer(self._path, self._durability, vfs=self._vfs)
            undo.callback(connection.close)
            rebase_leases(connection, self.lease_now())
            cache = RowCache(connection)
            undo.pop_all()
        return connection, cache

    def _let_go(self) -> None:
        self._commit_thread.close()
        self._long_reads.shutdown()
        try:
            self._readers.close()
        finally:
            self._owner.release()

    def leave_to_parent(self) -> None:
        super().leave_to_parent()
        self._owner.release()


class ViewBackend(Backend):
    """The rows of a file as they were last committed, beside whoever owns the file.

    What expires is the owner's business: its lease clock is not known here, and a file without an owner gives
    every lease a fresh term when it is opened. So nothing expires in what is read here.

    Args:
        path: the database file.
        clock: where time comes from.
    """

    name = "sqlite"
    forked = False  # each process makes connections of its own

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._readers = ReaderPool(self._connect)
        self._opened = False
        self._closed = False

    @property
    def stopped(self) -> bool:
        return True  # nothing is ever written through a view

    def measures(self) -> Sequence[Measure]:
        return ()  # whoever owns the file has them

    def open(self, publish: Callable[[list[Event]], None]) -> None:
        """Look whether the file can be read; idempotent.

        Raises:
            InvalidValue: there is no such file.
            ForeignFile, NewerSchema, CorruptStore, StoreUnavailable: it cannot be read.
        """
        path = str(self._path)
        if self._closed:
            raise StoreClosed(f"the view of {path!r} was closed; open a new one")
        if self._opened:
            return
        if not self._path.is_file():
            raise InvalidValue(f"there is no database {path!r}; give the path of one, or a server's URL")
        try:
            with self._readers.snapshot() as connection:
                version = check_identity(connection, len(MIGRATIONS))
        except apsw.Error as error:
            raise translate(error, path) from error
        if version < len(MIGRATIONS):
            raise StoreUnavailable(
                f"{path!r} has schema version {version}, and {len(MIGRATIONS)} is needed; a store "
                "that opens it for writing brings it up to date (`agl store --db`)"
            )
        self._opened = True
        publish([Stopped(StoreStopped(f"{path!r} is open for reading only, so nothing can be waited for"))])

    def lease_now(self) -> float:
        """Before every deadline."""
        return float("-inf")

    def boot_now(self) -> float:
        return self._clock.boot()

    def disk(self) -> tuple[int, int] | None:
        return disk_room(self._path)

    def write(self, op: Write[T]) -> Awaitable[T]:
        self._refuse()

    def write_blocking(self, op: Write[T]) -> T:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreUnavailable(f"{str(self._path)!r} is open for reading only; write through its owner's server")

    async def read(self, op: Read[T], *, rows: int = 1) -> T:
        try:
            return await asyncio.to_thread(self._readers.read, op, Moment(self._clock.wall(), self.lease_now()))
        except FAULTS as error:
            raise translate(error, str(self._path)) from error

    async def backup(self, target: Path) -> None:
        await asyncio.to_thread(self._readers.copy, target)

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._readers.close)

    def _connect(self) -> apsw.Connection:
        connection = open_reader(str(self._path), vfs=None)
        # The last connection to a file would copy the log into the database as it closes, and remove the log.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        return connection
