"""Small requests to the table's routes, answered without ASGI as soon as they are complete.

ASGI costs a third of what the server does for such a request besides the store's work. uvicorn handles all other
requests, and those with anything unusual about them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from time import monotonic
from typing import Any, cast

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.endpoints import Match
from agentlightning.http.server.exchange import TRANSPORT, ClientGone, Exchange, Reply
from agentlightning.serving.connections import BoundedConnection, ConnectionCounter

_DIRECT_BYTES = 64 * 1024
"""The largest body that is read before the limits on load are checked."""


_UNREAD_BYTES = 16 * 1024
"""The most bytes of replies that a connection may have without being counted."""
_KNOWN_BLOCKS = 256
_KNOWN_BLOCK_BYTES = 2048
_find_length = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,5})\r\n").search
_plain_line = re.compile(rb"POST (/[A-Za-z0-9/._~:@\-]*) HTTP/1\.1").fullmatch

Headers = dict[bytes, bytes]


class KnownHeaders:
    """The headers of earlier requests, by their bytes without the digits of the length.

    A client sends the same headers with each request, but for the length. Their bytes are parsed once, and found here
    from then on, which takes a third of the time. Parsed again they would give the same.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, Headers] = {}

    def keep(self, block: bytes, headers: Headers) -> None:
        """Note what ``block`` was parsed to. All are dropped when there are too many, as with ids of requests."""
        if len(block) <= _KNOWN_BLOCK_BYTES:
            if len(self._blocks) >= _KNOWN_BLOCKS:
                self._blocks.clear()
            self._blocks[block] = headers

    def find(self, block: bytes, length: bytes) -> Headers | None:
        """The headers that ``block`` is known to give, with this length."""
        headers = self._blocks.get(block)
        return None if headers is None else {**headers, b"content-length": length}


