"""Connections that may not take more than their share: of number, of time, of memory.

uvicorn reads requests and writes replies; this adds the bounds that it does not have. A client that sends half a
request and then nothing (slowloris) is sent away after a while, whatever it does in between.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from time import monotonic
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from agentlightning.errors import AgentLightningError, BadRequest, Overloaded
from agentlightning.store.client_server.codec import PROBLEM_TYPE, encode_problem
from agentlightning.store.client_server.limits import ServerLimits

__all__ = ["BoundedProtocol", "Doorkeeper"]

_BYTES_PER_SECOND = 64 * 1024
"""A body that comes at least this fast is never too slow."""


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
        config, server_state, app_state, _loop: of uvicorn.
    """

    def __init__(
        self,
        doorkeeper: Doorkeeper,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._doorkeeper = doorkeeper
        self._limits = doorkeeper.limits
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
        super().on_message_begin()
        self._in_headers = self._in_message = True
        self._received = 0
        self._began = monotonic()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

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
