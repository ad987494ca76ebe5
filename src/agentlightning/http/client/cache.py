"""Resources on this machine's disk, for the time when the server is out of reach.

What was read last is kept with the moment at which it was read. A version never changes (G11), so a
copy of a version is as good as the original; a copy of "the newest" is as old as it says.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from agentlightning.http.routes import ServerAddress
from agentlightning.settings import LightningEnvVar, resolve_str_env_var, state_home
from agentlightning.types import UNSET, ResourcesUpdate, Unset

_FORGET_AFTER_SECONDS = 7 * 24 * 3600.0


def state_folder(chosen: str | Path | None | Unset, address: ServerAddress) -> Path | None:
    """The folder for one server; None if nothing is to be kept.

    Args:
        chosen: the folder for all servers; ``UNSET``: ``AGL_SPOOL_DIR``, else ``default_folder``.
        address: the server.
    """
    if chosen is None:
        return None
    base = resolve_str_env_var(LightningEnvVar.AGL_SPOOL_DIR) or default_folder() if chosen is UNSET else chosen
    return Path(base) / f"{address.name}-{hashlib.blake2b(address.root.encode(), digest_size=4).hexdigest()}"


def default_folder() -> Path:
    """The folder for all servers, in the user's home."""
    return state_home() / "spool"


def _forget_old_servers(folder: Path) -> None:
    """Remove the folders beside this one that were not used for a week and in which no span waits or was refused."""
    with contextlib.suppress(OSError):  # another process may be doing the same
        for other in folder.parent.iterdir():
            if other == folder or not other.is_dir() or {each.name for each in other.iterdir()} != {"resources"}:
                continue
            newest = max(each.stat().st_mtime for each in [other, *other.rglob("*")])
            if time.time() - newest > _FORGET_AFTER_SECONDS:
                shutil.rmtree(other)


_logger = logging.getLogger(__name__)

_MAX_FILES = 256
_REFRESH_SECONDS = 1.0
"""Copies of the same version are not written again, only dated, and not more often than this."""


class CachedResources(ResourcesUpdate):
    """Resources as this machine knew them last."""

    age_seconds: float
    """How long ago the server said so."""


class ResourceCache:
    """One file for each thing that is asked for: the latest, the newest of an id, a version of an id.

    Files that cannot be written or read are logged and passed over: this is a help, not a promise.

    Args:
        folder: where the files are; made when the first is written. They can hold keys of model endpoints, and
            are readable by their owner only.
        wall: Unix seconds.
    """

    def __init__(self, folder: Path, wall: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._wall = wall
        self._lock = threading.Lock()
        self._kept: dict[Path, tuple[str, int, float]] = {}

    def keep(self, update: ResourcesUpdate, resources_id: str | None, version: int | None) -> None:
        """Remember what the server said when it was asked for this.

        Args:
            update: the answer.
            resources_id: the id that was asked for; None: the latest of all.
            version: the version that was asked for; None: the newest.
        """
        path = self._path(resources_id, version)
        now = self._wall()
        mark = (update.resources_id, update.version)
        with self._lock:
            known = self._kept.get(path)
            same = known is not None and known[:2] == mark
            if same and known is not None and 0 <= now - known[2] < _REFRESH_SECONDS:
                return
            try:
                if same and path.exists():
                    os.utime(path, (now, now))
                else:
                    self._write(path, update.model_dump_json(), now)
            except OSError as error:
                _logger.warning("resources could not be kept in %s: %s", path, error)
                return
            self._kept[path] = (*mark, now)

    def forget(self, resources_id: str | None, version: int | None) -> None:
        """The server said that there is nothing. Arguments as for ``keep``."""
        path = self._path(resources_id, version)
        with self._lock:
            self._kept.pop(path, None)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _logger.warning("the old copy of resources in %s could not be removed: %s", path, error)

    def has(self, resources_id: str | None, version: int | None) -> bool:
        """Whether something was kept for this. Arguments as for ``keep``."""
        path = self._path(resources_id, version)
        return path in self._kept or path.exists()

    def read(self, resources_id: str | None, version: int | None) -> CachedResources | None:
        """What was kept for this; None if nothing was, or it cannot be read. Arguments as for ``keep``."""
        path = self._path(resources_id, version)
        try:
            kept_at = path.stat().st_mtime
            update = ResourcesUpdate.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            _logger.warning("the copy of resources in %s cannot be used: %s", path, error)
            return None
        age = max(self._wall() - kept_at, 0.0)
        return CachedResources.model_construct(**update.__dict__, age_seconds=age)

    def _path(self, resources_id: str | None, version: int | None) -> Path:
        if resources_id is None:
            return self._folder / "latest.json"
        asked = f"{resources_id}\n{version if version is not None else ''}".encode()
        return self._folder / f"{hashlib.blake2b(asked, digest_size=16).hexdigest()}.json"

    def _write(self, path: Path, text: str, now: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.utime(name, (now, now))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        files = sorted(self._folder.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for each in files[: max(len(files) - _MAX_FILES, 0)]:
            each.unlink(missing_ok=True)
            self._kept.pop(each, None)
        if not self._kept:
            _forget_old_servers(self._folder.parent)
