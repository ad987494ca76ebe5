"""uvicorn with a start that is told, an end that is waited for instead of polled for, and a drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, cast

import uvicorn
from typing_extensions import override

_KEEPALIVE_SECONDS = 75.0
_FLUSH_SECONDS = 2.0
_log = logging.getLogger(__name__)


def server_config(
    app: Any, connection: Callable[..., asyncio.Protocol], *, keepalive_seconds: float = _KEEPALIVE_SECONDS, **more: Any
) -> uvicorn.Config:
    """How uvicorn serves here: HTTP/1.1 alone, without logs of its own, without trust in proxies.

    Args:
        app: an ASGI application.
        connection: makes the protocol of a connection from uvicorn's arguments.
        keepalive_seconds: how long a connection may stay open between requests.
        more: of ``uvicorn.Config``.
    """
    return uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]  # a factory, which is all that uvicorn calls it as
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(keepalive_seconds),
        **more,
    )


class LoopServer(uvicorn.Server):
    """Answers on a socket, in the event loop of ``serve``.

    Args:
        config: of uvicorn.
        drain_seconds: how long requests may go on when the end begins; those that are not done then are cancelled.
        on_drain: called when the end begins.
        handshake_seconds: how long a client may take to begin with TLS.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain_seconds: float,
        on_drain: Callable[[], None] | None = None,
        *,
        handshake_seconds: float = 10.0,
    ) -> None:
        super().__init__(config)
        self.answering: Future[None] = Future()
        """Done when requests are answered."""
        self._drain_seconds = drain_seconds
        self._on_drain = on_drain
        self._handshake_seconds = handshake_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None

    def end(self) -> None:
        """Let ``serve`` finish and return. From any thread, once ``answering`` is done."""
        assert self._loop is not None
        assert self._ending is not None
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._ending.set)

    @override
    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        if not self.config.loaded:
            self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(sockets=sockets)
        await self.on_tick(0)
        self.answering.set_result(None)
        tick = 0
        while not self._ending.is_set():
            tick += 10  # uvicorn counts ten a second, and makes the Date header anew at each tenth
            await self.on_tick(tick)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 1.0)
        await self._finish()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but that a handshake may not take a minute, for which nothing counts the connection."""
        loop, config = asyncio.get_running_loop(), self.config
        state = {"config": config, "server_state": self.server_state, "app_state": self.lifespan.state}
        tls: dict[str, Any] = {}
        if config.ssl is not None:
            tls = {"ssl": config.ssl, "ssl_handshake_timeout": self._handshake_seconds}
        connect = partial(cast("Callable[..., asyncio.Protocol]", config.http_protocol_class), **state)
        self.servers = [
            await loop.create_server(connect, sock=each, backlog=config.backlog, **tls) for each in sockets or ()
        ]
        self.started = True

    async def _finish(self) -> None:
        if self._on_drain is not None:
            self._on_drain()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        tasks = set(self.server_state.tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._drain_seconds)
            if late:
                _log.warning("%d requests were not done after %g s, and are ended", len(late), self._drain_seconds)
                self._hang_up()
                _, late = await asyncio.wait(late, timeout=1.0)
                for task in late:
                    task.cancel()
                if late:
                    await asyncio.wait(late, timeout=1.0)
        for connection in list(self.server_state.connections):
            connection.transport.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + _FLUSH_SECONDS
        # Replies may still be on their way; connections tell nobody but this set of their end.
        while self.server_state.connections and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def _hang_up(self) -> None:
        """Those who wait for the rest of a body, or for somebody to read a reply, learn that it will not come."""
        for connection in list(self.server_state.connections):
            cycle = cast("Any", connection).cycle
            if cycle is not None and not cycle.response_complete:
                connection.transport.abort()


# --- A port to listen on, and who has it if somebody else does ---

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


# --- How many files a process may have open ---


def allow_many_files() -> None:
    """Let this process have as many connections as the system allows; what is usual, 1,024, is soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # then as many as it has now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
