"""Serves an ASGI application from a thread with its own event loop, so that it works beside any caller's."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

import uvicorn
import uvloop
from typing_extensions import override

from agentlightning.errors import InvalidValue
from agentlightning.proxy.connections import Connections, bounded_protocol

__all__ = ["AppThread", "bound_socket"]

_T = TypeVar("_T")
_BACKLOG = 2048
_KEEPALIVE_SECONDS = 75
_STOP_SECONDS = 2


class AppThread:
    """One application on one listening socket.

    Args:
        open_app: makes the application in the thread's loop, and lays it down at the end.
        listener: a bound socket, which belongs to the thread from now on.
        name: of the thread.
        max_connections: how many may be open at once; more get 503.
    """

    def __init__(
        self,
        open_app: Callable[[], AbstractAsyncContextManager[Any]],
        listener: socket.socket,
        name: str,
        max_connections: int,
    ) -> None:
        self._open_app = open_app
        self._listener = listener
        self._connections = Connections(max_connections)
        self._ready: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def start(self) -> None:
        """Begin; the application takes requests after. Raises what went wrong in the thread."""
        _allow_many_files()
        self._thread.start()
        await asyncio.wrap_future(self._ready)

    async def stop(self) -> None:
        """End; the application is laid down and the port is free after. Idempotent."""
        if self._loop is not None and self._stop is not None and not self._ended.done():
            with suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.ident is not None:
            await asyncio.wrap_future(self._ended)
            self._thread.join()  # it has nothing left to do

    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._ready.done() and not self._ended.done() and self._thread.is_alive()

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the application's loop and wait for it here."""
        assert self._loop is not None, "the thread has been started"
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - the end of a thread: whoever waits for it is told
            if not self._ready.done():
                self._ready.set_exception(error)
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)
        else:
            self._ended.set_result(None)
        finally:
            self._listener.close()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        stopping = asyncio.create_task(self._stop.wait())
        async with self._open_app() as app:
            server = _Server(_config_of(app, self._connections), self._ready)
            serving = asyncio.create_task(server.serve(sockets=[self._listener]))
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # The socket was still open while the application was laid down, so that what came then was told why.
        stopping.cancel()
        server.end()
        await serving


def _allow_many_files() -> None:
    """Let this process have as many connections as the system allows: a stream takes two, often of 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # then as many as it has now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens, and whose end is waited for, not polled for."""

    def __init__(self, config: uvicorn.Config, ready: Future[None]) -> None:
        super().__init__(config)
        self._ready = ready
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Let ``serve`` return soon."""
        self._ending.set()

    @override
    async def main_loop(self) -> None:
        await self._ending.wait()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set_result(None)


def _config_of(app: Any, connections: Connections) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_protocol(connections),  # type: ignore[arg-type]  # a factory, which is all that uvicorn calls it as
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # it would have to be kept up to date
        timeout_keep_alive=_KEEPALIVE_SECONDS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens nowhere yet, bound to ``host`` and ``port`` (0: any free one).

    Raises:
        InvalidValue: the host is unknown, or the port is taken; the message says which.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise InvalidValue(
            f"cannot listen on {host}:{port}: {error}; give another port (0 takes a free one) or another host"
        ) from error
    return listener
