"""Opening connections, with the settings that durability rests on."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, get_args

import apsw

from agentlightning.errors import ForeignFile, NewerSchema, StoreOwned
from agentlightning.store.sqlite.faults import translated

# --- The tables, and how a file of an older version becomes one of this version ---

APPLICATION_ID = 0x41474C31
"""Marks a file as ours (the letters AGL1)."""

_VERSION_1 = """
CREATE TABLE rollouts (
    seq INTEGER PRIMARY KEY, version INTEGER NOT NULL, rollout_id TEXT NOT NULL,
    status TEXT NOT NULL, priority INTEGER NOT NULL, input BLOB NOT NULL, mode TEXT,
    resources_id TEXT, resources_version INTEGER, policy BLOB NOT NULL, metadata BLOB,
    start_time REAL NOT NULL, end_time REAL, reason_code TEXT, reason_message TEXT,
    attempts INTEGER NOT NULL, redeliveries INTEGER NOT NULL, latest_attempt_id TEXT,
    digest BLOB NOT NULL, claimable INTEGER NOT NULL
);
CREATE UNIQUE INDEX rollouts_by_id ON rollouts (rollout_id);
CREATE INDEX rollouts_claimable ON rollouts (priority DESC, seq) WHERE claimable;
CREATE INDEX rollouts_ended ON rollouts (end_time) WHERE end_time IS NOT NULL;

CREATE TABLE attempts (
    seq INTEGER PRIMARY KEY, version INTEGER NOT NULL, rollout_id TEXT NOT NULL, attempt_id TEXT NOT NULL,
    sequence_id INTEGER NOT NULL, status TEXT NOT NULL, start_time REAL NOT NULL, end_time REAL,
    worker_id TEXT, last_heartbeat_time REAL, metadata BLOB, reason_code TEXT, reason_message TEXT,
    request_id TEXT, confirm_seconds REAL, started_lease REAL NOT NULL, beaten_lease REAL NOT NULL, deadline REAL,
    span_sequence INTEGER NOT NULL, digest BLOB NOT NULL, live INTEGER NOT NULL
);
CREATE UNIQUE INDEX attempts_by_id ON attempts (attempt_id);
CREATE UNIQUE INDEX attempts_of_rollout ON attempts (rollout_id, sequence_id);
CREATE UNIQUE INDEX attempts_one_live ON attempts (rollout_id) WHERE live;
CREATE INDEX attempts_of_worker ON attempts (worker_id) WHERE live;
CREATE INDEX attempts_of_request ON attempts (request_id) WHERE request_id IS NOT NULL;
CREATE INDEX attempts_due ON attempts (deadline) WHERE deadline IS NOT NULL;

CREATE TABLE spans (
    seq INTEGER PRIMARY KEY, attempt_seq INTEGER NOT NULL, sequence_id INTEGER NOT NULL, issued INTEGER NOT NULL,
    span_id TEXT NOT NULL, body BLOB NOT NULL
);
CREATE UNIQUE INDEX spans_by_id ON spans (attempt_seq, span_id);
CREATE INDEX spans_in_order ON spans (attempt_seq, sequence_id);

CREATE TABLE resources (
    seq INTEGER PRIMARY KEY, resources_id TEXT NOT NULL, version INTEGER NOT NULL,
    create_time REAL NOT NULL, update_time REAL NOT NULL, resources BLOB NOT NULL,
    request_id TEXT, digest BLOB NOT NULL
);
CREATE UNIQUE INDEX resources_by_version ON resources (resources_id, version);
CREATE UNIQUE INDEX resources_of_request ON resources (request_id) WHERE request_id IS NOT NULL;

CREATE TABLE workers (
    seq INTEGER PRIMARY KEY, version INTEGER NOT NULL, worker_id TEXT NOT NULL, status TEXT NOT NULL,
    heartbeat_stats BLOB, last_heartbeat_time REAL, last_dequeue_time REAL, last_busy_time REAL, last_idle_time REAL,
    current_rollout_id TEXT, current_attempt_id TEXT, lease_seconds REAL, beaten_lease REAL NOT NULL, deadline REAL
);
CREATE UNIQUE INDEX workers_by_id ON workers (worker_id);
CREATE INDEX workers_due ON workers (deadline) WHERE deadline IS NOT NULL;

CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""

_VERSION_4 = """
DROP INDEX spans_in_order;
ALTER TABLE workers DROP COLUMN current_rollout_id;
ALTER TABLE workers DROP COLUMN current_attempt_id;
UPDATE workers SET status = 'idle' WHERE status = 'busy';
"""
"""What a worker works on is computed from its live attempts. The spans of one attempt are found by the index that
keeps them unique and then sorted, which costs less than keeping a second index in order at every insert."""