class DirectConnection(BoundedConnection):
    """A connection that answers small requests without ASGI.

    Args:
        counter: counts connections.
        app: answers requests.
        known: shared by all connections of the server.
        arguments: of uvicorn.
    """

    def __init__(self, counter: ConnectionCounter, app: StoreApp, known: KnownHeaders, **arguments: Any) -> None:
        super().__init__(counter, **arguments)
        self._app = app
        self._known = known
        self._most_bytes = min(_DIRECT_BYTES, counter.bounds.header_bytes)
        self._block: bytes | None = None
        """The headers that are being parsed, if they and their body arrived in one piece."""
        self._collecting: DirectExchange | None = None
        self._unanswered: list[RequestResponseCycle] = []
        """Requests that uvicorn answers, one after another."""
        self._arriving = 0
        """Bytes of a request that is not whole yet, as ``Load`` counts them."""
        self._unread = 0
        """Bytes of replies that the client has not read, as ``Load`` counts them."""
        self._last_reply = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    @override
    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        return self._app.refuse(self.client, status, why, self.waited_seconds)

    @override
    def data_received(self, data: bytes) -> None:
        if (
            not self._in_message
            and len(data) <= self._most_bytes
            and not self.pipeline
            and self._is_free()
            and (end := data.find(b"\r\n\r\n")) > 0
            and (line := _plain_line(data, 0, data.index(b"\r\n"))) is not None
            and (length := _find_length(data, line.end(), end + 2)) is not None
            and end + 4 + int(length[1]) == len(data)
        ):
            block = data[line.end() : length.start(1)] + data[length.end(1) : end]
            headers = self._known.find(block, length[1])
            if headers is None:
                self._block = block
            elif self._answer_known(line[1].decode("ascii"), headers, data[end + 4 :]):
                return
        try:
            super().data_received(data)
        finally:
            self._block = None
        collected = 0 if self._collecting is None else len(self._collecting.body or b"")
        self._count_arriving(self._received if self._in_headers else collected)

    def _count_arriving(self, size: int) -> None:
        """Count what has arrived of a request that is not whole: so may many requests be that never will."""
        load = self._app.load
        load.bytes += size - self._arriving
        self._arriving = size
        if size and load.is_full and not self.transport.is_closing():
            self._refuse(self.OVERLOADED, f"the server holds {load.bytes:,} bytes of requests and replies; retry later")

    def _is_free(self) -> bool:
        """Whether there is no request that is not answered yet."""
        cycle = cast("RequestResponseCycle | DirectExchange | None", self.cycle)
        return cycle is None or cycle.response_complete

    def _answer_known(self, path: str, headers: Headers, body: bytes) -> bool:
        """Answer a request whose headers are known, if it is one to be answered here."""
        found = self._app.find("POST", path)
        if found is None or not found.endpoint.direct or self._ignores_input or self.transport.is_closing():
            return False
        self._cancel_deadline()
        self._unset_keepalive_if_required()
        self.headers = list(headers.items())
        exchange = DirectExchange(self, path, headers, found)
        exchange.body = body
        self.cycle = exchange  # type: ignore[assignment]
        self._begin(exchange)
        return True

    @override
    def on_message_begin(self) -> None:
        self.begin_message()
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    @override
    def on_headers_complete(self) -> None:
        self.end_headers()
        parser, url, headers = self.parser, self.url, dict(self.headers)
        length = headers.get(b"content-length", b"0")
        if (
            parser is not None
            and parser.get_method() == b"POST"
            and self._is_free()
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
                if self._block is not None and len(headers) == len(self.headers):
                    self._known.keep(self._block, headers)
                self._collecting = DirectExchange(self, path, headers, found)
                self.cycle = self._collecting  # type: ignore[assignment]  # uvicorn queues pipelined requests meanwhile
                return
        raw, expects = self.headers, self.expect_100_continue
        HttpToolsProtocol.on_message_begin(self)  # put off until now: see begin_message
        self.scope["extensions"] = {TRANSPORT: self.transport}  # type: ignore[typeddict-item]
        self.url, self.headers, self.scope["headers"] = url, raw, raw
        self.expect_100_continue = expects
        super().on_headers_complete()
        self._unanswered = [each for each in (*self._unanswered, self.cycle) if each and not each.response_complete]

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
        self._begin(exchange)

    def _begin(self, exchange: DirectExchange) -> None:
        # The application takes the task out at its end: a callback of the task would cost a turn of the loop.
        exchange.tasks = self.tasks
        exchange.task = self.loop.create_task(self._app.serve(exchange, exchange.found))
        self.tasks.add(exchange.task)

    # --- Replies that are not read: they are in memory, so there are no more of them until they are -----

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_UNREAD_BYTES)

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._count_unread(self.transport.get_write_buffer_size())

    @override
    def resume_writing(self) -> None:
        self._count_unread(0)
        super().resume_writing()

    def _count_unread(self, size: int) -> None:
        self._app.load.bytes += size - self._unread
        self._unread = size

    # --- The time between requests: one timer for the connection, where uvicorn sets one after every reply ---

    @override
    def on_response_complete(self) -> None:
        self._last_reply = monotonic()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)
        if self.pipeline or self.flow.read_paused:
            super().on_response_complete()

    def _close_if_idle(self) -> None:
        self._idle_timer = None
        if self._in_message or not self.cycle.response_complete:
            return  # the next reply sets it again
        left = self._last_reply + self.timeout_keep_alive - monotonic()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._close_if_idle)
        else:
            self.timeout_keep_alive_handler()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._count_arriving(0)
        self._count_unread(0)
        for each in self._unanswered:  # uvicorn tells only the last of several requests
            each.disconnected = True
            each.message_event.set()
        super().connection_lost(exc)


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
        """Write the reply, and let the connection go on to its next request."""
        self.response_started = True
        protocol, transport = self.protocol, self.protocol.transport
        if self.disconnected or transport.is_closing():
            self.response_complete = True
            return reply.status
        head = STATUS_LINE[reply.status]
        for name, value in (*protocol.server_state.default_headers, *reply.headers, *self.extra_headers):
            if name == b"connection":
                self.keep_alive = False
            else:
                head += b"%b: %b\r\n" % (name, value)
        if not self.keep_alive:
            head += b"connection: close\r\n"
        head += b"content-type: %b\r\nx-request-id: %b\r\n" % (reply.content_type, self.request_id.encode())
        if reply.parts is None:
            self.response_complete = True
            transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(reply.body), reply.body))
        else:
            transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
            await self._send_parts(reply.parts, self._send_part, lambda: self.disconnected)
            self.response_complete = True
            transport.write(b"0\r\n\r\n")
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()
        return reply.status

    @override
    async def _send_part(self, part: bytes) -> None:
        if self.protocol.transport.is_closing():
            raise ClientGone
        self.protocol.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        await self.protocol.flow.drain()

    @override
    async def cut_off(self) -> None:
        self.response_complete = True
        self.protocol.transport.abort()
