"""Copies of a whole database: taken while it is used, and put back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw

from agentlightning.errors import CorruptStore, InvalidValue
from agentlightning.store.sqlite.connections import MIGRATIONS, check_identity
from agentlightning.store.sqlite.faults import translated
from agentlightning.types import VerificationReport


def copy_database(source: apsw.Connection, target: Path) -> None:
    """Copy what ``source`` sees into the new file ``target``, checked, private and synced.

    The file appears under its name only when it is whole.

    Raises:
        InvalidValue: ``target`` exists, or its folder does not.
        CorruptStore: the copy is damaged, hence probably the source.
        DiskFull: there is no room for it.
    """
    with new_file(target) as partial:
        os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(apsw.Connection(str(partial))) as copy:
            with copy.backup("main", source, "main") as backup:
                backup.step(-1)
            copy.pragma("journal_mode", "DELETE")
            _check_database(copy)


def copy_from_backup(backup: Path, target: Path) -> None:
    """Copy a backup into the new file ``target``, where it can be opened and checked further.

    Raises:
        InvalidValue: there is no such backup.
        ForeignFile, NewerSchema, CorruptStore: it is not one that can be used.
    """
    if not backup.is_file():
        raise InvalidValue(f"there is no backup {str(backup)!r}; give the file that `backup` wrote")
    with translated(str(backup)), closing(apsw.Connection(str(backup), flags=apsw.SQLITE_OPEN_READONLY)) as source:
        _check_database(source)
        copy_database(source, target)


def broken_backup(backup: Path, report: VerificationReport) -> CorruptStore:
    """The error for a backup whose rows break the rules."""
    first = report.violations[0]
    return CorruptStore(
        f"backup {str(backup)!r} breaks {len(report.violations)} rules, the first: {first.record}: "
        f"{first.detail} ({first.rule}); use an older one"
    )


@contextmanager
def new_file(target: Path) -> Generator[Path]:
    """A name beside ``target`` for a file that the block makes; it becomes ``target``, durably, when the block ends.

    Raises:
        InvalidValue: ``target`` exists, or its folder does not.
        DiskFull, StoreUnavailable: it cannot be written.
    """
    taken = f"{str(target)!r} exists already; give a new file name, or remove it first"
    if target.exists():
        raise InvalidValue(taken)
    if not target.parent.is_dir():
        raise InvalidValue(f"the folder {str(target.parent)!r} does not exist; make it first")
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")  # no two are the same
    try:
        with translated(str(target)):
            yield partial
            _sync(partial)
            try:
                os.link(partial, target)
            except FileExistsError as error:
                raise InvalidValue(taken) from error
            _sync(target.parent)
    finally:
        for suffix in ("", "-wal", "-shm", "-owner"):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _check_database(connection: apsw.Connection) -> None:
    """Raise unless the file is a whole database of ours that this version can use."""
    check_identity(connection, len(MIGRATIONS))
    damage = [row[0] for row in connection.execute("PRAGMA integrity_check(10)") if row[0] != "ok"]
    if damage:
        raise CorruptStore(f"{connection.filename!r} is damaged: {'; '.join(damage)}")
