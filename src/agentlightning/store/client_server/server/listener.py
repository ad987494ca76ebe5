"""A port that is listened on, and the event loop in a thread of its own that answers there."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.store.client_server.server.app import StoreApp
from agentlightning.store.client_server.server.connections import BoundedProtocol, Doorkeeper
from agentlightning.store.client_server.server.limits import ServerLimits

__all__ = ["Listener", "TlsFiles"]

_log = logging.getLogger(__name__)
_BACKLOG = 2048
_FLUSH_SECONDS = 2.0
_JOIN_SECONDS = 30.0


class TlsFiles(NamedTuple):
    """Where certificate chain and private key are, in PEM."""

    certificate: Path
    key: Path


class Listener:
    """Listens on a port and answers with an ASGI application, from ``start`` to ``stop``.

    Args:
        app: answers; told to drain when stopping begins.
        host: name or address to listen on.
        port: 0 for any that is free.
        limits: bounds on connections.
        tls: files for HTTPS; None for plain HTTP.
    """

    def __init__(
        self,
        app: StoreApp,
        host: str,
        port: int,
        limits: ServerLimits,
        tls: TlsFiles | None,
    ) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._limits = limits
        self._tls = tls
        self._thread: threading.Thread | None = None
        self._server: _Server | None = None
        self._bound: tuple[socket.socket, uvicorn.Config] | None = None
        self.doorkeeper = Doorkeeper(limits)

    def bind(self) -> int:
        """Have the port, without listening on it yet; returns it. Idempotent until ``stop``.

        Raises:
            StoreUnavailable: the port cannot be had; the message says why, and who has it if that is known.
            InvalidValue: the files for TLS cannot be used.
        """
        if self._bound is None:
            config = self._config()
            try:
                if self._tls is not None:
                    config.load()
            except (OSError, ssl.SSLError) as error:
                raise InvalidValue(f"the certificate or key for TLS cannot be used: {error}") from error
            self._bound = _bound(self._host, self._port), config
        return self._bound[0].getsockname()[1]

    def start(self) -> int:
        """Listen; returns the port, when requests are answered. Blocks. Raises as ``bind``."""
        port = self.bind()
        assert self._bound is not None
        (listening, config), self._bound = self._bound, None
        _listen(listening, self._host, port)
        server = self._server = _Server(config, self._limits.drain_seconds, self._app.drain)
        self._thread = threading.Thread(target=server.run_in, args=(listening,), name="agl-http", daemon=True)
        self._thread.start()
        server.answering.result()
        return port

    def stop(self) -> None:
        """Take no new requests, finish those that are being worked on, let go of the port; idempotent. Blocks."""
        bound, self._bound = self._bound, None
        if bound is not None:
            bound[0].close()
        thread, self._thread = self._thread, None
        if thread is not None and self._server is not None:
            self._server.end()
            thread.join(self._limits.drain_seconds + _JOIN_SECONDS)

    def _config(self) -> uvicorn.Config:
        def protocol(**arguments: Any) -> BoundedProtocol:
            return BoundedProtocol(self.doorkeeper, self._app, **arguments)

        return uvicorn.Config(
            self._app,
            http=protocol,  # type: ignore[arg-type]  # a factory, which is all that uvicorn calls it as
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(self._limits.idle_seconds),
            backlog=_BACKLOG,
            ssl_certfile=None if self._tls is None else str(self._tls.certificate),
            ssl_keyfile=None if self._tls is None else str(self._tls.key),
        )


class _Server(uvicorn.Server):
    """uvicorn's server with an end that is waited for, not polled for."""

    def __init__(self, config: uvicorn.Config, drain_seconds: float, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self.answering: Future[None] = Future()
        self._drain_seconds = drain_seconds
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None

    def run_in(self, listening: socket.socket) -> None:
        """Answer on this socket until ``end``, in an event loop of this thread's own."""
        import uvloop

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._answer_on(listening))
        except BaseException as error:
            if not self.answering.done():
                self.answering.set_exception(error)
                return
            _log.exception("the server's loop failed")
            raise

    def end(self) -> None:
        """Let ``run_in`` return soon. From any thread."""
        assert self._loop is not None
        assert self._ending is not None
        try:
            self._loop.call_soon_threadsafe(self._ending.set)
        except RuntimeError:  # the loop has ended by itself
            return

    async def _answer_on(self, listening: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self.config.load() if not self.config.loaded else None
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(sockets=[listening])
        await self.on_tick(0)
        self.answering.set_result(None)
        number = 0
        while not self._ending.is_set():
            number += 10
            await self.on_tick(number)
            try:
                await asyncio.wait_for(self._ending.wait(), 1.0)
            except TimeoutError:
                continue
        await self._finish()

    async def _finish(self) -> None:
        self._drain()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        tasks = set(self.server_state.tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._drain_seconds)
            if late:
                _log.warning("%d requests were not done after %g s, and are ended", len(late), self._drain_seconds)
                for task in late:
                    task.cancel()
                await asyncio.wait(late, timeout=1.0)
        for connection in list(self.server_state.connections):
            connection.transport.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + _FLUSH_SECONDS
        # Replies may still be on their way; connections tell nobody but this set of their end.
        while self.server_state.connections and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StoreUnavailable(f"{host!r} is no name or address of this machine: {error}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _listen(bound: socket.socket, host: str, port: int) -> None:
    try:
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> StoreUnavailable:
    if error.errno == errno.EADDRINUSE:
        return StoreUnavailable(
            f"port {port} on {host} is taken{_taken_by(port)}; stop that, or give another port (0 for any)"
        )
    return StoreUnavailable(f"cannot listen on {host} port {port}: {error}")


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
