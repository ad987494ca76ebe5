"""How many connections there may be, and what the arrival of a request on one of them may take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

__all__ = ["BYTES_PER_SECOND", "Bounds", "ConnectionBounds", "Doorkeeper"]

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
