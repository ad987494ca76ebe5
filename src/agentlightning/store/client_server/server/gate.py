"""Who may send requests: by host name, by web page, by key."""

from __future__ import annotations

from collections.abc import Collection

from agentlightning.errors import NotAllowed, NotAuthenticated
from agentlightning.security.hosts import AllowedHosts, AllowedOrigins
from agentlightning.security.keys import ApiKey
from agentlightning.store.client_server.server.answering import Reply
from agentlightning.store.client_server.server.exchange import Exchange

__all__ = ["OPEN_PATHS", "Gate"]

OPEN_PATHS = frozenset(
    f"{prefix}/health{which}" for prefix in ("/agl/v1", "/v1/agl") for which in ("", "/live", "/ready")
)
"""Paths that need no key: they say nothing but that there is a server, to probes that have none."""
_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, traceparent, x-request-id"),
    (b"access-control-max-age", b"600"),
)


class Gate:
    """Lets requests through, or refuses them.

    Args:
        key: what a request must show; None: nothing.
        hosts: the names the server answers to.
        origins: the web pages it answers.
        open_paths: paths for which no key is needed.
    """

    def __init__(
        self,
        key: ApiKey | None,
        hosts: AllowedHosts,
        origins: AllowedOrigins,
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._key = key
        self._hosts = hosts
        self._origins = origins
        self._open_paths = open_paths

    def check(self, exchange: Exchange) -> Reply | None:
        """The reply to a browser that asks what it may do (CORS preflight); None for every other request.

        Raises:
            NotAuthenticated: the key is missing, or another.
            NotAllowed: the host name or the origin is none of those that may be.
        """
        headers = exchange.headers
        host = headers.get(b"host")
        shown = self._key is not None and self._key.opens(headers.get(b"authorization"))
        if not shown and not self._hosts.allows(host):
            name = (host or b"")[:80].decode("latin-1")
            raise NotAllowed(
                f"this server does not answer to the name {name!r}; use its address, or start it with "
                "--allowed-host (it refuses unknown names because web pages can make up names for your machine)"
            )
        origin = headers.get(b"origin")
        if origin is not None:
            if not self._origins.allows(origin, host):
                page = origin[:80].decode("latin-1")
                raise NotAllowed(f"this server does not answer web pages from {page!r}; start it with --cors-origin")
            visible = self._origins.shown_to(origin)
            if visible is not None:
                exchange.extra_headers += [(b"access-control-allow-origin", visible), (b"vary", b"origin")]
                if exchange.method == "OPTIONS" and b"access-control-request-method" in headers:
                    return Reply(204, headers=_PREFLIGHT)
        if self._key is not None and not shown and exchange.path not in self._open_paths:
            raise NotAuthenticated(
                "this server wants an API key: send 'Authorization: Bearer KEY', or set AGL_API_KEY for our client"
            )
        return None
