"""Copies of a whole database: taken while it is used, and put back."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import apsw

from agentlightning.errors import CorruptStore, InvalidValue
from agentlightning.store.sqlite.connections import MIGRATIONS, check_identity
from agentlightning.store.sqlite.faults import translate, translate_os
from agentlightning.types import VerificationReport


def copy_database(source: apsw.Connection, target: Path) -> None:
    """Copy what ``source`` sees into the new file ``target``, checked, private and synced.

    The file appears under its name only when it is whole.

    Raises:
        InvalidValue: ``target`` exists, or its folder does not.
        CorruptStore: the copy is damaged, hence probably the source.
        DiskFull: there is no room for it.
    """
    check_free(target)
    partial = unfinished(target)
    try:
        os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        copy = apsw.Connection(str(partial))
        try:
            with copy.backup("main", source, "main") as backup:
                backup.step(-1)
            copy.pragma("journal_mode", "DELETE")
            check_database(copy)
        finally:
            copy.close()
        move_into_place(partial, target)
    except apsw.Error as error:
        raise translate(error, str(partial)) from error
    except OSError as error:
        raise translate_os(error, str(partial)) from error
    finally:
        partial.unlink(missing_ok=True)


def copy_from_backup(backup: Path, target: Path) -> None:
    """Copy a backup into the new file ``target``, where it can be opened and checked further.

    Raises:
        InvalidValue: there is no such backup.
        ForeignFile, NewerSchema, CorruptStore: it is not one that can be used.
    """
    if not backup.is_file():
        raise InvalidValue(f"there is no backup {str(backup)!r}; give the file that `backup` wrote")
    try:
        source = apsw.Connection(str(backup), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            check_database(source)
            copy_database(source, target)
        finally:
            source.close()
    except apsw.Error as error:
        raise translate(error, str(backup)) from error


def broken_backup(backup: Path, report: VerificationReport) -> CorruptStore:
    """The error for a backup whose rows break the rules."""
    first = report.violations[0]
    return CorruptStore(
        f"backup {str(backup)!r} breaks {len(report.violations)} rules, the first: {first.record}: "
        f"{first.detail} ({first.rule}); use an older one"
    )


def check_free(target: Path) -> None:
    """Raise ``InvalidValue`` unless ``target`` can be made as a new file."""
    if target.exists():
        raise _taken(target)
    if not target.parent.is_dir():
        raise InvalidValue(f"the folder {str(target.parent)!r} does not exist; make it first")


def check_database(connection: apsw.Connection) -> None:
    """Raise unless the file is a whole database of ours that this version can use."""
    check_identity(connection, len(MIGRATIONS))
    damage = [row[0] for row in connection.execute("PRAGMA integrity_check(10)") if row[0] != "ok"]
    if damage:
        raise CorruptStore(f"{connection.filename!r} is damaged: {'; '.join(damage)}")


def unfinished(target: Path) -> Path:
    """A name beside ``target``, for as long as it is being made; no two are the same."""
    return target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")


def move_into_place(partial: Path, target: Path) -> None:
    """Give a finished file its name, durably.

    Raises:
        InvalidValue: there is a file of that name.
    """
    file = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    try:
        os.link(partial, target)
    except FileExistsError as error:
        raise _taken(target) from error
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _taken(target: Path) -> InvalidValue:
    return InvalidValue(f"{str(target)!r} exists already; give a new file name, or remove it first")
