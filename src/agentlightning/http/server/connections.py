"""Small requests to hot routes, answered without ASGI as soon as they are complete.

ASGI costs a third of what the server does for such a request besides the store's work. uvicorn handles all other
requests, and those with anything unusual about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from agentlightning.errors import BadRequest, Overloaded
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.server.endpoints import Reply
from agentlightning.http.server.exchange import Exchange
from agentlightning.http.server.matching import Match
from agentlightning.serving.connections import BoundedConnection, ConnectionCounter

_DIRECT_BYTES = 64 * 1024
"""The largest body that is read before the limits on load are checked."""


class DirectApp(Protocol):
    """Answers requests without ASGI."""

    find: Callable[[str, str], Match | None]
    """The route for a verb and a path."""

    async def serve(self, exchange: Exchange, found: Match | None = None) -> None:
        """Answer a request. Raises nothing."""
        ...

    def note_refusal(self, client: Sequence[Any] | None, status: int, why: str, seconds: float) -> str:
        """Count and log a refused client; returns the id for reply and log."""
        ...


class DirectConnection(BoundedConnection):
    """A connection that answers hot requests without ASGI.

    Args:
        counter: counts connections.
        direct: answers small requests to hot routes.
        retry_after_seconds: when a client that is sent away may come back.
        arguments: of uvicorn.
    """

    def __init__(
        self, counter: ConnectionCounter, direct: DirectApp, retry_after_seconds: int, **arguments: Any
    ) -> None:
        super().__init__(counter, **arguments)
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
            HttpToolsProtocol.on_message_begin(self)  # put off until now: see begin_message
            self.url, self.headers, self.scope["headers"] = url, headers, headers
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
        task = self.loop.create_task(self._direct.serve(exchange, exchange.found))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # --- Requests to hot routes ------------------------------------------------------------------

    def _begin_direct(self) -> DirectExchange | None:
        """The request, if it can be answered without ASGI; None leaves it to uvicorn."""
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
        found = self._direct.find("POST", path)
        if found is None or not found.bound.route.hot:
            return None
        exchange = DirectExchange(self, path, self.headers, headers, found)
        self.cycle = exchange  # type: ignore[assignment]  # uvicorn queues pipelined requests while a cycle is open
        return exchange


class DirectExchange(Exchange):
    """A small request that arrived whole. It stands in for uvicorn's object for a request and its response.

    Args:
        protocol: its connection.
        path: what it asks for.
        raw_headers, headers: its headers, as a list and by name.
        found: the route that the path leads to.
    """

    __slots__ = (
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
        # The base class is not initialised: there is no ASGI scope, and nothing to receive from.
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
        """The event that uvicorn sets when the connection is lost: this object itself."""
        return self

    def set(self) -> None:
        """The connection is lost."""
        if self.on_end is not None:
            self.on_end()

    @override
    def when_gone(self, tell: Callable[[], None]) -> Callable[[], object]:
        self.on_end = tell
        if self.disconnected:
            tell()
        return self._forget

    def _forget(self) -> None:
        self.on_end = None

    async def send(self, reply: Reply) -> int:
        """Write the whole reply at once, and let the connection go on to its next request."""
        self.response_started = self.response_complete = True
        protocol, transport = self.protocol, self.protocol.transport
        if self.disconnected or transport.is_closing():
            return reply.status
        body = reply.body if reply.parts is None else b"".join(reply.parts)
        head = [STATUS_LINE[reply.status]]
        for name, value in (*protocol.server_state.default_headers, *reply.headers, *self.extra_headers):
            head += (name, b": ", value, b"\r\n")
            if name == b"connection":
                self.keep_alive = False
        if not self.keep_alive:
            head.append(b"connection: close\r\n")
        head.append(
            b"content-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (reply.content_type, self.request_id.encode(), len(body), body)
        )
        transport.write(b"".join(head))
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()
        return reply.status
