"""Connections with the bounds that uvicorn's do not have: of number, and of what a request's arrival may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from agentlightning.proxy.refusals import Refused

__all__ = ["Connections", "bounded_protocol"]

_BYTES_PER_SECOND = 64 * 1024
"""A request that comes at least this fast is never too slow."""


@dataclass(slots=True)
class Connections:
    """The open connections of a server, and their bounds. Used by one event loop."""

    most: int
    """How many may be open."""
    head_bytes: int = 64 * 1024
    """How long the request line and all headers may be."""
    arrival_seconds: float = 30.0
    """How long a request may take to arrive, beyond a second for every 64 KiB of it."""
    count: int = field(default=0, init=False)


def bounded_protocol(connections: Connections) -> Callable[..., HttpToolsProtocol]:
    """What uvicorn makes its connections with."""

    def make(**arguments: Any) -> _BoundedProtocol:
        return _BoundedProtocol(connections, **arguments)

    return make


class _BoundedProtocol(HttpToolsProtocol):
    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._connections = connections
        self._received = 0
        """Of the request that is arriving."""
        self._is_in_head = False
        self._arrival: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connections.count += 1
        if self._connections.count > self._connections.most:
            self._refuse(Refused(503, "proxy_overloaded", "The proxy has too many connections.", retry_after_seconds=1))
            return
        self._await_arrival(self._connections.arrival_seconds)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.count -= 1
        self._arrived()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._received += len(data)
        if self._is_in_head and self._received > self._connections.head_bytes:
            self._refuse(Refused(431, "headers_too_large", "The headers of the request are too large."))

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._received = 0
        if self._arrival is None:
            self._await_arrival(self._connections.arrival_seconds)

    @override
    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    @override
    def on_message_complete(self) -> None:
        self._arrived()
        super().on_message_complete()

    def _await_arrival(self, seconds: float) -> None:
        self._arrival = self.loop.call_later(seconds, self._check_arrival, self.loop.time())

    def _arrived(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _check_arrival(self, began: float) -> None:
        """The time for a small request is up: how much more does a large one get?"""
        if self.flow.read_paused:  # it is we who do not read on: the call is held at the gate, during a pause
            self._await_arrival(self._connections.arrival_seconds)
            return
        allowed = self._connections.arrival_seconds + self._received / _BYTES_PER_SECOND
        left = began + allowed - self.loop.time()
        if left > 0:
            self._arrival = self.loop.call_later(left, self._check_arrival, began)
            return
        self._arrival = None
        self._refuse(Refused(408, "request_too_slow", f"The request did not arrive within {allowed:.1f} s."))

    def _refuse(self, refused: Refused) -> None:
        """Answer, if nothing has been answered yet, and close the connection."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        is_answered = cycle is not None and cycle.response_started and not cycle.response_complete
        if not self.transport.is_closing() and not is_answered:
            body = refused.body()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            lines = [f"HTTP/1.1 {refused.status} ", *(f"{k}: {v}" for k, v in (headers | refused.headers()).items())]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
