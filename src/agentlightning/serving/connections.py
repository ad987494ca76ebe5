"""Connections that may not take more than their share: of number, of time, of memory.

uvicorn reads requests and writes replies; this adds the bounds that it does not have. A client that sends half a
request and then nothing (slowloris) is sent away after a while, whatever it does in between. One that does not read
its reply is cut off, for the reply is held in memory until it does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Protocol, cast

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

# --- How many connections there may be, and what the arrival of a request on one of them may ta ---

BYTES_PER_SECOND = 64 * 1024
"""A body that comes at least this fast is never too slow."""


class ConnectionBounds(Protocol):
    """What connections are held to."""

    @property
    def connections(self) -> int:
        """Open connections in all."""
        ...

    @property
    def connections_per_address(self) -> int:
        """Open connections from one address."""
        ...

    @property
    def header_bytes(self) -> int:
        """The request line and all headers of one request."""
        ...

    @property
    def header_seconds(self) -> float:
        """How long a request's headers may take to arrive."""
        ...

    @property
    def body_seconds(self) -> float:
        """How long its body may take, beyond a second for every 64 KiB of it; and how long a client may take to read
        a reply, likewise."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a server that has no others."""

    connections: int
    connections_per_address: int
    header_bytes: int = 64 * 1024
    header_seconds: float = 30.0
    body_seconds: float = 30.0


class Doorkeeper:
    """Counts the open connections. Used by one event loop."""

    def __init__(self, bounds: ConnectionBounds) -> None:
        self.bounds = bounds
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
        if self._total > self.bounds.connections:
            return f"the server has {self.bounds.connections:,} open connections and takes no more"
        if self._by_address[address] > self.bounds.connections_per_address:
            return f"{address} has {self.bounds.connections_per_address:,} open connections and may not have more"
        return None

    def leave(self, address: str) -> None:
        """It is gone."""
        self._total -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


# ---

_log = logging.getLogger(__name__)

_LINGER_SECONDS = 1.0
"""How long a client that is still sending is listened to, so that it can read why it is sent away."""


class BoundedConnection(HttpToolsProtocol):
    """A connection of uvicorn's with bounds.

    Args:
        doorkeeper: counts it, and knows the bounds.
        arguments: of uvicorn.
    """

    MALFORMED: ClassVar[int] = 400
    OVERLOADED: ClassVar[int] = 503
    TOO_SLOW: ClassVar[int] = 408
    HEADERS_TOO_LARGE: ClassVar[int] = 431

    def __init__(self, doorkeeper: Doorkeeper, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._doorkeeper = doorkeeper
        self._bounds = doorkeeper.bounds
        self._address = ""
        self._in_headers = False
        self._in_message = False
        self._began = 0.0
        self._received = 0
        """Of the request that is arriving."""
        self._is_deaf = False
        self._chunk = 0
        """Bytes that came last."""
        self._deadline: asyncio.TimerHandle | None = None
        self._reader_deadline: asyncio.TimerHandle | None = None

    @property
    def waited_seconds(self) -> float:
        """How long the request has been arriving that is arriving now, or was last."""
        return monotonic() - self._began

    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        """Headers and body of the answer to a client that is sent away; ``why`` is a sentence."""
        raise NotImplementedError

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._began = monotonic()
        refusal = self._doorkeeper.enter(self._address)
        if refusal is not None:
            self._send_away(self.OVERLOADED, refusal)
            return
        self._set_deadline(self._bounds.header_seconds)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._cancel_reader_deadline()
        self._doorkeeper.leave(self._address)
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_deaf or self.transport.is_closing():
            return
        self._chunk = len(data)
        was_in_message = self._in_message
        if was_in_message:
            self._received += len(data)
            if self._are_headers_too_large():
                return
        super().data_received(data)
        if not self._in_message:
            if self._deadline is not None:
                self._cancel_deadline()
            return
        if not was_in_message:
            self._received = len(data)
            if self._are_headers_too_large():
                return
        if self._deadline is None and not self.transport.is_closing():
            self._set_deadline(self._bounds.header_seconds if self._in_headers else self._bounds.body_seconds)

    def _are_headers_too_large(self) -> bool:
        """Whether the client is sent away, since the headers have no end."""
        if not self._in_headers or self._received <= self._bounds.header_bytes:
            return False
        self._refuse_headers()
        return True

    def _refuse_headers(self) -> None:
        self._send_away(self.HEADERS_TOO_LARGE, f"the headers have more than {self._bounds.header_bytes:,} bytes")

    @override
    def on_message_begin(self) -> None:
        self.begin_message()
        super().on_message_begin()

    def begin_message(self) -> None:
        """The first bytes of a request are there."""
        self._in_headers = self._in_message = True
        self._received = 0
        self._began = monotonic()

    @override
    def on_headers_complete(self) -> None:
        self.end_headers()
        super().on_headers_complete()

    def end_headers(self) -> None:
        """All headers are there. Raises ``ValueError`` if they are too large after all: they came in one piece."""
        if max(self._received, self._chunk) > self._bounds.header_bytes:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self._bounds.header_bytes:
                raise ValueError(size)
        self._in_headers = False

    @override
    def send_400_response(self, msg: str) -> None:
        if self._in_headers and self._chunk > self._bounds.header_bytes:
            self._refuse_headers()
        else:
            self._send_away(self.MALFORMED, "this is no request of HTTP/1.1")

    @override
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
        if self.flow.read_paused:  # it is we who do not read on
            self._began = monotonic()
            self._set_deadline(self._bounds.body_seconds)
            return
        in_body = self._in_message and not self._in_headers
        allowed = self._bounds.header_seconds
        if in_body:
            allowed = self._bounds.body_seconds + self._received / BYTES_PER_SECOND
        left = self._began + allowed - monotonic()
        if left > 0:
            self._set_deadline(left)
            return
        part = "body" if in_body else "headers"
        self._send_away(self.TOO_SLOW, f"the {part} of the request did not arrive within {allowed:.3g} s")

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        waiting = self.transport.get_write_buffer_size()
        allowed = self._bounds.body_seconds + waiting / BYTES_PER_SECOND
        self._reader_deadline = self.loop.call_later(allowed, self._cut_off)

    @override
    def resume_writing(self) -> None:
        self._cancel_reader_deadline()
        super().resume_writing()

    def _cancel_reader_deadline(self) -> None:
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None

    def _cut_off(self) -> None:
        """The client has not read what it was sent."""
        waiting = self.transport.get_write_buffer_size()
        _log.info("%s leaves %d bytes of its reply unread; the connection is ended", self._address, waiting)
        self.transport.abort()

    def _send_away(self, status: int, why: str) -> None:
        """Answer, if nothing has been answered yet, and close the connection."""
        self._cancel_deadline()
        cycle = cast("RequestResponseCycle | None", self.cycle)
        answered = cycle is not None and cycle.response_started and not cycle.response_complete
        if not self.transport.is_closing() and not answered:
            headers, body = self.refusal(status, why)
            headers |= {"content-length": str(len(body)), "connection": "close"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(STATUS_LINE[status] + lines.encode() + b"\r\n" + body)
        if status == self.HEADERS_TOO_LARGE:  # a connection that is closed with bytes unread is reset, reply and all
            self._is_deaf = True
            self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()
