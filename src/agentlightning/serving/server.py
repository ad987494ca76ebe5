"""The one way in which this package serves HTTP: an ASGI application on one port, in a thread with its own event loop.

The store's server, the LLM proxy, the demo's policy endpoint and the v0.1 server are all a ``ThreadedServer``. A thread
of its own keeps them independent of the event loop of the caller, which may be blocked, or may end while the server
goes on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from uvicorn.server import ServerState

from agentlightning.errors import InvalidValue
from agentlightning.security.tls import TlsFiles
from agentlightning.serving.connections import BoundedConnection, ConnectionBounds, ConnectionCounter
from agentlightning.serving.keepalive import probe_when_idle

if TYPE_CHECKING:
    from fastapi import FastAPI

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_GONE_SECONDS = 20
"""Clients that vanished are noticed after so long. Work may be handed to one that waits for it; that must not happen so
often that the work counts as poison."""
_FLUSH_SECONDS = 2.0
"""How long replies that were written may take to leave, at the end of a drain."""
_STOP_SECONDS = 30.0
"""How long ``stop`` waits for the thread, beyond the time for the drain."""

_T = TypeVar("_T")


class ThreadedServer:
    """Serves one ASGI application on one port, from ``start`` to ``stop``. It is started once.

    Args:
        open_app: returns an asynchronous context manager of the application. It is entered in the server's loop before
            the first request, and left when the server stops, while the port is still open, so that requests which
            arrive meanwhile get the application's own refusal. ``partial(nullcontext, app)`` where none is needed.
        host: name or address to listen on.
        port: 0 for any free one; the attribute ``port`` says which after ``bind``.
        name: of the thread.
        bounds: on connections.
        connection: makes a connection from the counter of connections and uvicorn's arguments.
        drain_seconds: how long requests may go on after ``stop``; after that they are cancelled.
        on_drain: called in the server's loop when ``stop`` begins.
        tls: for HTTPS; None: plain HTTP.
        keepalive_seconds: how long a connection may stay open between requests.
        stop_seconds: how long ``stop`` waits beyond that for the application's context to be left.
        date_header: whether replies have a ``Date`` header that does not come from the application.
    """

    def __init__(
        self,
        open_app: Callable[[], AbstractAsyncContextManager[Any]],
        host: str,
        port: int,
        *,
        name: str,
        bounds: ConnectionBounds = ConnectionBounds(),  # noqa: B008 - a value that cannot change
        connection: Callable[..., asyncio.Protocol] = BoundedConnection,
        drain_seconds: float = 5.0,
        stop_seconds: float = _STOP_SECONDS,
        on_drain: Callable[[], None] | None = None,
        tls: TlsFiles | None = None,
        keepalive_seconds: float = 75.0,
        date_header: bool = True,
    ) -> None:
        self.host = host
        self.port = port
        self._open_app = open_app
        self._counter = ConnectionCounter(bounds)
        self._connection = connection
        self._drain_seconds = drain_seconds
        self._stop_seconds = drain_seconds + stop_seconds
        self._on_drain = on_drain
        self._tls = tls
        self._keepalive_seconds = keepalive_seconds
        self._date_header = date_header
        self._changing = threading.Lock()
        self._listening: socket.socket | None = None
        self._ssl: ssl.SSLContext | None = None
        """Of the port, for as long as it is open."""
        self._newest_ssl: ssl.SSLContext | None = None
        """What handshakes go on with: the same, until ``reload_tls``."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked = asyncio.Event()
        self._ready: Future[None] = Future()
        self._failure: BaseException | None = None
        """What ended the loop after the start."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        return self._counter.total

    @property
    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._ready.done() and self._thread.is_alive()

    def bind(self) -> int:
        """Reserve the port without listening on it yet, and load the TLS files; idempotent. Returns the port.

        Raises:
            OSError: the port cannot be had; the message is a sentence that says why, and who has it if that is known.
            InvalidValue: the files for TLS cannot be used.
        """
        if self._listening is None:
            if self._tls is not None:
                self._ssl = self._newest_ssl = self._tls.server_context()
                self._ssl.sni_callback = self._take_newest  # called in each handshake, also where it names no host
            self._listening = _bind(self.host, self.port)
            self.port = self._listening.getsockname()[1]
        return self.port

    def reload_tls(self) -> bool:
        """Read the files for TLS again: new connections get what is in them, open ones go on. From any thread.

        Returns:
            Whether there is anything to read: False for plain HTTP.

        Raises:
            InvalidValue: they cannot be used; what was read before stays in use.
        """
        if self._tls is None:
            return False
        self._newest_ssl = self._tls.server_context()
        return True

    def _take_newest(self, handshake: ssl.SSLObject | ssl.SSLSocket, *_: object) -> None:
        if self._newest_ssl is not None:
            handshake.context = self._newest_ssl

    def start(self) -> None:
        """Listen; returns when requests are answered. Blocks, so coroutines call it by ``asyncio.to_thread``.

        Raises:
            OSError, InvalidValue: as ``bind``; also what the application raises when its context is entered.
        """
        with self._changing:
            self.bind()
            assert self._listening is not None
            try:
                self._listening.listen(_BACKLOG)
                self._listening.setblocking(False)
            except OSError as error:  # another socket with SO_REUSEADDR has begun to listen since `bind`
                self._listening.close()
                raise _cannot_listen(self.host, self.port, error) from error
            allow_many_files()
            self._thread.start()
            self._ready.result()

    def stop(self) -> None:
        """Take no new requests, finish those in progress and release the port. Idempotent; blocks. Raises
        what the application raises when its context is left, or what ended the server's loop."""
        with self._changing:  # so that a start in another thread is complete first
            if self._thread.ident is None:  # only bound, or not even that
                self._stop_asked.set()  # for a start that comes after: it ends at once
                if self._listening is not None:
                    self._listening.close()
                return
        if self._loop is not None and self._thread.is_alive():  # a forked process has a copy of this, but no thread
            with suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(self._stop_asked.set)
        self._thread.join(self._stop_seconds)
        if self._thread.is_alive():
            _log.error("%s does not stop within %g s", self._thread.name, self._stop_seconds)
        elif self._failure is not None:
            raise self._failure

    async def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the server's loop, and wait for its result in the caller's loop."""
        assert self._loop is not None, "the server has been started"
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    # --- In the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        import uvloop

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - the boundary of the thread: raised by `start` or by `stop`
            if self._ready.done():
                _log.error("%s failed", self._thread.name, exc_info=error)
                self._failure = error
            else:
                self._ready.set_exception(error)
        finally:
            if self._listening is not None:
                self._listening.close()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        state = ServerState()
        acceptor: asyncio.Server | None = None
        try:
            async with self._open_app() as app:
                acceptor = await self._accept(app, state)
                self._set_date(state)
                self._ready.set_result(None)
                while not self._stop_asked.is_set():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stop_asked.wait(), 1.0)
                    self._set_date(state)
        finally:
            if acceptor is not None:
                await self._drain(acceptor, state)

    def _set_date(self, state: ServerState) -> None:
        """Make the ``Date`` header for the replies of the next second, because making it for each one is slow."""
        if self._date_header:
            state.default_headers = [(b"date", formatdate(usegmt=True).encode())]

    async def _accept(self, app: Any, state: ServerState) -> asyncio.Server:
        """Begin to accept connections on the listening socket."""
        config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            # Without trust in X-Forwarded-For, which any client can write.
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(self._keepalive_seconds),
        )
        config.load()
        connect = partial(self._connection, self._counter, config=config, server_state=state, app_state={})
        # A handshake is not a connection for `ConnectionCounter` yet, so it must end soon; asyncio's default is 60 s.
        handshake = None if self._ssl is None else self._counter.bounds.header_seconds
        return await asyncio.get_running_loop().create_server(
            connect, sock=self._listening, backlog=_BACKLOG, ssl=self._ssl, ssl_handshake_timeout=handshake
        )

    async def _drain(self, acceptor: asyncio.Server, state: ServerState) -> None:
        """Let requests in progress end, cancel those that do not, and close all connections."""
        if self._on_drain is not None:
            self._on_drain()
        acceptor.close()
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            _, late = await asyncio.wait(state.tasks, timeout=self._drain_seconds)
            if late:
                await self._cancel(late, state)
        for connection in list(state.connections):
            connection.transport.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + _FLUSH_SECONDS
        # Replies may still be on their way. uvicorn's connections tell nobody of their end, so this set is polled.
        while state.connections and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def _cancel(self, late: set[asyncio.Task[None]], state: ServerState) -> None:
        """End requests that outlast the drain: first by closing their connections, then by cancelling them."""
        _log.warning("%d requests did not end within %g s and are cancelled", len(late), self._drain_seconds)
        for connection in list(state.connections):
            cycle: Any = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                connection.transport.abort()  # wakes a request that waits for its body, or for its reply to be read
        _, late = await asyncio.wait(late, timeout=1.0)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=1.0)


def _bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to the port and does not listen. Raises as ``ThreadedServer.bind``."""
    try:
        # The protocol is named (TCP) in what `getaddrinfo` returns. asyncio sets TCP_NODELAY only on such sockets;
        # without it the second write of a reply waits 40 ms for the client's delayed acknowledgement.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise OSError(f"{host!r} is not a name or address of this machine: {error}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe_when_idle(bound, _GONE_SECONDS)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: Exception) -> OSError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return OSError(f"port {port} on {host} is taken{_owner_of(port)}; stop that, or give another port (0 for any)")
    return OSError(f"cannot listen on {host} port {port}: {error}")


