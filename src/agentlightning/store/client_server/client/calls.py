"""Calls of the contract's methods as requests, and replies as their results, by the table of routes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlencode

import msgspec

from agentlightning.errors import NotFound
from agentlightning.store.client_server.resilience.transport import Transport, WireReply, WireRequest
from agentlightning.store.client_server.wire.codec import decode_error, decode_reply
from agentlightning.store.client_server.wire.routes import CLIENT_ROUTES, Route
from agentlightning.store.ids import IdSource

__all__ = ["Caller", "result_of"]

_encode = msgspec.json.Encoder().encode


class Caller:
    """Makes calls: an argument left out was not given, and what is missing to make a call repeatable is made up.

    Args:
        transport: sends the requests.
        prefix: of the paths, without a slash at the end.
        ids: makes ids.
        timeout_seconds: how long one try of an ordinary call may take.
        patience_seconds: how long all tries of a call may take.
    """

    def __init__(
        self, transport: Transport, prefix: str, ids: IdSource, *, timeout_seconds: float, patience_seconds: float
    ) -> None:
        self._transport = transport
        self._prefix = prefix
        self._ids = ids
        self.timeout_seconds = timeout_seconds
        self.patience_seconds = patience_seconds

    async def call(self, method: str, arguments: Mapping[str, Any], **limits: Any) -> Any:
        """The result of a method of the contract.

        Args:
            method: its name.
            arguments: those given, by name, checked already: ids are safe in a path, and values that are JSON
                already are ``msgspec.Raw``.
            limits: fields of ``WireRequest`` that are not as usual.

        Raises:
            AgentLightningError: what the method raised on the server.
            StoreUnreachable: no answer.
        """
        return result_of(CLIENT_ROUTES[method], await self.send(method, arguments, **limits))

    async def send(self, method: str, arguments: Mapping[str, Any], **limits: Any) -> WireReply:
        """The server's reply to a call, whatever its status. Arguments and errors as for ``call``."""
        route = CLIENT_ROUTES[method]
        target, body = self._encoded(route, arguments)
        request = WireRequest(route.verb, target, body, route.priority, self.timeout_seconds, self.patience_seconds)
        return await self._transport.send(request._replace(**limits) if limits else request)

    async def post(self, method: str, body: bytes, **limits: Any) -> Any:
        """As ``call``, with a body that is encoded already."""
        route = CLIENT_ROUTES[method]
        request = WireRequest(
            route.verb,
            self._prefix + route.path,
            body,
            route.priority,
            self.timeout_seconds,
            self.patience_seconds,
        )
        return result_of(route, await self._transport.send(request._replace(**limits) if limits else request))

    def mint(self, prefix: str) -> str:
        """A new id."""
        return self._ids.mint(prefix)

    def _encoded(self, route: Route, arguments: Mapping[str, Any]) -> tuple[str, bytes | None]:
        """Path and query, and the body."""
        shape = _shape_of(route)
        if shape.mints and any(name not in arguments for name in shape.mints):
            arguments = {**{name: self._ids.mint(prefix) for name, prefix in shape.mints.items()}, **arguments}
        target = self._prefix + (route.path.format_map(arguments) if shape.in_path else route.path)
        asked = {name: arguments[name] for name in shape.query if name in arguments}
        if asked:
            target = f"{target}?{urlencode(asked)}"
        if route.body_argument is not None:
            return target, bytes(arguments[route.body_argument])
        if route.body is None:
            return target, None
        return target, _encode({name: value for name, value in arguments.items() if name in shape.body})


def result_of(route: Route, reply: WireReply) -> Any:
    """What a method returns for this reply, or raises."""
    if 200 <= reply.status < 300:
        return None if route.unknown_is_none and reply.body == b"null" else decode_reply(route, reply.body)
    error = decode_error(reply.status, reply.body)
    if route.unknown_is_none and type(error) is NotFound:
        return None
    raise error


class _Shape(NamedTuple):
    """Where the arguments of a route go."""

    in_path: bool
    query: frozenset[str]
    body: frozenset[str]
    mints: Mapping[str, str]
    """Ids of the call itself; those of its items are made up where the items are encoded."""


@cache
def _shape_of(route: Route) -> _Shape:
    return _Shape(
        in_path="{" in route.path,
        query=frozenset() if route.query is None else frozenset(route.query.model_fields),
        body=frozenset()
        if route.body is None or route.body_argument is not None
        else frozenset(route.body.model_fields),
        mints={name: prefix for name, prefix in (route.mints or {}).items() if "." not in name},
    )
