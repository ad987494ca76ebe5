"""Opening connections, with the settings that durability rests on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, get_args

import apsw

from agentlightning.store.sqlite.faults import translate_os
from agentlightning.store.sqlite.schema import MIGRATIONS, check_identity, migrate

__all__ = ["BUSY_MILLISECONDS", "DURABILITIES", "Durability", "open_reader", "open_writer"]

Durability = Literal["full", "process", "none"]

DURABILITIES: tuple[Durability, ...] = get_args(Durability)
_SYNCHRONOUS: dict[Durability, str] = {"full": "FULL", "process": "NORMAL", "none": "OFF"}
BUSY_MILLISECONDS = 5000
"""How long to wait for another program that holds a lock on the file."""
_STATEMENTS = 256


def open_writer(
    path: str, durability: Durability, *, vfs: str | None, migrations: Sequence[str] = MIGRATIONS
) -> apsw.Connection:
    """The one connection that writes, on a database of the newest schema.

    The write-ahead log is copied into the database by hand (``group_commit``), never inside a commit.

    Raises:
        ForeignFile, NewerSchema: the file is not one that this version can use.
        apsw.Error: the database cannot be opened.
    """
    if path != ":memory:":
        _create_private(path)
    connection = apsw.Connection(path, vfs=vfs, statementcachesize=_STATEMENTS)
    try:
        connection.set_busy_timeout(BUSY_MILLISECONDS)
        connection.pragma("page_size", 8192)
        connection.pragma("mmap_size", 0)
        connection.pragma("cache_size", -32_000)
        connection.pragma("temp_store", "memory")
        _keep_plans(connection)
        check_identity(connection, len(migrations))
        connection.pragma("journal_mode", "WAL")
        connection.wal_autocheckpoint(0)
        connection.pragma("synchronous", "FULL")  # the schema is durable before anything else is
        migrate(connection, migrations)
        connection.pragma("synchronous", _SYNCHRONOUS[durability])
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: str, *, vfs: str | None) -> apsw.Connection:
    """A connection that cannot write, on a database that is there."""
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE, vfs=vfs, statementcachesize=_STATEMENTS)
    connection.set_busy_timeout(BUSY_MILLISECONDS)
    connection.pragma("query_only", 1)
    connection.pragma("mmap_size", 0)
    connection.pragma("cache_size", -8_000)
    connection.pragma("temp_store", "memory")
    connection.wal_autocheckpoint(0)
    _keep_plans(connection)
    return connection


def _keep_plans(connection: apsw.Connection) -> None:
    """Plan each statement once: SQLite plans those that use a partial index anew for every new value
    otherwise, which costs more than running them (https://www.sqlite.org/queryplanner-ng.html#qpstab)."""
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)


def _create_private(path: str) -> None:
    """Make the file, if it is not there, so that only its owner can read it (SQLite gives its
    companions the same mode)."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise translate_os(error, path) from error
