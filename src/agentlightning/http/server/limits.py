"""Limits: how much a server accepts at once, what it refuses first under load, and who may send requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from agentlightning.errors import InvalidValue, NotAllowed, NotAuthenticated, Overloaded, StoreUnavailable, TooLarge
from agentlightning.http.routes import SHED_ORDER, Priority
from agentlightning.http.server.exchange import Exchange, Reply
from agentlightning.security.access import ANONYMOUS, KEY_HOLDER, AccessPolicy, Permission, Principal
from agentlightning.security.hosts import AllowedHosts, AllowedOrigins
from agentlightning.security.keys import ApiKey
from agentlightning.security.wrong_keys import WrongKeys
from agentlightning.serving.connections import ConnectionBounds

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits(ConnectionBounds):
    """Limits on everything that clients can make a server hold in memory.

    Raises:
        InvalidValue: one of them is not positive.
    """

    connections_per_address: int = 4096
    header_seconds: float = 10.0
    body_bytes: int = 64 * _MIB
    """The body of one request, and what a compressed one may grow to."""
    idle_seconds: float = 75.0
    """How long a connection may stay open between requests."""
    requests: int = 4096
    """Requests being worked on, those that wait for work or for the end of rollouts not counted."""
    in_flight_bytes: int = 256 * _MIB
    """The bodies of all requests being worked on, and of all replies that are not read yet."""
    drain_seconds: float = 10.0
    """How long requests may go on when the server stops. Those that wait are answered at once."""
    retry_after_seconds: int = 1
    """When a request that was refused because of load may be sent again."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise InvalidValue(f"{field.name} {value!r} is not valid; give more than 0")


STOPPING = "the server is stopping; retry at its successor"


class Load:
    """The requests that a server works on now. Used by one event loop."""

    def __init__(self, limits: ServerLimits) -> None:
        self.body_bytes = limits.body_bytes
        """The most bytes that the body of one request may have, unpacked."""
        # Requests of the priority that is shed first may fill half of a limit, those of the last one all of it.
        self._most: dict[Priority, tuple[float, float]] = {}
        for place, priority in enumerate(SHED_ORDER):
            share = 0.5 + 0.5 * place / (len(SHED_ORDER) - 1)
            self._most[priority] = limits.requests * share, limits.in_flight_bytes * share
        self._most_bytes = limits.in_flight_bytes
        self.requests = 0
        self.bytes = 0
        self.draining = False
        """Whether the server is about to stop, and takes no new requests."""

    @property
    def is_full(self) -> bool:
        """Whether as many bytes are held as may be."""
        return self.bytes >= self._most_bytes

    def admit(self, exchange: Exchange, priority: Priority) -> None:
        """Begin to work on a request, until ``give_back``.

        Raises:
            StoreUnavailable: the server is stopping.
            TooLarge: its body is larger than the server takes.
            Overloaded: there is too much to do for a request of this priority.
        """
        if self.draining:
            raise StoreUnavailable(STOPPING)
        size = exchange.declared_size(self.body_bytes) if exchange.body is None else len(exchange.body)
        most_requests, most_bytes = self._most[priority]
        if self.requests >= most_requests or self.bytes + size > most_bytes:
            raise Overloaded(
                f"the server works on {self.requests:,} requests of {self.bytes:,} bytes and accepts no more of "
                f"priority {priority!r} now; nothing was done, retry later"
            )
        exchange.priority, exchange.held, exchange.is_counted = priority, size, True
        self.requests += 1
        self.bytes += size

    async def body_of(self, exchange: Exchange) -> list[bytes]:
        """The body of a request that was admitted, in parts. Raises as ``admit``, and as ``Exchange.body_parts``."""
        parts: list[bytes] = []
        size = 0
        async for part in exchange.body_parts():
            size += len(part)
            if size > self.body_bytes:
                exchange.close_after()
                raise TooLarge(f"the body has more than {self.body_bytes:,} bytes; send less at a time")
            self.grow(exchange, size)
            parts.append(part)
        return parts

    def grow(self, exchange: Exchange, size: int) -> None:
        """Count a request that was admitted with ``size`` bytes, if that is more than it had. Raises as ``admit``."""
        more = size - exchange.held
        if more <= 0:
            return
        if self.bytes + more > self._most[exchange.priority][1]:
            raise Overloaded(f"the bodies of all requests have {self.bytes:,} bytes; retry this one later")
        self.bytes += more
        exchange.held = size

    def wait(self, exchange: Exchange, size: int) -> None:
        """Count a request that waits for something to happen only by the bytes that it keeps. Raises as ``grow``."""
        self.grow(exchange, size)
        self.give_back(exchange)
        self.bytes += size
        exchange.held = size

    def reply(self, exchange: Exchange, size: int) -> None:
        """Count a reply, which has so many bytes, until ``give_back``.

        Raises:
            StoreUnavailable: too many bytes of replies wait to be read.
        """
        if self.bytes + size > self._most_bytes:
            raise StoreUnavailable(
                f"{self.bytes:,} bytes of requests and replies are held, and there is no room for this reply of "
                f"{size:,}; what was asked for is done: send the same request again to have the reply"
            )
        self.bytes += size
        exchange.held += size

    def give_back(self, exchange: Exchange) -> None:
        """Count a request as done. Idempotent."""
        if exchange.is_counted:
            self.requests -= 1
            exchange.is_counted = False
        self.bytes -= exchange.held
        exchange.held = 0


