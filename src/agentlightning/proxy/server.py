"""Serves an ASGI application from a thread with its own event loop, so that it works beside any caller's."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

import uvloop
from typing_extensions import override

from agentlightning.proxy.errors import Refused
from agentlightning.serving.connections import BoundedConnection, Bounds, Doorkeeper
from agentlightning.serving.server import LoopServer, allow_many_files, server_config

_T = TypeVar("_T")
_STOP_SECONDS = 2.0


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
        self._doorkeeper = Doorkeeper(Bounds(max_connections, connections_per_address=max_connections))
        self._ready: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def start(self) -> None:
        """Begin; the application takes requests after. Raises what went wrong in the thread."""
        allow_many_files()
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
            config = server_config(app, self._connect, date_header=False)  # which would have to be kept up to date
            server = LoopServer(config, _STOP_SECONDS)
            server.answering.add_done_callback(lambda _: self._ready.set_result(None))
            serving = asyncio.create_task(server.serve(sockets=[self._listener]))
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # The socket was still open while the application was laid down, so that what came then was told why.
        stopping.cancel()
        server.end()
        await serving

    def _connect(self, **arguments: Any) -> _Connection:
        return _Connection(self._doorkeeper, **arguments)


class _Connection(BoundedConnection):
    """One that sends clients away in the words of OpenAI's API."""

    @override
    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        code = {self.OVERLOADED: "proxy_overloaded", self.TOO_SLOW: "request_too_slow"}.get(status, "headers_too_large")
        again = 1 if status == self.OVERLOADED else None
        refused = Refused(status, code, f"{why[0].upper()}{why[1:]}.", retry_after_seconds=again)
        return {"content-type": "application/json", **refused.headers()}, refused.body()
