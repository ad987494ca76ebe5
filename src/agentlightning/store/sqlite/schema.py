"""The tables, and how a file of an older version becomes one of this version.

Rules for migrations: only ever append; each runs in one transaction together with the new
version number, so a crash leaves the old version or the new one, never a mixture; there is
no way back.

Nothing here knows what a status means: ``claimable`` and ``live`` are computed by
``lifecycle`` and stored for the partial indexes.
"""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from agentlightning.errors import ForeignFile, NewerSchema

__all__ = ["APPLICATION_ID", "MIGRATIONS", "check_identity", "migrate"]

APPLICATION_ID = 0x41474C31
"""Marks a file as ours (the letters AGL1)."""

_VERSION_1 = """
CREATE TABLE rollouts (
    seq INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    rollout_id TEXT NOT NULL,
    status TEXT NOT NULL,
    priority INTEGER NOT NULL,
    input BLOB NOT NULL,
    mode TEXT,
    resources_id TEXT,
    resources_version INTEGER,
    policy BLOB NOT NULL,
    metadata BLOB,
    start_time REAL NOT NULL,
    end_time REAL,
    reason_code TEXT,
    reason_message TEXT,
    attempts INTEGER NOT NULL,
    redeliveries INTEGER NOT NULL,
    latest_attempt_id TEXT,
    digest BLOB NOT NULL,
    claimable INTEGER NOT NULL
);
CREATE UNIQUE INDEX rollouts_by_id ON rollouts (rollout_id);
CREATE INDEX rollouts_claimable ON rollouts (priority DESC, seq) WHERE claimable;
CREATE INDEX rollouts_ended ON rollouts (end_time) WHERE end_time IS NOT NULL;

CREATE TABLE attempts (
    seq INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    rollout_id TEXT NOT NULL,
    attempt_id TEXT NOT NULL,
    sequence_id INTEGER NOT NULL,
    status TEXT NOT NULL,
    start_time REAL NOT NULL,
    end_time REAL,
    worker_id TEXT,
    last_heartbeat_time REAL,
    metadata BLOB,
    reason_code TEXT,
    reason_message TEXT,
    request_id TEXT,
    confirm_seconds REAL,
    started_lease REAL NOT NULL,
    beaten_lease REAL NOT NULL,
    deadline REAL,
    span_sequence INTEGER NOT NULL,
    digest BLOB NOT NULL,
    live INTEGER NOT NULL
);
CREATE UNIQUE INDEX attempts_by_id ON attempts (attempt_id);
CREATE UNIQUE INDEX attempts_of_rollout ON attempts (rollout_id, sequence_id);
CREATE UNIQUE INDEX attempts_one_live ON attempts (rollout_id) WHERE live;
CREATE INDEX attempts_of_worker ON attempts (worker_id) WHERE live;
CREATE INDEX attempts_of_request ON attempts (request_id) WHERE request_id IS NOT NULL;
CREATE INDEX attempts_due ON attempts (deadline) WHERE deadline IS NOT NULL;

CREATE TABLE spans (
    seq INTEGER PRIMARY KEY,
    attempt_seq INTEGER NOT NULL,
    sequence_id INTEGER NOT NULL,
    issued INTEGER NOT NULL,
    span_id TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX spans_by_id ON spans (attempt_seq, span_id);
CREATE INDEX spans_in_order ON spans (attempt_seq, sequence_id);

CREATE TABLE resources (
    seq INTEGER PRIMARY KEY,
    resources_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    create_time REAL NOT NULL,
    update_time REAL NOT NULL,
    resources BLOB NOT NULL,
    request_id TEXT,
    digest BLOB NOT NULL
);
CREATE UNIQUE INDEX resources_by_version ON resources (resources_id, version);
CREATE UNIQUE INDEX resources_of_request ON resources (request_id) WHERE request_id IS NOT NULL;

CREATE TABLE workers (
    seq INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    worker_id TEXT NOT NULL,
    status TEXT NOT NULL,
    heartbeat_stats BLOB,
    last_heartbeat_time REAL,
    last_dequeue_time REAL,
    last_busy_time REAL,
    last_idle_time REAL,
    current_rollout_id TEXT,
    current_attempt_id TEXT,
    lease_seconds REAL,
    beaten_lease REAL NOT NULL,
    deadline REAL
);
CREATE UNIQUE INDEX workers_by_id ON workers (worker_id);
CREATE INDEX workers_due ON workers (deadline) WHERE deadline IS NOT NULL;

CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;
"""

_VERSION_2 = """
ALTER TABLE workers ADD COLUMN registration BLOB;
ALTER TABLE workers ADD COLUMN directive TEXT;
"""

MIGRATIONS: Sequence[str] = (_VERSION_1, _VERSION_2)
"""Script number n brings a file from version n to version n + 1."""


def check_identity(connection: apsw.Connection, newest: int) -> int:
    """The schema version of the file; 0 for one that is empty.

    Raises:
        ForeignFile: the file belongs to another program.
        NewerSchema: its version is above ``newest``.
    """
    application: int = connection.pragma("application_id")
    version: int = connection.pragma("user_version")
    if application != APPLICATION_ID and not _is_blank(connection, application, version):
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


def _is_blank(connection: apsw.Connection, application: int, version: int) -> bool:
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()[0][0]
    return (application, version, tables) == (0, 0, 0)
