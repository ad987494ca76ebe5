"""``store.backend.Backend`` that only reads, beside whoever owns the file.

SQLite lets other processes of the machine read a database in WAL mode while its owner writes: each
read sees one commit and everything before it (https://www.sqlite.org/isolation.html). Nothing here
takes the owner's lock, migrates, sweeps, or copies the log into the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import apsw

from agentlightning.errors import InvalidValue, StoreClosed, StoreStopped, StoreUnavailable
from agentlightning.lifecycle.records import Moment
from agentlightning.store.backend import Event, Measure, ReadTransaction, Stopped, Transaction
from agentlightning.store.clock import Clock
from agentlightning.store.sqlite.backup import copy_database
from agentlightning.store.sqlite.connections import open_reader
from agentlightning.store.sqlite.faults import FAULTS, disk_room, translate
from agentlightning.store.sqlite.group_commit import run_to_end
from agentlightning.store.sqlite.readers import ReaderPool
from agentlightning.store.sqlite.schema import MIGRATIONS, check_identity
from agentlightning.store.sqlite.transaction import SqliteReads

__all__ = ["ViewBackend"]

T = TypeVar("T")
_NOTHING_EXPIRES = float("-inf")


class ViewBackend:
    """The rows of a file as they were last committed.

    What expires is the owner's business: its lease clock is not known here, and a file without an owner gives
    every lease a fresh term when it is opened. So nothing expires in what is read here.

    Args:
        path: the database file.
        clock: where time comes from.
    """

    name = "sqlite"

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._readers = ReaderPool(self._connect)
        self._opened = False
        self._closed = False

    @property
    def stopped(self) -> bool:
        """True: nothing is ever written through a view."""
        return True

    @property
    def forked(self) -> bool:
        """False: each process makes connections of its own."""
        return False

    def measures(self) -> Sequence[Measure]:
        """None: whoever owns the file has them."""
        return ()

    def open(self, publish: Callable[[list[Event]], None]) -> None:
        """Look whether the file can be read; idempotent.

        Raises:
            InvalidValue: there is no such file.
            ForeignFile, NewerSchema, CorruptStore, StoreUnavailable: it cannot be read.
        """
        if self._closed:
            raise StoreClosed(f"the view of {str(self._path)!r} was closed; open a new one")
        if self._opened:
            return
        if not self._path.is_file():
            raise InvalidValue(f"there is no database {str(self._path)!r}; give the path of one, or a server's URL")
        try:
            with self._readers.snapshot() as connection:
                version = check_identity(connection, len(MIGRATIONS))
        except apsw.Error as error:
            raise translate(error, str(self._path)) from error
        if version < len(MIGRATIONS):
            raise StoreUnavailable(
                f"{str(self._path)!r} has schema version {version}, and {len(MIGRATIONS)} is needed; a store "
                "that opens it for writing brings it up to date (`agl store --db`)"
            )
        self._opened = True
        publish([Stopped(StoreStopped(f"{str(self._path)!r} is open for reading only, so nothing can be waited for"))])

    def lease_now(self) -> float:
        """Before every deadline."""
        return _NOTHING_EXPIRES

    def disk(self) -> tuple[int, int] | None:
        """As the file system tells an ordinary user."""
        return disk_room(self._path)

    def write(self, op: Callable[[Transaction], Awaitable[T]]) -> Awaitable[T]:
        """Refuse."""
        self._refuse()

    def write_blocking(self, op: Callable[[Transaction], Awaitable[T]]) -> T:
        """Refuse."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreUnavailable(f"{str(self._path)!r} is open for reading only; write through its owner's server")

    async def read(self, op: Callable[[ReadTransaction], Awaitable[T]], *, rows: int = 1) -> T:
        """Run ``op`` on a snapshot, in a thread."""
        return await asyncio.to_thread(self._read, op)

    def _read(self, op: Callable[[ReadTransaction], Awaitable[T]]) -> T:
        try:
            with self._readers.snapshot() as connection:
                return run_to_end(op(SqliteReads(connection, Moment(self._clock.wall(), _NOTHING_EXPIRES))))
        except FAULTS as error:
            raise translate(error, str(self._path)) from error

    async def backup(self, target: Path) -> None:
        """Copy the data as they stand into a new file; the owner's writes go on meanwhile."""
        await asyncio.to_thread(self._backup, target)

    def _backup(self, target: Path) -> None:
        with self._readers.snapshot() as connection:
            copy_database(connection, target)

    async def close(self) -> None:
        """Close the connections; idempotent."""
        self._closed = True
        await asyncio.to_thread(self._readers.close)

    def _connect(self) -> apsw.Connection:
        connection = open_reader(str(self._path), vfs=None)
        # The last connection to a file would copy the log into the database as it closes, and remove the log.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        return connection