MIGRATIONS: Sequence[str] = (
    _VERSION_1,
    "ALTER TABLE workers ADD COLUMN registration BLOB; ALTER TABLE workers ADD COLUMN directive TEXT",
    "ALTER TABLE rollouts ADD COLUMN releases INTEGER NOT NULL DEFAULT 0",
    _VERSION_4,
    "ALTER TABLE rollouts ADD COLUMN suspects TEXT NOT NULL DEFAULT ''; "
    "ALTER TABLE workers ADD COLUMN heard_lease REAL NOT NULL DEFAULT 0.0",
    "ALTER TABLE workers ADD COLUMN reason_code TEXT; ALTER TABLE workers ADD COLUMN reason_message TEXT",
)
"""Script number n brings a file from version n to version n + 1."""


def check_identity(connection: apsw.Connection, newest: int) -> int:
    """The schema version of the file; 0 for one that is empty.

    Raises:
        ForeignFile: the file belongs to another program.
        NewerSchema: its version is above ``newest``.
    """
    application: int = connection.pragma("application_id")
    version: int = connection.pragma("user_version")
    if application != APPLICATION_ID:
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()[0][0]
        if (application, version, tables) != (0, 0, 0):
            raise ForeignFile(
                f"{connection.filename!r} is a SQLite database of another program "
                f"(application id {application:#x}); give another path"
            )
    if version > newest:
        raise NewerSchema(
            f"{connection.filename!r} has schema version {version}, and this Agent Lightning knows up to "
            f"{newest}; upgrade Agent Lightning (there is no way down)"
        )
    return version


def migrate(connection: apsw.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring the file to the newest version; a file that has it is left alone. Raises as ``check_identity``."""
    for number in range(check_identity(connection, len(migrations)), len(migrations)):
        with connection:
            connection.execute(migrations[number])
            connection.execute(f"PRAGMA user_version = {number + 1}; PRAGMA application_id = {APPLICATION_ID}")


# ---

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
        with translated(path):  # made here, so that only its owner can read it; SQLite gives its companions this mode
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
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


def rebase_leases(connection: apsw.Connection, now: float, lost_seconds: float | None = None) -> None:
    """Give every lease a full new term, so that the time in which the store was closed or stood still expires none.

    Time-outs do not count ``lost_seconds``; None: they go on from where they stood at the last sign of life that was
    written. Deadlines are lower bounds: set to now, the first sweep computes the true ones. The last sequence id of
    each live attempt may be known from its spans only, because a span does not write the row of its attempt.
    """
    with connection:
        connection.execute(
            """UPDATE attempts SET
                version = version + 1,
                started_lease = min(:now, started_lease
                    + coalesce(:lost, :now - (SELECT max(beaten_lease) FROM attempts WHERE live))),
                beaten_lease = :now,
                deadline = iif(deadline IS NULL, NULL, :now),
                span_sequence = max(
                    span_sequence,
                    (SELECT coalesce(max(sequence_id), 0) FROM spans WHERE attempt_seq = attempts.seq)
                )
            WHERE live AND (:lost IS NULL OR beaten_lease <> :now)""",
            {"now": now, "lost": lost_seconds},
        )
        connection.execute(
            "UPDATE workers SET version = version + 1, beaten_lease = :now, deadline = :now "
            "WHERE deadline IS NOT NULL AND (:lost IS NULL OR beaten_lease <> :now)",
            {"now": now, "lost": lost_seconds},
        )
        connection.execute("UPDATE workers SET heard_lease = :now WHERE heard_lease > :now", {"now": now})


# --- One owner for each database file ---


class OwnerLock:
    """The right to write a database file.

    Args:
        path: the database file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_path = path.with_name(path.name + "-owner")
        self._release: weakref.finalize[[int], OwnerLock] | None = None

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            StoreOwned: somebody else is; the message has the process id.
            StoreUnavailable: the folder cannot be written, or there is no space.
        """
        with translated(str(self._path)), ExitStack() as undo:
            file = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
                raise StoreOwned(self._refusal(owner)) from error
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            undo.pop_all()
        self._release = weakref.finalize(self, os.close, file)  # also for a store that is thrown away
        self._release.atexit = False

    def release(self) -> None:
        """Stop being the owner; idempotent."""
        if self._release is not None:
            self._release()

    def _refusal(self, owner: str) -> str:
        if owner == str(os.getpid()):
            return f"this process (pid {owner}) has {str(self._path)!r} open already; use that store, or close it first"
        return (
            f"process {owner} owns {str(self._path)!r}; use its server (LightningStoreClient), or stop that process. "
            "Only one process may open the file"
        )
