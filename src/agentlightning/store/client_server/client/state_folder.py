"""Where a client keeps what belongs to a server on this machine: spans that wait, resources that were read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path

from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.store.client_server.wire.address import ServerAddress
from agentlightning.types import UNSET, Unset

__all__ = ["default_folder", "forget_old_servers", "state_folder"]

_FORGET_AFTER_SECONDS = 7 * 24 * 3600.0


def state_folder(chosen: str | Path | None | Unset, address: ServerAddress) -> Path | None:
    """The folder for one server; None if nothing is to be kept.

    Args:
        chosen: the folder for all servers; ``UNSET``: ``AGL_SPOOL_DIR``, else one in the user's home (XDG Base
            Directory Specification, ``XDG_STATE_HOME``).
        address: the server.
    """
    if chosen is None:
        return None
    if chosen is UNSET:
        set_to = resolve_str_env_var(LightningEnvVar.AGL_SPOOL_DIR)
        base = Path(set_to) if set_to else default_folder()
    else:
        base = Path(chosen)
    return base / f"{address.name}-{hashlib.blake2b(address.root.encode(), digest_size=4).hexdigest()}"


def forget_old_servers(folder: Path) -> None:
    """Remove the folders of other servers that were not used for a week and in which no span waits or was refused.

    Args:
        folder: that of the server in use; those beside it are looked at.
    """
    with contextlib.suppress(OSError):  # another process may be doing the same
        for other in folder.parent.iterdir():
            if other != folder and (other / "resources").is_dir() and _is_old_and_empty(other):
                shutil.rmtree(other)


def _is_old_and_empty(folder: Path) -> bool:
    if {each.name for each in folder.iterdir()} != {"resources"}:
        return False
    newest = max((each.stat().st_mtime for each in [folder, *folder.rglob("*")]), default=0.0)
    return time.time() - newest > _FORGET_AFTER_SECONDS


def default_folder() -> Path:
    """The folder for all servers, in the user's home (XDG Base Directory Specification, ``XDG_STATE_HOME``)."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "agentlightning" / "spool"