def _owner_of(port: int) -> str:
    """Which process listens on a port, for an error message; empty if the system does not tell."""
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


def ended_by_signal() -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets. A second signal ends the process at once. For the main thread."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def end(number: signal.Signals) -> None:
        _log.info("%s: finishing requests, then stopping", number.name)
        ended.set()
        for each in numbers:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    for number in numbers:
        loop.add_signal_handler(number, end, number)
    return ended


def reload_on_hangup(server: Callable[[], bool]) -> None:
    """Let SIGHUP read a server's files for TLS again (its ``reload_tls``) instead of ending the process. For the main
    thread."""

    def reload() -> None:
        try:
            read = server()
        except InvalidValue as error:
            _log.error("SIGHUP: %s; the certificate that was read before stays in use", error)
        else:
            _log.info("SIGHUP: %s", "the certificate was read again" if read else "no certificate to read: no TLS")

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def allow_many_files() -> None:
    """Raise this process's limit of open files to what the system allows; the usual 1,024 is too low for a server."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # refused: the process keeps the limit that it has
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def untraced_app(**arguments: Any) -> FastAPI:
    """``FastAPI(**arguments)`` that makes no OpenTelemetry spans for its requests.

    A server may run in the process of a runner. From version 0.165 on, FastAPI makes a span for every request with the
    process's tracer, and that span would be recorded as the agent's. Earlier versions ignore the argument.
    """
    from fastapi import FastAPI

    off = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    return FastAPI(**arguments, telemetry=off)  # pyright: ignore[reportArgumentType] - not a type of all versions
