"""Limits: how much a server accepts at once, what it refuses first under load, and who may send requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agentlightning.errors import InvalidValue, NotAllowed, NotAuthenticated, Overloaded
from agentlightning.http.routes import SHED_ORDER, Priority
from agentlightning.http.server.endpoints import Reply
from agentlightning.http.server.exchange import Exchange
from agentlightning.security.access import ANONYMOUS, KEY_HOLDER, AccessPolicy, AllowAll, Permission, Principal
from agentlightning.security.hosts import AllowedHosts, AllowedOrigins
from agentlightning.security.keys import ApiKey

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits on everything that clients can make a server hold in memory.

    Raises:
        InvalidValue: one of them is not positive.
    """

    connections: int = 8192
    """Open connections in all. A new one beyond is answered by 503 and closed."""
    connections_per_address: int = 4096
    """Open connections from one address."""
    header_bytes: int = 64 * 1024
    """The request line and all headers of one request."""
    header_seconds: float = 10.0
    """How long a request's headers may take to arrive; and the beginning of TLS."""
    body_bytes: int = 64 * _MIB
    """The body of one request, and what a compressed one may grow to."""
    body_seconds: float = 30.0
    """How long a request's body may take to arrive, beyond a second for every 64 KiB of it; and how long a client may
    take to read what is sent to it, likewise."""
    idle_seconds: float = 75.0
    """How long a connection may stay open between requests."""
    requests: int = 4096
    """Requests being worked on, those that wait for work or for the end of rollouts not counted."""
    in_flight_bytes: int = 256 * _MIB
    """The bodies of all requests being worked on."""
    drain_seconds: float = 10.0
    """How long requests may go on when the server stops. Those that wait are answered at once."""
    retry_after_seconds: int = 1
    """When a request that was refused because of load may be sent again."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise InvalidValue(f"{name} {value!r} is not valid; give more than 0")


_SHARES: Mapping[Priority, float] = MappingProxyType(
    {priority: 0.5 + 0.5 * place / (len(SHED_ORDER) - 1) for place, priority in enumerate(SHED_ORDER)}
)
"""The share of a limit that requests of a priority may fill: half for the first to be shed, all for the last."""


class Load:
    """The requests that a server works on now. Used by one event loop."""

    def __init__(self, limits: ServerLimits) -> None:
        self._most_requests = {each: limits.requests * share for each, share in _SHARES.items()}
        self._most_bytes = {each: limits.in_flight_bytes * share for each, share in _SHARES.items()}
        self.requests = 0
        self.bytes = 0

    def take(self, priority: Priority, size: int) -> None:
        """Begin to work on a request; ``give_back`` it.

        Raises:
            Overloaded: there is too much to do for a request of this priority.
        """
        if self.requests >= self._most_requests[priority] or self.bytes + size > self._most_bytes[priority]:
            raise Overloaded(
                f"the server works on {self.requests:,} requests of {self.bytes:,} bytes and accepts no more of "
                f"priority {priority!r} now; nothing was done, retry later"
            )
        self.requests += 1
        self.bytes += size

    def grow(self, priority: Priority, size: int) -> None:
        """Count more bytes of a request whose size was not declared. Raises as ``take``."""
        if self.bytes + size > self._most_bytes[priority]:
            raise Overloaded(f"the bodies of all requests have {self.bytes:,} bytes; retry this one later")
        self.bytes += size

    def give_back(self, size: int) -> None:
        """Count a request as done."""
        self.requests -= 1
        self.bytes -= size


# --- Who may send requests: by host name, by web page, by key --------------------------------------

_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, traceparent, x-request-id"),
    (b"access-control-max-age", b"600"),
)
_REMEMBERED = 64


class AccessControl:
    """Checks every request before anything else is done with it, also those to OTLP, metrics and health.

    Args:
        key: what a request must show; None: nothing.
        hosts: the names the server answers to.
        origins: the web pages it answers.
        policy: decides whether the caller has the permission of the route.
    """

    def __init__(
        self, key: ApiKey | None, hosts: AllowedHosts, origins: AllowedOrigins, policy: AccessPolicy | None = None
    ) -> None:
        self._key = key
        self._hosts = hosts
        self._origins = origins
        self._policy = policy or AllowAll()
        self._admitted: dict[tuple[bytes | None, bytes | None], Principal] = {}
        """Host and credentials of callers that were let in before, since comparing keys costs more than looking up."""

    def check(self, exchange: Exchange, permission: Permission | None) -> Reply | None:
        """The reply to a browser that asks what it may do (CORS preflight); None for every other request.

        Args:
            exchange: with the caller.
            permission: what the route needs; None: it is open to everybody.

        Raises:
            NotAuthenticated: the key is missing, or another.
            NotAllowed: the host name, the origin or the caller is none of those that may.
        """
        headers = exchange.headers
        host, credentials = headers.get(b"host"), headers.get(b"authorization")
        principal = self._admitted.get((host, credentials))
        if principal is None:
            principal = self._identify(host, credentials)
        if b"origin" in headers:
            preflight = self._check_origin(exchange, headers[b"origin"], host)
            if preflight is not None:
                return preflight
        if permission is None:
            return None
        if principal is ANONYMOUS and self._key is not None:
            raise NotAuthenticated(
                "this server wants an API key: send 'Authorization: Bearer KEY', or set AGL_API_KEY for our client"
            )
        self._policy.authorize(principal, permission)
        return None

    def _identify(self, host: bytes | None, credentials: bytes | None) -> Principal:
        """Who sends a request. Raises ``NotAllowed`` if the server does not answer to this host name."""
        principal = KEY_HOLDER if self._key is not None and self._key.opens(credentials) else ANONYMOUS
        if principal is ANONYMOUS and not self._hosts.allows(host):
            name = (host or b"")[:80].decode("latin-1")
            raise NotAllowed(
                f"this server does not answer to the name {name!r}; use its address, or start it with "
                "--allowed-host (it refuses unknown names because web pages can make up names for your machine)"
            )
        # Callers without the key are not remembered where there is one: made-up keys would fill the table.
        if len(self._admitted) < _REMEMBERED and (principal is KEY_HOLDER or self._key is None):
            self._admitted[host, credentials] = principal
        return principal

    def _check_origin(self, exchange: Exchange, origin: bytes, host: bytes | None) -> Reply | None:
        """Answer a web page as far as its origin is allowed."""
        if not self._origins.allows(origin, host):
            page = origin[:80].decode("latin-1")
            raise NotAllowed(f"this server does not answer web pages from {page!r}; start it with --cors-origin")
        visible = self._origins.shown_to(origin)
        if visible is not None:
            exchange.extra_headers += [(b"access-control-allow-origin", visible), (b"vary", b"origin")]
            if exchange.method == "OPTIONS" and b"access-control-request-method" in exchange.headers:
                return Reply(204, headers=_PREFLIGHT)
        return None
