"""The routes of the proxy: those of each wire, at the root and below each attempt; health; and control."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from agentlightning.proxy.calls import error_reply, handle_model_call
from agentlightning.proxy.dialects import DEFAULT_DIALECT, DIALECTS, WireDialect
from agentlightning.proxy.errors import ProxyError
from agentlightning.proxy.session import ProxySession
from agentlightning.security.access import Permission

_PREFIX = re.compile(r"(?:/rollout/(?P<rollout_id>[^/]*)/attempt/(?P<attempt_id>[^/]*))?(?:/v1)?(?P<rest>/.*)")
"""Clients have ``/v1`` in their base URL, or not."""

_FIELD = re.compile(r"`\$\.(\w+)")
"""Where msgspec's error messages say which field is wrong."""

_Handler: TypeAlias = Callable[[Request, Send, Mapping[str, str]], Awaitable[None]]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
_T = TypeVar("_T")


class ProxyRoute(NamedTuple):
    """One route.

    Attributes:
        method: of HTTP.
        path: a regular expression; its named groups are handed to the handler.
        below_prefixes: whether the path also answers below ``/v1`` and below an attempt.
        permission: what a request needs before the handler runs; None: it is open to everybody.
        dialect: gives errors their shape.
    """

    method: str
    path: re.Pattern[str]
    below_prefixes: bool
    permission: Permission | None
    dialect: WireDialect
    handler: _Handler


class ProxyApp:
    """The ASGI application of a proxy.

    It dispatches by itself instead of through a web framework, which would take as long for each call as the rest
    of the proxy's own work, and needs more memory for each stream that is open.

    Args:
        session: what all calls share.
        has_control: whether there are control routes.
    """

    def __init__(self, session: ProxySession, *, has_control: bool) -> None:
        self._session = session
        self._routes = [
            ProxyRoute("POST", re.compile(path), True, "run", dialect, partial(handle_model_call, session, dialect))
            for dialect in DIALECTS
            for path in dialect.paths
        ]
        self._routes += [
            ProxyRoute(method, re.compile(path), permission == "run", permission, DEFAULT_DIALECT, handler)
            for method, path, permission, answer in _ANSWERS
            if has_control or permission != "operate"
            for handler in [partial(_send_answer, session, answer)]
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        dialect = DEFAULT_DIALECT
        try:
            route, path_params = self._find(scope["method"], scope["path"])
            dialect = route.dialect
            self._session.access.authorize(request.headers, route.permission)
            await route.handler(request, send, path_params)
        except ProxyError as error:
            for message in error_reply(dialect, error):
                await send(message)

    def _find(self, method: str, path: str) -> tuple[ProxyRoute, dict[str, str]]:
        found = _PREFIX.fullmatch(path)
        prefix_params = {} if found is None else {name: text for name, text in found.groupdict().items() if text}
        rest = prefix_params.pop("rest", "")
        exists = False
        for route in self._routes:
            match = route.path.fullmatch(rest if route.below_prefixes else path)
            if match is not None:
                exists = True
                if route.method == method:
                    return route, prefix_params | match.groupdict()
        wires = ", ".join(f"POST /v1{path}" for dialect in DIALECTS for path in dialect.paths)
        raise ProxyError(
            405 if exists else 404,
            "wrong_method" if exists else "unknown_url",
            f"There is no {method} {path} here; the proxy serves {wires} and GET /v1/models, also below "
            "/rollout/ROLLOUT_ID/attempt/ATTEMPT_ID.",
        )


_Answer: TypeAlias = Callable[[ProxySession, Request, Mapping[str, str]], Awaitable[dict[str, Any]]]
"""Answers a request that is no model call; gets the parameters of its path."""


async def _send_answer(
    session: ProxySession, answer: _Answer, request: Request, send: Send, path_params: Mapping[str, str]
) -> None:
    shown = await answer(session, request, path_params)
    await JSONResponse(shown)(request.scope, request.receive, send)


async def _list_models(session: ProxySession, request: Request, path_params: Mapping[str, str]) -> dict[str, Any]:
    return DEFAULT_DIALECT.model_list(session.routing.models())


async def _show_model(session: ProxySession, request: Request, path_params: Mapping[str, str]) -> dict[str, Any]:
    return DEFAULT_DIALECT.model(session.routing.order(path_params["model"], None)[0].model_name)


async def _show_health(session: ProxySession, request: Request, path_params: Mapping[str, str]) -> dict[str, Any]:
    return {
        "status": "paused" if session.admission.is_paused else "ok",
        "calls_in_flight": session.admission.in_flight,
        "spans_waiting": session.delivery.waiting,
        "spans_lost": session.delivery.lost,
    }


class _PauseOptions(msgspec.Struct):
    """The body of ``POST /control/pause``."""

    retry_after_seconds: _Seconds = 1.0
    hold_seconds: _Seconds = 0.0
    timeout_seconds: _Seconds | None = None


class _VersionOfModel(msgspec.Struct):
    """The body of ``POST /control/model_version``."""

    version: Annotated[str, msgspec.Meta(max_length=256)]
    model: str = ""


async def _pause(session: ProxySession, request: Request, path_params: Mapping[str, str]) -> dict[str, Any]:
    """As ``LLMProxy.pause``: answers when calls in flight have ended, or the time is up."""
    options = _read_options(await request.body() or b"{}", _PauseOptions)
    return {"calls_in_flight": await session.admission.pause(*msgspec.structs.astuple(options))}


async def _resume(session: ProxySession, request: Request, path_params: Mapping[str, str]) -> dict[str, Any]:
    """As ``LLMProxy.resume``."""
    await session.admission.resume()
    return {"calls_in_flight": session.admission.in_flight}


async def _set_model_version(session: ProxySession, request: Request, path_params: Mapping[str, str]) -> dict[str, Any]:
    """As ``LLMProxy.set_model_version``."""
    given = _read_options(await request.body(), _VersionOfModel)
    session.versions[given.model] = given.version
    return dict(session.versions)


def _read_options(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        field = _FIELD.search(str(error))
        raise ProxyError(422, "invalid_value", f"{error}.", param=None if field is None else field[1]) from error


_ANSWERS: tuple[tuple[str, str, Permission | None, _Answer], ...] = (
    ("GET", "/models", "run", _list_models),
    ("GET", "/models/(?P<model>.+)", "run", _show_model),
    ("GET", "/health", None, _show_health),
    ("POST", "/control/pause", "operate", _pause),
    ("POST", "/control/resume", "operate", _resume),
    ("POST", "/control/model_version", "operate", _set_model_version),
)
"""The routes that are no model calls: method, path, permission, and what answers them."""
