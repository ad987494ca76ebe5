"""Connections that may not take more than their share: of number, of time, of memory.

uvicorn reads requests and writes replies; this adds the bounds that it does not have. A client that sends half a
request and then nothing (slowloris) is sent away after a while, whatever it does in between.

Small requests to hot routes are handed over as soon as they are complete, without ASGI in between: that
saves a third of what the server does for them besides the store's work. Everything else, and whatever is
unusual about a request, is left to uvicorn.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from agentlightning.errors import AgentLightningError, BadRequest, Overloaded
from agentlightning.store.client_server.server.answering import Reply
from agentlightning.store.client_server.server.exchange import Exchange
from agentlightning.store.client_server.server.limits import ServerLimits
from agentlightning.store.client_server.server.matching import Match
from agentlightning.store.client_server.wire.codec import PROBLEM_TYPE, encode_problem

__all__ = ["BoundedProtocol", "DirectApp", "Doorkeeper"]

_BYTES_PER_SECOND = 64 * 1024
"""A body that comes at least this fast is never too slow."""


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


class Doorkeeper:
    """Counts the open connections. Used by one event loop."""

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self.refused = 0
        """Connections closed because there were too many."""
        self.timed_out = 0
        """Connections closed because their request did not arrive in time."""
        self._total = 0
        self._by_address: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Open connections."""
        return self._total

    def enter(self, address: str) -> str | None:
        """A connection from ``address`` was made; why it may not stay, or None."""
        self._total += 1
        self._by_address[address] += 1
        if self._total > self.limits.connections:
            return f"the server has {self.limits.connections:,} open connections and takes no more"
        if self._by_address[address] > self.limits.connections_per_address:
            return f"{address} has {self.limits.connections_per_address:,} open connections and may not have more"
        return None

    def leave(self, address: str) -> None:
        """It is gone."""
        self._total -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class BoundedProtocol(HttpToolsProtocol):
    """A connection of uvicorn's with bounds.

    Args:
        doorkeeper: counts it.
        direct: answers small requests to hot routes.
        config, server_state, app_state, _loop: of uvicorn.
    """

    def __init__(
        self,
        doorkeeper: Doorkeeper,
        direct: DirectApp,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._doorkeeper = doorkeeper
        self._limits = doorkeeper.limits
        self._direct = direct
        self._collecting: DirectExchange | None = None
        self._address = ""
        self._in_headers = False
        self._in_message = False
        self._began = 0.0
        self._received = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        refusal = self._doorkeeper.enter(self._address)
        if refusal is not None:
            self._doorkeeper.refused += 1
            self._refuse(Overloaded(refusal), 503)
            return
        self._began = monotonic()
        self._set_deadline(self._limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._doorkeeper.leave(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._received += len(data)
            if self._received > self._limits.header_bytes:
                self._refuse(BadRequest(f"the headers have more than {self._limits.header_bytes:,} bytes"), 431)
                return
        elif self._in_message:
            self._received += len(data)
        super().data_received(data)
        if not self._in_message:
            if self._deadline is not None:
                self._cancel_deadline()
        elif self._deadline is None and not self.transport.is_closing():
            self._set_deadline(self._limits.header_seconds if self._in_headers else self._limits.body_seconds)

    def on_message_begin(self) -> None:
        self._in_headers = self._in_message = True
        self._received = 0
        self._began = monotonic()
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._collecting = self._begin_direct()
        if self._collecting is None:
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.headers, self.scope["headers"] = url, headers, headers
            self.expect_100_continue = expects
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._collecting is None:
            super().on_body(body)
        else:
            self._collecting.body += body

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

    # --- Deadlines -------------------------------------------------------------------------------

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._check_deadline)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check_deadline(self) -> None:
        """The time for the first part of a request is up: how much more does the rest get?"""
        self._deadline = None
        allowed = self._limits.header_seconds
        if self._in_message and not self._in_headers:
            allowed = self._limits.body_seconds + self._received / _BYTES_PER_SECOND
        left = self._began + allowed - monotonic()
        if left > 0:
            self._set_deadline(left)
            return
        self._doorkeeper.timed_out += 1
        part = "body" if self._in_message and not self._in_headers else "headers"
        self._refuse(BadRequest(f"the {part} of the request did not arrive within {allowed:.0f} s"), 408)

    def _refuse(self, error: AgentLightningError, status: int) -> None:
        """Answer, if nothing has been answered yet, and close the connection."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        answered = cycle is not None and cycle.response_started and not cycle.response_complete
        if not self.transport.is_closing() and not answered:
            body = encode_problem(error, "none", status=status)
            head = (
                f"HTTP/1.1 {status} \r\ncontent-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\n"
                f"retry-after: {self._limits.retry_after_seconds}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


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
        "left",
        "protocol",
        "response_complete",
        "response_started",
    )

    def __init__(
        self,
        protocol: BoundedProtocol,
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
        self.extra_headers = []
        self.found = found
        self.body = b""
        self.left: asyncio.Future[None] | None = None
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
        if self.left is not None and not self.left.done():
            self.left.set_result(None)

    async def read_body(self, limit: int, arrived: Callable[[int], None]) -> bytes:
        return self.body

    async def gone(self) -> None:
        if not self.disconnected:
            self.left = asyncio.get_running_loop().create_future()
            await self.left

    async def send(self, reply: Reply) -> int:
        if reply.parts is not None:
            reply = reply._replace(body=b"".join(reply.parts), parts=None)
        headers = [(b"content-type", reply.content_type), *reply.headers, *self.reply_headers()]
        self.protocol.reply_directly(self, reply, headers)
        return reply.status
