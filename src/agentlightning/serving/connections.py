"""HTTP/1.1 connections with bounds on their number, on the time they take and on the memory they hold.

uvicorn parses requests and writes replies; this module adds the bounds that uvicorn does not have. A client that sends
half a request and then nothing (slowloris) is refused after a while. A client that does not read its reply is
disconnected, because the reply stays in memory until it is read.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, cast

from typing_extensions import override
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

_log = logging.getLogger(__name__)

BYTES_PER_SECOND = 64 * 1024
"""A body that arrives at least this fast is never too slow."""

_CLOSE_DELAY_SECONDS = 1.0
"""How long a connection stays open after the reply to a client that may still be sending."""


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """The bounds on connections of one server."""

    connections: int = 8192
    """Open connections in all. A new one beyond this is answered with 503 and closed."""
    connections_per_address: int = 8192
    """Open connections from one address."""
    header_bytes: int = 64 * 1024
    """The request line and all headers of one request."""
    header_seconds: float = 30.0
    """How long the headers of a request may take to arrive; also a TLS handshake."""
    body_seconds: float = 30.0
    """How long the body of a request may take to arrive, in addition to a second for every 64 KiB of it. A client may
    take the same time to read a reply."""


class ConnectionCounter:
    """Counts the open connections of one server. Only the event loop of that server uses it."""

    def __init__(self, bounds: ConnectionBounds) -> None:
        self.bounds = bounds
        self.total = 0
        """Open connections."""
        self._by_address: Counter[str] = Counter()

    def opened(self, address: str) -> str | None:
        """Count a new connection from ``address``; return why it must be refused, or None."""
        self.total += 1
        self._by_address[address] += 1
        if self.total > self.bounds.connections:
            return f"the server has {self.bounds.connections:,} open connections and takes no more"
        if self._by_address[address] > self.bounds.connections_per_address:
            return f"{address} has {self.bounds.connections_per_address:,} open connections and may not have more"
        return None

    def closed(self, address: str) -> None:
        """Count the end of a connection, also of one that was refused."""
        self.total -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class PairedFlow(FlowControl):
    """Nothing is read from a client that does not read: it would be answered, and the answers would be in memory."""

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self.pause_reading()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self.resume_reading()

    @override
    def resume_reading(self) -> None:
        if not self.write_paused:
            super().resume_reading()


class BoundedConnection(HttpToolsProtocol):
    """One connection of uvicorn, held to ``ConnectionBounds``.

    Args:
        counter: counts the connection and knows the bounds.
        arguments: of uvicorn.
    """

    MALFORMED: ClassVar[int] = 400
    OVERLOADED: ClassVar[int] = 503
    TOO_SLOW: ClassVar[int] = 408
    HEADERS_TOO_LARGE: ClassVar[int] = 431

    def __init__(self, counter: ConnectionCounter, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._counter = counter
        self._bounds = counter.bounds
        self._address = ""
        self._in_headers = False
        self._in_message = False
        self._began = 0.0
        self._received = 0
        """Bytes of the request that is arriving."""
        self._ignores_input = False
        self._chunk_bytes = 0
        """Size of the last piece of input."""
        self._deadline: asyncio.TimerHandle | None = None
        self._reader_deadline: asyncio.TimerHandle | None = None

    @property
    def waited_seconds(self) -> float:
        """How long the current (or last) request has been arriving."""
        return monotonic() - self._began

    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        """Headers and body of the reply to a client that is refused; ``why`` is a sentence without a capital."""
        return {"content-type": "application/json"}, json.dumps({"detail": why}).encode()

    # --- What arrives ----------------------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = PairedFlow(transport)
        self._address = self.client[0] if self.client else ""
        self._began = monotonic()
        why = self._counter.opened(self._address)
        if why is not None:
            self._refuse(self.OVERLOADED, why)
            return
        self._set_deadline(self._bounds.header_seconds)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._cancel_reader_deadline()
        self._counter.closed(self._address)
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._ignores_input or self.transport.is_closing():
            return
        self._chunk_bytes = len(data)
        was_in_message = self._in_message
        self._received += len(data)
        super().data_received(data)
        if self._ignores_input:  # refused just now
            return
        if not self._in_message:
            self._cancel_deadline()
            return
        if not was_in_message:
            self._received = len(data)
        if self._in_headers and self._received > self._bounds.header_bytes:
            self._refuse_headers()
        # One timer per slow request, not one per piece: most requests arrive in one piece and never need a timer.
        elif self._deadline is None and not self.transport.is_closing():
            self._set_deadline(self._bounds.header_seconds if self._in_headers else self._bounds.body_seconds)

    def _refuse_headers(self) -> None:
        self._refuse(self.HEADERS_TOO_LARGE, f"the headers have more than {self._bounds.header_bytes:,} bytes")

    @override
    def on_message_begin(self) -> None:
        self.begin_message()
        super().on_message_begin()

    def begin_message(self) -> None:
        """Note that the first bytes of a request have arrived."""
        self._in_headers = self._in_message = True
        self._received = 0
        self._began = monotonic()

    @override
    def on_headers_complete(self) -> None:
        self.end_headers()
        super().on_headers_complete()

    def end_headers(self) -> None:
        """Note that all headers have arrived. Raises ``ValueError`` if they are too large, which only shows now when
        they arrived in one piece with other data."""
        if max(self._received, self._chunk_bytes) > self._bounds.header_bytes:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self._bounds.header_bytes:
                raise ValueError(size)
        self._in_headers = False

    @override
    def send_400_response(self, msg: str) -> None:
        # httptools turns every exception of a callback into a parser error, so the one of `end_headers` arrives here.
        if self._in_headers and max(self._received, self._chunk_bytes) > self._bounds.header_bytes:
            self._refuse_headers()
        else:
            self._refuse(self.MALFORMED, "this is not an HTTP/1.1 request")

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
        """Refuse a request that is too slow, or set the deadline for the rest of it."""
        self._deadline = None
        if self.flow.read_paused:  # the server itself reads no more for now, so the client is not to blame
            self._began = monotonic()
            self._set_deadline(self._bounds.body_seconds)
            return
        part, allowed = "headers", self._bounds.header_seconds
        if self._in_message and not self._in_headers:
            part, allowed = "body", self._bounds.body_seconds + self._received / BYTES_PER_SECOND
        left = self._began + allowed - monotonic()
        if left > 0:
            self._set_deadline(left)
            return
        self._refuse(self.TOO_SLOW, f"the {part} of the request did not arrive within {allowed:.3g} s")

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        allowed = self._bounds.body_seconds + self.transport.get_write_buffer_size() / BYTES_PER_SECOND
        self._reader_deadline = self.loop.call_later(allowed, self._abort_unread)

    @override
    def resume_writing(self) -> None:
        self._cancel_reader_deadline()
        super().resume_writing()

    def _cancel_reader_deadline(self) -> None:
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None

    def _abort_unread(self) -> None:
        unread = self.transport.get_write_buffer_size()
        _log.info("%s has not read %d bytes of its reply; the connection is closed", self._address, unread)
        self.transport.abort()  # `close` would wait until the client has read everything

    # --- Refusals --------------------------------------------------------------------------------

    def _refuse(self, status: int, why: str) -> None:
        """Reply with ``status``, unless a reply has begun, and close the connection."""
        self._cancel_deadline()
        cycle = cast("RequestResponseCycle | None", self.cycle)
        reply_has_begun = cycle is not None and cycle.response_started and not cycle.response_complete
        if not self.transport.is_closing() and not reply_has_begun:
            headers, body = self.refusal(status, why)
            headers |= {"content-length": str(len(body)), "connection": "close"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(STATUS_LINE[status] + lines.encode() + b"\r\n" + body)
        if status == self.HEADERS_TOO_LARGE:
            # The client is still sending. Closing a socket with unread input makes the kernel send a reset, which can
            # destroy the reply before the client has read it; so input is read and dropped for a while first.
            self._ignores_input = True
            self.loop.call_later(_CLOSE_DELAY_SECONDS, self.transport.close)
        else:
            self.transport.close()
