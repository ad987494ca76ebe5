"""Errors of the database as errors of the store."""

from __future__ import annotations

import apsw

from agentlightning.errors import (
    AgentLightningError,
    CorruptStore,
    DiskFull,
    ForeignFile,
    StoreStopped,
    StoreUnavailable,
)

__all__ = ["stops_store", "translate"]


def translate(error: apsw.Error, path: str) -> AgentLightningError:
    """What ``error`` means to a caller. Raise it ``from`` the original."""
    match error:
        case apsw.FullError():
            return DiskFull(
                f"the disk that holds {path!r} is full; nothing more is acknowledged. "
                "What was acknowledged is safe. Free space, then open the store again"
            )
        case apsw.CorruptError():
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


def stops_store(error: AgentLightningError) -> bool:
    """Whether the store can acknowledge nothing after this."""
    return isinstance(error, StoreStopped)
