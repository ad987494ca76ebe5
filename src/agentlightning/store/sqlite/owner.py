"""One owner for each database file.

A lock on a file beside the database says who owns it. The lock belongs to the open file, so
a second store object in the same process is refused like another process; the kernel drops
it when the owner dies, however it dies; and a child made by fork gives its copy up at once, so
that the lock does not outlive the owner in a child.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from agentlightning.errors import StoreOwned
from agentlightning.store.sqlite.faults import translate_os

__all__ = ["OwnerLock"]


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
        try:
            file = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise translate_os(error, str(self._path)) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise StoreOwned(self._refusal(owner)) from error
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(file)
            raise translate_os(error, str(self._path)) from error
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