# --- Who may send requests: by host name, by web page, by key --------------------------------------

_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, traceparent, x-request-id"),
    (b"access-control-max-age", b"600"),
)
_OTHER_SITES = (b"cross-site", b"same-site")
"""Values of ``Sec-Fetch-Site`` (W3C, "Fetch Metadata Request Headers"): a browser sends no ``Origin`` for an image or a
link, which would start work all the same. Other ports of one host are the same site, and not to be trusted either."""
_REMEMBERED = 64


def _at(principal: Principal, exchange: Exchange) -> Principal:
    return principal if exchange.client is None else principal._replace(address=exchange.client[0])


class AccessControl:
    """Checks every request before anything else is done with it, also those to OTLP, metrics and health.

    Args:
        key: what a request must show; None: nothing.
        hosts: the names the server answers to.
        origins: the web pages it answers.
        policy: decides whether the caller has the permission of the route; None: it always has.
    """

    def __init__(
        self, key: ApiKey | None, hosts: AllowedHosts, origins: AllowedOrigins, policy: AccessPolicy | None = None
    ) -> None:
        self._key = key
        self._hosts = hosts
        self._origins = origins
        self._policy = policy
        self._wrong_keys = WrongKeys()
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
        elif permission is not None and headers.get(b"sec-fetch-site") in _OTHER_SITES:
            raise NotAllowed(
                "this server does not answer what a page of another site starts without an Origin header; "
                "use a program, or CORS requests from a page that --cors-origin lists"
            )
        if permission is None:
            return None
        if principal is ANONYMOUS and self._key is not None:
            raise NotAuthenticated(
                "this server wants an API key: send 'Authorization: Bearer KEY', or set AGL_API_KEY for our client"
            )
        if self._policy is not None:
            self._policy.authorize(_at(principal, exchange), permission)
        return None

    def is_guessing(self, exchange: Exchange) -> bool:
        """Note a caller who was refused because of its key; returns whether its address has sent many wrong ones."""
        if exchange.headers.get(b"authorization") is None:
            return False
        return self._wrong_keys.note(str(exchange.client[0]) if exchange.client else "unknown", time.monotonic())

    def refusal(self, exchange: Exchange, permission: Permission) -> str | None:
        """Why the policy refuses a permission to a caller who was let in; None: it does not."""
        try:
            if self._policy is not None:
                headers = exchange.headers
                principal = self._identify(headers.get(b"host"), headers.get(b"authorization"))
                self._policy.authorize(_at(principal, exchange), permission)
        except NotAllowed as error:
            return error.message
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
            exchange.extra_headers = (
                *exchange.extra_headers,
                (b"access-control-allow-origin", visible),
                (b"vary", b"origin"),
            )
            if exchange.method == "OPTIONS" and b"access-control-request-method" in exchange.headers:
                return Reply(204, headers=_PREFLIGHT)
        return None
