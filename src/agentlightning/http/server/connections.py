"""Small requests to hot routes, answered as soon as they are complete, without ASGI in between.

That saves a third of what the server does for them besides the store's work. Everything else, and whatever is
unusual about a request, is left to uvicorn.
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
        counter: counts it.
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
