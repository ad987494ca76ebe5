"""The seam between what a client wants to say and how it gets there.

Everything that makes a client sturdy (retries, the circuit breaker, timeouts, health) is a
`Transport` around another `Transport`; the innermost one speaks HTTP. Each can be tested alone,
with a transport of the test's own inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from agentlightning.store.client_server.wire.routes import Priority

__all__ = [
    "RequestShed",
    "Transport",
    "WireReply",
    "WireRequest",
    "is_transient",
]


class WireRequest(NamedTuple):
    """One request, encoded once and sent as often as it takes."""

    method: str
    target: str
    """Path and query below the server's root, percent-encoded: ``/v1/agl/rollouts?limit=1``."""
    body: bytes | None = None
    priority: Priority = "write"
    timeout_seconds: float = 30.0
    """How long one try may take until the whole reply is there."""
    patience_seconds: float = 120.0
    """How long all tries together may take."""
    waits_while_shed: bool = True
    """Whether to wait when the circuit breaker holds it back; otherwise that is an error at once."""
    long_poll: bool = False
    """Whether the server may sit on it until something happens; then it must not use up the connections."""


class WireReply(NamedTuple):
    """What came back: any status at all."""

    status: int
    headers: Mapping[str, str]
    """By name, in any case of letters."""
    body: bytes


class Transport(Protocol):
    """Takes a request to the server and brings the reply."""

    async def send(self, request: WireRequest) -> WireReply:
        """The server's reply, whatever its status.

        Raises:
            StoreUnreachable: there was none. Whether the server did what was asked is unknown.
            RequestShed: it was held back (only between a breaker and the retries around it).
        """
        ...


class RequestShed(Exception):
    """The circuit breaker held a request back; nothing was sent. Retries turn it into ``StoreUnreachable``.

    Args:
        message: why.
        retry_after_seconds: when to ask the breaker again.
    """

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds


_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 507})


def is_transient(status: int) -> bool:
    """Whether the same request may get another answer later. 501 and 505 say that it never will."""
    return status in _TRANSIENT or (status > 507 and status < 600)
