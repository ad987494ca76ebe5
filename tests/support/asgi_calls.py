"""Requests to the server's ASGI application without a socket between: for very many of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from agentlightning.http.server.admin import Operations
from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.decoder import Decoder
from agentlightning.http.server.endpoints import Endpoints
from agentlightning.http.server.limits import AccessControl, Load, ServerLimits
from agentlightning.security.hosts import AllowedHosts, AllowedOrigins
from agentlightning.security.keys import ApiKey
from agentlightning.store.base import LightningStore

__all__ = ["Answer", "AsgiCalls"]


class Answer(NamedTuple):
    """A reply."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class AsgiCalls:
    """A server's application, and calls of it.

    Args:
        store: what it serves.
        key: the API key it wants.
        cors_allow_origins: web pages it answers.
        limits: bounds.
        decoder: reads large bodies; None: this process does.
    """

    def __init__(
        self,
        store: LightningStore,
        *,
        key: str | None = None,
        cors_allow_origins: str | None = None,
        limits: ServerLimits | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        limits = limits or ServerLimits()
        access = AccessControl(ApiKey(key) if key else None, AllowedHosts(), AllowedOrigins(cors_allow_origins))
        self.app = StoreApp(Endpoints(store), access, limits, decoder)
        self.app.others = Operations(store, self.app).by_path()
        self.load: Load = self.app.load

    async def call(self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        """The reply to one request; ``target``: path and query."""
        path, _, query = target.partition("?")
        given = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(body))}
        given |= headers or {}
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "surroaccesspass"),
            "query_string": query.encode("utf-8", "surroaccesspass"),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items() if value is not None],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        pending = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            return pending.pop() if pending else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        if not sent:  # it waited, and found that nobody waits for the reply
            return Answer(499, {}, b"")
        start = sent[0]
        return Answer(start["status"], dict(start["headers"]), b"".join(each.get("body", b"") for each in sent[1:]))
