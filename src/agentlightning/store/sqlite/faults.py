"""Errors of the database as errors of the store."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec
import pydantic

from agentlightning.errors import (
    AgentLightningError,
    CorruptStore,
    DiskFull,
    ForeignFile,
    StoreStopped,
    StoreUnavailable,
)

FAULTS = (apsw.Error, UnicodeDecodeError, msgspec.DecodeError, pydantic.ValidationError)
"""What comes up inside a transaction when the database fails, or when a stored value is not what was written."""


def translate(error: Exception, path: str) -> AgentLightningError:
    """What one of ``FAULTS``, or an ``OSError``, means to a caller. Raise it ``from`` the original."""
    match error:
        case UnicodeDecodeError() | msgspec.DecodeError() | pydantic.ValidationError():
            return CorruptStore(
                f"{path!r} is damaged: a stored value cannot be read ({error}); nothing more is acknowledged. "
                "`verify` names the record. Restore a backup"
            )
        case apsw.FullError() | OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DiskFull(
                f"the disk that holds {path!r} is full; nothing more is acknowledged. "
                "What was acknowledged is safe. Free space, then open the store again"
            )
        case OSError():
            return StoreUnavailable(
                f"cannot open {path!r} ({error.strerror}); check that it is a file in a folder that exists and is "
                "writable"
            )
        case apsw.CorruptError() | apsw.TooBigError():  # what is written is far below the limits of SQLite
            return CorruptStore(
                f"{path!r} is damaged ({error}); nothing more is acknowledged. Restore a backup, "
                "or copy what can be read with `sqlite3 .recover`"
            )
        case apsw.NotADBError():
            return ForeignFile(f"{path!r} is not a SQLite database; give another path")
        case apsw.BusyError() | apsw.LockedError():
            return StoreUnavailable(
                f"another program holds a lock on {path!r} ({error}); close it. Only one process may write"
            )
        case apsw.CantOpenError() | apsw.PermissionsError() | apsw.AuthError():
            return StoreUnavailable(f"cannot open {path!r} ({error}); check that the folder exists and is writable")
        case apsw.ReadOnlyError():
            return StoreStopped(f"{path!r} cannot be written ({error}); check its permissions, then open it again")
        case apsw.IOError():
            return StoreStopped(
                f"reading or writing {path!r} failed ({error}); nothing more is acknowledged. "
                "What was acknowledged is safe. Check the disk, then open the store again"
            )
        case _:
            return AgentLightningError(f"SQLite refused a statement ({type(error).__name__}: {error}); this is a bug")


@contextmanager
def translated(path: str) -> Generator[None]:
    """Raise errors of the database, and of its files, as errors of the store."""
    try:
        yield
    except (*FAULTS, OSError) as error:
        raise translate(error, path) from error


def disk_room(path: Path) -> tuple[int, int] | None:
    """Free and total bytes of the disk that holds the file, for an ordinary user; None if the system does not say."""
    try:
        room = os.statvfs(path.parent)
    except OSError:
        return None
    return room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize


def stops_store(error: AgentLightningError) -> bool:
    """Whether the store can acknowledge nothing after this."""
    return isinstance(error, StoreStopped)
