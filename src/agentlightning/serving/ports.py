"""A port to listen on, and who has it if somebody else does."""

from __future__ import annotations

import errno
import socket

__all__ = ["bind", "listen"]

_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that has this port (0: any free one), and does not listen yet.

    Raises:
        OSError: the port cannot be had; the message is a sentence that says why, and who has it if that is known.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise OSError(f"{host!r} is no name or address of this machine: {error}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def listen(bound: socket.socket, host: str) -> None:
    """Listen on a port that was had before. Raises as ``bind``; the socket is closed then."""
    port: int = bound.getsockname()[1]
    try:
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: Exception) -> OSError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return OSError(f"port {port} on {host} is taken{_taken_by(port)}; stop that, or give another port (0 for any)")
    return OSError(f"cannot listen on {host} port {port}: {error}")


def _taken_by(port: int) -> str:
    """Who listens on a port, for an error message; empty if the system does not tell."""
    import psutil

    try:
        for connection in psutil.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    return " by a process of another user"
                process = psutil.Process(connection.pid)
                return f" by process {process.pid} ({' '.join(process.cmdline()[:4])[:120] or process.name()})"
    except (psutil.Error, OSError):
        return ""
    return ""
