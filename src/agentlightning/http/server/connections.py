"""Small requests to hot routes, answered as soon as they are complete, without ASGI in between.

That saves a third of what the server does for them besides the store's work. Everything else, and whatever is
unusual about a request, is left to uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import uvicorn
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from agentlightning.errors import BadRequest, InvalidValue, Overloaded, StoreUnavailable
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.endpoints import Reply
from agentlightning.http.server.exchange import Exchange
from agentlightning.http.server.limits import ServerLimits
from agentlightning.http.server.matching import Match
from agentlightning.serving import server as ports
from agentlightning.serving.connections import BoundedConnection, Doorkeeper
from agentlightning.serving.server import LoopServer, server_config

_DIRECT_BYTES = 64 * 1024
"""The largest body that is collected before the application has agreed to it."""


class DirectApp(Protocol):
    """Answers requests without ASGI."""

    def find_hot(self, path: str) -> Match | None:
        """The route that a POST to ``path`` leads to, if it is a hot one."""
        ...

    async def serve(self, exchange: Exchange, found: Match | None = None) -> None:
        """Answer a request. Raises nothing."""
        ...

    def note_refusal(self, client: Sequence[Any] | None, status: int, why: str, seconds: float) -> str:
        """A client is sent away before its request is there; returns the id that reply and log name."""
        ...


class DirectConnection(BoundedConnection):
    """A connection whose hot requests go past ASGI.

    Args:
        doorkeeper: counts it.
        direct: answers small requests to hot routes.
        retry_after_seconds: when a client that is sent away may come back.
        arguments: of uvicorn.
    """

    def __init__(self, doorkeeper: Doorkeeper, direct: DirectApp, retry_after_seconds: int, **arguments: Any) -> None:
        super().__init__(doorkeeper, **arguments)
        self._direct = direct
        self._retry_after_seconds = retry_after_seconds
        self._collecting: DirectExchange | None = None

    @override
    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        error = Overloaded(why) if status == self.OVERLOADED else BadRequest(why)
        request_id = self._direct.note_refusal(self.client, status, why, self.waited_seconds)
        headers = {"content-type": PROBLEM_TYPE, "x-request-id": request_id}
        if status == self.OVERLOADED:
            headers["retry-after"] = str(self._retry_after_seconds)
        return headers, encode_problem(error, request_id, status=status)

    @override
    def on_message_begin(self) -> None:
        self.begin_message()
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    @override
    def on_headers_complete(self) -> None:
        self.end_headers()
        self._collecting = self._begin_direct()
        if self._collecting is None:
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            HttpToolsProtocol.on_message_begin(self)  # uvicorn's: it began for us when its first bytes came
            self.url, self.headers, self.scope["headers"] = url, headers, headers
            self.expect_100_continue = expects
            super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        if self._collecting is None:
            super().on_body(body)
        else:
            self._collecting.body += body

    @override
    def on_message_complete(self) -> None:
        self._in_message = False
        exchange, self._collecting = self._collecting, None
        if exchange is None:
            super().on_message_complete()
            return
        task = self.loop.create_task(self._direct.serve(exchange, exchange.found))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # --- Requests to hot routes ------------------------------------------------------------------

    def _begin_direct(self) -> DirectExchange | None:
        """The request, if it is one that can be answered without ASGI."""
        cycle = cast("RequestResponseCycle | DirectExchange | None", self.cycle)
        parser = self.parser
        if (
            parser is None
            or parser.get_method() != b"POST"
            or (cycle is not None and not cycle.response_complete)
            or b"%" in self.url
            or b"?" in self.url
            or self.expect_100_continue
            or not self.url.isascii()
            or parser.should_upgrade()
            or not parser.should_keep_alive()
        ):
            return None
        headers = dict(self.headers)
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or len(length) > 5 or int(length) > _DIRECT_BYTES:
            return None
        path = self.url.decode("ascii")
        found = self._direct.find_hot(path)
        if found is None:
            return None
        exchange = DirectExchange(self, path, self.headers, headers, found)
        self.cycle = exchange  # type: ignore[assignment]  # so that uvicorn lets what is pipelined wait for it
        return exchange

    def reply_directly(self, exchange: DirectExchange, reply: Reply, headers: list[tuple[bytes, bytes]]) -> None:
        """Write a whole reply at once, and go on to the next request."""
        exchange.response_started = exchange.response_complete = True
        if exchange.disconnected or self.transport.is_closing():
            return
        head = [STATUS_LINE[reply.status]]
        for name, value in (*self.server_state.default_headers, *headers):
            head += (name, b": ", value, b"\r\n")
            if name == b"connection":
                exchange.keep_alive = False
        if not exchange.keep_alive:
            head.append(b"connection: close\r\n")
        head += (b"content-length: %d\r\n\r\n" % len(reply.body), reply.body)
        self.transport.write(b"".join(head))
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()


class DirectExchange(Exchange):
    """A small request that came in whole. It takes the place of uvicorn's cycle of request and response.

    Args:
        protocol: its connection.
        path: what it asks for.
        raw_headers, headers: its headers, as a list and by name.
        found: the route that the path leads to.
    """

    __slots__ = (
        "body",
        "disconnected",
        "found",
        "keep_alive",
        "on_end",
        "protocol",
        "response_complete",
        "response_started",
    )

    def __init__(
        self,
        protocol: DirectConnection,
        path: str,
        raw_headers: list[tuple[bytes, bytes]],
        headers: dict[bytes, bytes],
        found: Match,
    ) -> None:
        # Not those of ASGI: there is no scope, and nothing to receive from.
        self.protocol = protocol
        self.method = "POST"
        self.path = path
        self.query = b""
        self.client = protocol.client
        self.raw_headers = raw_headers
        self.headers = headers
        self.request_id = ""
        self.may_wait = False
        self.extra_headers = []
        self.found = found
        self.body = b""
        self.on_end: Callable[[], None] | None = None
        self.disconnected = False
        self.keep_alive = True
        self.response_started = False
        self.response_complete = False

    @property
    def message_event(self) -> DirectExchange:
        """What uvicorn sets when the connection is lost."""
        return self

    def set(self) -> None:
        """The connection is lost."""
        if self.on_end is not None:
            self.on_end()

    async def read_body(self, limit: int, arrived: Callable[[int], None]) -> bytes:
        return self.body

    @override
    def when_gone(self, tell: Callable[[], None]) -> Callable[[], object]:
        self.on_end = tell
        if self.disconnected:
            tell()
        return self._forget

    def _forget(self) -> None:
        self.on_end = None

    async def send(self, reply: Reply) -> int:
        if reply.parts is not None:
            reply = reply._replace(body=b"".join(reply.parts), parts=None)
        headers = [(b"content-type", reply.content_type), *reply.headers, *self.reply_headers()]
        self.protocol.reply_directly(self, reply, headers)
        return reply.status


# --- A port that is listened on, and the event loop in a thread of its own that answers there ---

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
