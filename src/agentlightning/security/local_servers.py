"""The servers of this user's runs on this machine: how the user's other programs find them, and their keys.

A run on one machine makes its key by itself. Its own processes get the key from it; other programs of the same user
find it here, in a file that nobody else can read. A file counts only while its server holds the lock on it, so what a
killed server has left behind is never used: somebody else may have its port by now.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from agentlightning.security.hosts import is_loopback
from agentlightning.settings import state_home

_log = logging.getLogger(__name__)


class LocalServer(NamedTuple):
    """A server of a run on this machine."""

    url: str
    """Its root, by which programs on this machine reach it."""
    api_key: str | None
    """The key that it made. None: it was given one, which is not written down, or asks for none."""
    database: str | None = None
    """The real path of the file that it serves; None: it serves no file."""
    certificate: str | None = None
    """The file with its certificate, if it has one."""


def announce(server: LocalServer) -> Callable[[], None]:
    """Write down a server of this process; returns a function that takes it back, as the end of this process does.

    If nothing can be written, a warning says so: the run itself does not depend on it.
    """
    try:
        return _write(server)
    except (OSError, RuntimeError) as error:  # the second: this user has no home
        _log.warning(
            "other programs of this user cannot find %s: %s; give it a key of yours (AGL_API_KEY)", server.url, error
        )
        return lambda: None


def _write(server: LocalServer) -> Callable[[], None]:
    folder = state_home() / "servers"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    deque(_read_all(), maxlen=0)  # removes what killed servers have left behind
    file = folder / f"{urlsplit(server.url).port}-{secrets.token_hex(4)}.json"
    part = file.with_suffix(".part")
    held = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # before it has its name: nobody shall take it for one that was left behind
        os.write(held, json.dumps(server._asdict()).encode())
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)
        os.close(held)
        raise

    def withdraw() -> None:
        file.unlink(missing_ok=True)
        os.close(held)

    return withdraw


def find_local(url: str) -> LocalServer | None:
    """The announced server that a URL leads to; None if it leads elsewhere, or nobody has announced one there."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if not is_loopback(host):
        return None
    for each in _read_all(parts.port):
        theirs = urlsplit(each.url).hostname
        if "localhost" in (host, theirs) or host == theirs:
            return each
    return None


def find_serving(database: Path) -> LocalServer | None:
    """The announced server that serves a database file; None if there is none."""
    real = os.path.realpath(database)
    return next((each for each in _read_all() if each.database == real), None)


def _read_all(port: int | None = None) -> Iterator[LocalServer]:
    """All that are announced, or those on a port. What killed servers have left behind is removed."""
    with contextlib.suppress(OSError, RuntimeError):
        for file in sorted((state_home() / "servers").glob("*.json" if port is None else f"{port}-*.json")):
            found = _read(file)
            if found is not None:
                yield found


def _read(file: Path) -> LocalServer | None:
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # it has just gone, or is another user's
        return None
    with os.fdopen(opened, "rb") as content:
        told = os.fstat(opened)
        if told.st_uid != os.geteuid() or told.st_mode & 0o077:
            return None
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # its server lives
            with contextlib.suppress(ValueError, TypeError):
                return LocalServer(**json.loads(content.read()))
            return None
        file.unlink(missing_ok=True)
        return None
