"""Small requests to the table's routes, answered without ASGI as soon as they are complete.

ASGI costs a third of what the server does for such a request besides the store's work. uvicorn handles all other
requests, and those with anything unusual about them.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, cast

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from agentlightning.errors import BadRequest, Overloaded
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.endpoints import Match
from agentlightning.http.server.exchange import Exchange, Reply
from agentlightning.serving.connections import BoundedConnection, ConnectionCounter

_DIRECT_BYTES = 64 * 1024
"""The largest body that is read before the limits on load are checked."""


class DirectConnection(BoundedConnection):
    """A connection that answers small requests without ASGI.

    Args:
        counter: counts connections.
        app: answers requests.
        retry_after_seconds: when a client that is sent away may come back.
        arguments: of uvicorn.
    """

    def __init__(self, counter: ConnectionCounter, app: StoreApp, retry_after_seconds: int, **arguments: Any) -> None:
        super().__init__(counter, **arguments)
        self._app = app
        self._retry_after_seconds = retry_after_seconds
        self._collecting: DirectExchange | None = None
        self._last_reply = 0.0

    @override
    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        error = Overloaded(why) if status == self.OVERLOADED else BadRequest(why)
        request_id = self._app.note_refusal(self.client, status, why, self.waited_seconds)
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
        cycle = cast("RequestResponseCycle | DirectExchange | None", self.cycle)
        parser, url, headers = self.parser, self.url, dict(self.headers)
        length = headers.get(b"content-length", b"0")
        if (
            parser is not None
            and parser.get_method() == b"POST"
            and (cycle is None or cycle.response_complete)
            and b"%" not in url
            and b"?" not in url
            and url.isascii()
            and not self.expect_100_continue
            and not parser.should_upgrade()
            and parser.should_keep_alive()
            and b"transfer-encoding" not in headers
            and len(length) <= 5
            and int(length) <= _DIRECT_BYTES
        ):
            path = url.decode("ascii")
            found = self._app.find("POST", path)
            if found is not None and found.endpoint.direct:
                self._collecting = DirectExchange(self, path, headers, found)
                self.cycle = self._collecting  # type: ignore[assignment]  # uvicorn queues pipelined requests meanwhile
                return
        raw, expects = self.headers, self.expect_100_continue
        HttpToolsProtocol.on_message_begin(self)  # put off until now: see begin_message
        self.url, self.headers, self.scope["headers"] = url, raw, raw
        self.expect_100_continue = expects
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        if self._collecting is None:
            super().on_body(body)
        else:
            self._collecting.body = (self._collecting.body or b"") + body

    @override
    def on_message_complete(self) -> None:
        self._in_message = False
        exchange, self._collecting = self._collecting, None
        if exchange is None:
            super().on_message_complete()
            return
        # The application takes the task out at its end: a callback of the task would cost a turn of the loop.
        exchange.tasks = self.tasks
        exchange.task = self.loop.create_task(self._app.serve(exchange, exchange.found))
        self.tasks.add(exchange.task)

    # --- The time between requests: one timer for the connection, where uvicorn sets one after every reply ---

    @override
    def on_response_complete(self) -> None:
        self._last_reply = monotonic()
        if self.timeout_keep_alive_task is None or self.pipeline or self.flow.read_paused:
            super()._unset_keepalive_if_required()
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1

    @override
    def _unset_keepalive_if_required(self) -> None:
        if self.transport.is_closing():
            super()._unset_keepalive_if_required()

    @override
    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        is_idle = not self._in_message and self.cycle.response_complete
        left = self._last_reply + self.timeout_keep_alive - monotonic()
        if left <= 0 and is_idle:
            super().timeout_keep_alive_handler()
        elif is_idle and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)


class DirectExchange(Exchange):
    """A small request that arrived whole. It stands in for uvicorn's object for a request and its response.

    Args:
        protocol: its connection.
        path: what it asks for.
        headers: its headers by name.
        found: the route that the path leads to.
    """

    method: str = "POST"
    body: bytes | None = b""
    disconnected = False
    keep_alive = True
    response_started = False
    response_complete = False
    _on_end: Callable[[], None] | None = None

    def __init__(self, protocol: DirectConnection, path: str, headers: dict[bytes, bytes], found: Match) -> None:
        # The base class is not initialised: there is no ASGI scope, and nothing to receive from.
        self.protocol = protocol
        self.path = path
        self.client = protocol.client
        self.raw_headers = protocol.headers
        self.headers = headers
        self.found = found

    @property
    def message_event(self) -> DirectExchange:
        """The event that uvicorn sets when the connection is lost: this object itself."""
        return self

    def set(self) -> None:
        """The connection is lost."""
        if self._on_end is not None:
            self._on_end()

    @override
    def when_gone(self, tell: Callable[[], None]) -> Callable[[], object]:
        self._on_end = tell
        if self.disconnected:
            tell()
        return self._forget

    def _forget(self) -> None:
        self._on_end = None

    @override
    async def send(self, reply: Reply) -> int:
        """Write the whole reply at once, and let the connection go on to its next request."""
        self.response_started = self.response_complete = True
        protocol, transport = self.protocol, self.protocol.transport
        if self.disconnected or transport.is_closing():
            return reply.status
        head = STATUS_LINE[reply.status]
        for name, value in (*protocol.server_state.default_headers, *reply.headers, *self.extra_headers):
            if name == b"connection":
                self.keep_alive = False
            else:
                head += b"%b: %b\r\n" % (name, value)
        if not self.keep_alive:
            head += b"connection: close\r\n"
        transport.write(
            b"%bcontent-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (head, reply.content_type, self.request_id.encode(), len(reply.body), reply.body)
        )
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()
        return reply.status
