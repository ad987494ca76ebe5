"""The stores that users make: the engine put together with a SQLite backend."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from agentlightning.errors import InvalidValue
from agentlightning.store.backend import Backend
from agentlightning.store.engine import EngineStore
from agentlightning.store.sources import Clock, IdSource, SystemClock, TimeOrderedIds
from agentlightning.store.sqlite.backend import FileBackend, SqliteBackend, ViewBackend
from agentlightning.store.sqlite.backup import broken_backup, copy_from_backup, new_file
from agentlightning.store.sqlite.connections import DURABILITIES, Durability


class _SqliteStore(EngineStore):
    """What these stores offer beyond the contract."""

    def __init__(self, backend: Backend, ids: IdSource | None, clock: Clock) -> None:
        super().__init__(backend, ids or TimeOrderedIds(clock.wall))
        self._backend = backend

    async def backup(self, target: str | os.PathLike[str]) -> None:
        """Copy everything stored into the new file ``target``, checked and synced, while the store is used.

        Raises:
            InvalidValue: ``target`` exists, or its folder does not.
            DiskFull, CorruptStore: there is no whole copy, and no file of that name.
        """
        self._core.open()
        if not self._backend.stopped:  # signs of life that are in memory only shall be in the copy
            await self._backend.write(lambda tx: tx.save_touched())
        await self._backend.backup(Path(target))


class SqliteLightningStore(_SqliteStore):
    """A durable store in a SQLite file. Exactly one process may have it open.

    It opens with the first call, or with ``async with``; close it with ``await store.close()``.

    Args:
        path: the database file; made, readable by its owner only, if it does not exist.
        durability: what an acknowledged write survives. ``full``: power loss. ``process``: kill -9 of
            this process, not power loss. ``none``: the same, but a power loss may damage the file.
        clock, ids: where time and new ids come from.
        vfs: the apsw VFS to read and write through; None for the system's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "agentlightning.db",
        durability: Durability = "full",
        *,
        clock: Clock | None = None,
        ids: IdSource | None = None,
        vfs: str | None = None,
    ) -> None:
        if durability not in DURABILITIES:
            raise InvalidValue(f"durability {durability!r} is not one of {', '.join(DURABILITIES)}")
        clock = clock or SystemClock()
        self._path = Path(path)
        super().__init__(FileBackend(self._path, durability, clock, vfs), ids, clock)

    @property
    def path(self) -> Path:
        """The database file."""
        return self._path

    @classmethod
    async def restore(cls, backup: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        """Make the new database file ``path`` from a backup, after checking it rule by rule.

        The file appears under its name only when it is whole and every rule of ``verify`` holds.

        Raises:
            InvalidValue: ``path`` exists, its folder does not, or there is no such backup.
            ForeignFile, NewerSchema, CorruptStore: the backup is not one that can be used.
        """
        with new_file(Path(path)) as partial:
            copy_from_backup(Path(backup), partial)
            store = cls(partial)
            try:
                report = await store.verify()
            finally:
                await store.close()
            if not report.ok:
                raise broken_backup(Path(backup), report)


class ReadOnlySqliteStore(_SqliteStore):
    """A database file that is read beside its owner, who may be any process of this machine, or none.

    It shows what was last committed, and can be backed up. Calls that write, or wait for something, raise
    ``StoreUnavailable``. Nothing expires here: an attempt is shown as running until its owner has ended it.

    Args:
        path: the database file, which must exist.
        clock: where time comes from.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Clock | None = None) -> None:
        clock = clock or SystemClock()
        super().__init__(ViewBackend(Path(path), clock), None, clock)


_REPLACED = {
    "eviction_memory_threshold": "nothing is evicted; delete_finished_rollouts frees space",
    "safe_memory_threshold": "nothing is evicted; delete_finished_rollouts frees space",
    "span_size_estimator": "nothing is evicted; statistics() has the bytes of all spans",
    "tracker": "metrics come from the server",
    "scan_debounce_seconds": "expired attempts are found by their deadlines, without scans",
}


class InMemoryLightningStore(_SqliteStore):
    """A store that lives and dies with this process.

    Args:
        thread_safe: of 0.3; this store is always safe to use from any thread.
        clock, ids: where time and new ids come from.
        replaced: other arguments of 0.3: accepted, with a warning that says what came in their place.
    """

    def __init__(
        self, *, thread_safe: bool = True, clock: Clock | None = None, ids: IdSource | None = None, **replaced: Any
    ) -> None:
        unknown = replaced.keys() - _REPLACED.keys()
        if unknown:
            raise TypeError(f"InMemoryLightningStore takes no argument {', '.join(sorted(unknown))}")
        for name, value in replaced.items():
            if value is not None:
                warnings.warn(f"{name} has no effect any more: {_REPLACED[name]}", DeprecationWarning, stacklevel=2)
        clock = clock or SystemClock()
        super().__init__(SqliteBackend(clock), ids, clock)


def LightningStoreThreaded(store: EngineStore) -> EngineStore:
    """Of 0.3: every store is safe to use from any thread now, so this returns the store itself."""
    return store
