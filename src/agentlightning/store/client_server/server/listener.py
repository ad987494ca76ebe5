"""A port that is listened on, and the event loop in a thread of its own that answers there."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.serving import ports
from agentlightning.serving.bounds import Doorkeeper
from agentlightning.serving.server import LoopServer, server_config
from agentlightning.store.client_server.server.app import StoreApp
from agentlightning.store.client_server.server.connections import DirectConnection
from agentlightning.store.client_server.server.limits import ServerLimits

__all__ = ["Listener", "TlsFiles"]

_log = logging.getLogger(__name__)
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
        self._server: LoopServer | None = None
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
            try:
                self._bound = ports.bind(self._host, self._port), config
            except OSError as error:
                raise StoreUnavailable(str(error)) from error
        return self._bound[0].getsockname()[1]

    def start(self) -> int:
        """Listen; returns the port, when requests are answered. Blocks. Raises as ``bind``."""
        port = self.bind()
        assert self._bound is not None
        (listening, config), self._bound = self._bound, None
        try:
            ports.listen(listening, self._host)
        except OSError as error:
            raise StoreUnavailable(str(error)) from error
        server = self._server = LoopServer(
            config, self._limits.drain_seconds, self._app.drain, handshake_seconds=self._limits.header_seconds
        )
        self._thread = threading.Thread(target=_answer, args=(server, listening), name="agl-http", daemon=True)
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
        def connection(**arguments: Any) -> DirectConnection:
            return DirectConnection(self.doorkeeper, self._app, self._limits.retry_after_seconds, **arguments)

        return server_config(
            self._app,
            connection,
            keepalive_seconds=self._limits.idle_seconds,
            ssl_certfile=None if self._tls is None else str(self._tls.certificate),
            ssl_keyfile=None if self._tls is None else str(self._tls.key),
        )


def _answer(server: LoopServer, listening: socket.socket) -> None:
    """Serve until the end, in an event loop of this thread's own."""
    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve([listening]))
    except BaseException as error:
        if not server.answering.done():
            server.answering.set_exception(error)
            return
        _log.exception("the server's loop failed")
        raise
