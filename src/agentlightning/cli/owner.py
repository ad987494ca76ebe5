"""Who has a database file open, and where that process can be reached."""

from __future__ import annotations

import os
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple

import psutil

_PROBE_SECONDS = 1.0


class Owner(NamedTuple):
    """A process that owns a database file."""

    pid: int
    command: str
    """How it was called, cut short."""
    server_urls: tuple[str, ...]
    """Where it serves stores; if it serves several, which is which is not known."""


def find_owner(path: Path) -> Owner | None:
    """The process whose id the owner's lock file has, if it lives.

    The lock itself is not touched: to try it would refuse a store that is opened at that moment.
    """
    real = Path(os.path.realpath(path))
    try:
        pid = int(real.with_name(real.name + "-owner").read_text(encoding="ascii"))
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
    except (OSError, ValueError, psutil.Error):
        return None
    if not _has_open(process, real.with_name(real.name + "-owner")):
        return None
    return Owner(pid, command if len(command) <= 60 else command[:59] + "…", _servers_of(process))


def _has_open(process: psutil.Process, lock: Path) -> bool:
    """Whether it holds the lock file: the id of a dead owner may have gone to somebody else."""
    try:
        return any(each.path == str(lock) for each in process.open_files())
    except psutil.AccessDenied:  # another user's process: what the file says is all that is known
        return True
    except psutil.Error:
        return False


def _servers_of(process: psutil.Process) -> tuple[str, ...]:
    try:
        listening = [each.laddr for each in process.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return ()
    places = sorted({("127.0.0.1" if each.ip in ("0.0.0.0", "::") else each.ip, each.port) for each in listening})
    return tuple(
        f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        for host, port in places
        if _serves_a_store(host, port)
    )


def _serves_a_store(host: str, port: int) -> bool:
    connection = HTTPConnection(host, port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/agl/v1/health/live")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
