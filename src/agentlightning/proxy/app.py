"""The routes of the proxy, and who may use them: those of each wire, at the root and below each attempt; control."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from agentlightning.errors import InvalidId, InvalidValue, NotAllowed
from agentlightning.proxy.admission import HOLD_SECONDS, RETRY_AFTER_SECONDS
from agentlightning.proxy.calls import error_reply, handle_model_call, ids_of, read_origin
from agentlightning.proxy.counting import count_tokens
from agentlightning.proxy.dialects import DEFAULT_DIALECT, DIALECTS, WireDialect
from agentlightning.proxy.dialects.base import Lookup, ProxyError
from agentlightning.proxy.recording import CallOrigin
from agentlightning.proxy.sampling import check_sampling
from agentlightning.proxy.session import ProxySession
from agentlightning.security.access import ANONYMOUS, AccessPolicy, AllowAll, Permission, Principal
from agentlightning.security.hosts import AllowedHosts
from agentlightning.security.keys import ApiKey
from agentlightning.store.validation import check_id
from agentlightning.types.endpoints import KEY_PATH

_PREFIX = re.compile(r"(?:/rollout/(?P<rollout_id>[^/]*)/attempt/(?P<attempt_id>[^/]*))?(?:/v1(?:beta)?)*(?P<rest>/.*)")
"""Clients have ``/v1`` in their base URL, or not, and some add it once more; Google's say ``/v1beta``."""

_GROUP = re.compile(r"\(\?P<(\w+)>[^)]*\)")
"""A parameter of a path."""

_KEY = re.compile(rf"{KEY_PATH}(?P<key>[^/]+)(?P<rest>/.*)")
"""A proxy that made its key has it in the endpoint, for agents that send a key of their own."""

_FIELD = re.compile(r"`\$\.(\w+)")
"""Where msgspec's error messages say which field is wrong."""

_AGENT, _OPERATOR = Principal("agent"), Principal("control")
"""The callers that a key tells apart."""

_KEY_HEADERS = ("x-api-key", "x-goog-api-key", "api-key")
"""Where Anthropic's, Google's and Azure's clients show their key."""

_SHOWN = "agl.key"
"""Where the key of the endpoint is in a request's scope. It is no part of the path any more, which may be recorded."""

_MISTAKES = frozenset({401, 404, 405})
"""Statuses of requests with a wrong key, path or method. What a policy forbids (403) leaves no trace in the store."""

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
_T = TypeVar("_T")


class ProxyAccess:
    """Decides whether a request may use a route. Every route of the proxy passes here, and only here.

    Args:
        api_key: what agents must show as bearer token; None: agents need none, but web pages are kept out.
        control_key: what algorithms must show; None: there are no control routes.
        policy: decides what a caller with the right key may do.
    """

    def __init__(
        self, api_key: ApiKey | None, control_key: ApiKey | None = None, policy: AccessPolicy | None = None
    ) -> None:
        self._api_key = api_key
        self._control_key = control_key
        self._policy = policy or AllowAll()
        self._hosts = AllowedHosts()

    @property
    def has_control(self) -> bool:
        """Whether there are control routes."""
        return self._control_key is not None

    def authorize(self, request: Request, permission: Permission | None) -> None:
        """Check that a request has the permission of its route.

        Args:
            permission: ``run`` for model calls and the model list, ``operate`` for control; None: open to everybody.

        Raises:
            ProxyError: 401 without the right key; 403 for a web page, if there is no key, and for a caller that the
                policy does not allow it.
        """
        if permission is None:
            return
        try:
            self._policy.authorize(self._identify(request, permission), permission)
        except NotAllowed as error:
            raise ProxyError(403, "not_allowed", error.message) from error

    def _identify(self, request: Request, permission: Permission) -> Principal:
        headers = request.headers
        if permission == "operate":
            if self._control_key is None or not self._control_key.opens(_encoded(headers.get("authorization"))):
                raise ProxyError(401, "invalid_control_key", "The control key is missing or wrong.")
            return _OPERATOR
        if self._api_key is not None:
            if not any(map(self._api_key.opens, _shown_keys(request))):
                why = "The proxy's API key is missing or wrong; use the api_key of the LLM resource."
                raise ProxyError(401, "invalid_api_key", why)
            return _AGENT
        if "origin" in headers or not self._hosts.allows(_encoded(headers.get("host"))):
            # Any web page that the user opens can send requests to this machine. Browsers add Origin to them, and
            # a page whose own name resolves to this machine (DNS rebinding) sends that name as Host.
            why = "A proxy without a key answers programs on this machine only, and no web pages; give it an api_key."
            raise ProxyError(403, "forbidden_origin", why)
        return ANONYMOUS


def _encoded(value: str | None) -> bytes | None:
    return None if value is None else value.encode("latin-1")


def _shown_keys(request: Request) -> list[bytes]:
    """Return the keys that a request shows, each as the value of ``Authorization``: clients of each vendor have a
    place of their own, and Google's may have the key in the URL; so may the endpoint."""
    headers = request.headers
    keys = [headers.get(name) for name in _KEY_HEADERS] + [request.query_params.get("key")]
    keys.append(request.scope.get(_SHOWN))
    shown = [b"Bearer " + key.encode("latin-1", "replace") for key in keys if key]
    return [headers["authorization"].encode("latin-1"), *shown] if "authorization" in headers else shown


async def _look_up(lookup: Lookup, request: Request) -> dict[str, Any]:
    return lookup.answer(request.path_params | ids_of(read_origin(request)))


class _PauseOptions(msgspec.Struct):
    """The body of ``POST /control/pause``."""

    retry_after_seconds: _Seconds = RETRY_AFTER_SECONDS
    hold_seconds: _Seconds = HOLD_SECONDS
    timeout_seconds: _Seconds | None = None


class _VersionOfModel(msgspec.Struct):
    """The body of ``POST /control/model_version``."""

    version: Annotated[str, msgspec.Meta(max_length=256)]
    model: str = ""


class _SamplingOfModel(msgspec.Struct):
    """The body of ``POST /control/sampling``."""

    parameters: dict[str, float | None]
    model: str = ""


class _Route(NamedTuple):
    """One route. Those with the permission ``run`` also answer below ``/v1`` and below an attempt."""

    method: str
    path: re.Pattern[str]
    """Its named groups are parameters of the path."""
    permission: Permission | None
    """What a request needs before it is answered; None: it is open to everybody."""
    answer: Callable[[Request], Awaitable[dict[str, Any]]] | None
    """None: it takes model calls."""
    dialect: WireDialect | None = None
    """Gives errors their shape; None: the wire that the client speaks."""


class ProxyApp:
    """The ASGI application of a proxy.

    It dispatches by itself instead of through a web framework, which would take as long for each call as the rest
    of the proxy's own work, and needs more memory for each stream that is open.
    """

    def __init__(self, session: ProxySession, access: ProxyAccess) -> None:
        self._session = session
        self._access = access
        self._dialects = [kind() for kind in DIALECTS]
        self._routes = [
            _Route("POST", re.compile(path), "run", None, dialect)
            for dialect in self._dialects
            for path in dialect.paths
        ]
        self._routes += [
            _Route(each.method, re.compile(each.path), "run", partial(_look_up, each), dialect)
            for dialect in self._dialects
            for each in dialect.lookups()
        ]
        self._routes += [
            _Route("POST", re.compile(path), "run", partial(count_tokens, session, dialect), dialect)
            for dialect in self._dialects
            for path in dialect.count_paths
        ]
        self._routes += [
            _Route("GET", re.compile("/models"), "run", self._list_models),
            _Route("GET", re.compile("/models/(?P<model>.+)"), "run", self._show_model),
            _Route("GET", re.compile("/health"), None, self._show_health),
        ]
        if access.has_control:
            self._routes += [
                _Route("POST", re.compile("/control/pause"), "operate", self._pause),
                _Route("POST", re.compile("/control/resume"), "operate", self._resume),
                _Route("POST", re.compile("/control/model_version"), "operate", self._set_model_version),
                _Route("POST", re.compile("/control/sampling"), "operate", self._impose_sampling),
            ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        found = _KEY.fullmatch(scope["path"])
        if found is not None:
            scope[_SHOWN], scope["path"] = found.groups()
            scope.pop("raw_path", None)
        request = Request(scope, receive)
        dialect = self._wire_of(request.headers)
        try:
            if request.headers.get("upgrade", "").lower() == "websocket":
                # Codex asks for one first, and posts at once after this status; after others it asks again for seconds.
                raise ProxyError(426, "no_websockets", "The proxy has no WebSockets; send the request by POST.")
            route, scope["path_params"] = self._find(scope["method"], scope["path"])
            dialect = route.dialect or dialect
            self._access.authorize(request, route.permission)
            if route.answer is None:
                assert route.dialect is not None
                await handle_model_call(self._session, route.dialect, request, send)
            else:
                await JSONResponse(await route.answer(request))(scope, receive, send)
        except ProxyError as error:
            await self._note_refusal(request, error)
            for message in error_reply(dialect, error):
                await send(message)

    def _wire_of(self, headers: Headers) -> WireDialect:
        """Return the wire that a request's client speaks, as far as its headers tell."""
        found = (dialect for dialect in self._dialects if any(name in headers for name in dialect.client_headers))
        return next(found, DEFAULT_DIALECT)

    async def _note_refusal(self, request: Request, error: ProxyError) -> None:
        """Record a request below an attempt's URL that nothing here answers: its agent is set up wrongly. That the
        proxy is paused or busy is no mistake of the agent's."""
        path = request.scope["path"]
        found = _PREFIX.fullmatch(path)
        if error.status not in _MISTAKES or found is None or found["rollout_id"] is None:
            return
        try:
            origin = CallOrigin(check_id(found["rollout_id"], "rollout"), check_id(found["attempt_id"], "attempt"))
        except InvalidId:
            return
        await self._session.refuse(origin, request.method, path, error)

    def _find(self, method: str, path: str) -> tuple[_Route, dict[str, str]]:
        """Return the route of a request, and the parameters of its path."""
        found = _PREFIX.fullmatch(path)
        prefix_params = {} if found is None else {name: text for name, text in found.groupdict().items() if text}
        rest = prefix_params.pop("rest", "")
        exists = False
        for route in self._routes:
            match = route.path.fullmatch(rest if route.permission == "run" else path)
            if match is not None:
                exists = True
                if route.method == method:
                    return route, prefix_params | match.groupdict()
        paths = (path for dialect in self._dialects for path in dialect.paths)
        wires = ", ".join(f"POST /v1{_GROUP.sub(lambda group: group[1].upper(), path)}" for path in paths)
        raise ProxyError(
            405 if exists else 404,
            "wrong_method" if exists else "unknown_url",
            f"There is no {method} {path} here; the proxy serves {wires} and GET /v1/models, also below "
            "/rollout/ROLLOUT_ID/attempt/ATTEMPT_ID.",
        )

    # --- What answers requests that are no model calls ---

    async def _list_models(self, request: Request) -> dict[str, Any]:
        return self._wire_of(request.headers).model_list(self._session.upstream.routing.models())

    async def _show_model(self, request: Request) -> dict[str, Any]:
        wire = self._wire_of(request.headers)
        backend, *_ = self._session.upstream.routing.order(wire.model_name(request.path_params), None)
        return wire.model(backend.model_name)

    async def _show_health(self, request: Request) -> dict[str, Any]:
        return {
            "status": "paused" if self._session.admission.is_paused else "ok",
            "calls_in_flight": self._session.admission.in_flight,
            "calls_held": self._session.admission.held,
            "spans_waiting": self._session.spans_waiting,
            "spans_lost": self._session.spans_lost,
            "calls_unusable": dict(self._session.unusable),
            "requests_refused": self._session.refused,
        }

    async def _pause(self, request: Request) -> dict[str, Any]:
        """As ``LLMProxy.pause``: answers when calls in flight have ended, or the time is up."""
        options = _read_options(await request.body() or b"{}", _PauseOptions)
        return {"calls_in_flight": await self._session.admission.pause(*msgspec.structs.astuple(options))}

    async def _resume(self, request: Request) -> dict[str, Any]:
        await self._session.admission.resume()
        return {"calls_in_flight": self._session.admission.in_flight}

    async def _set_model_version(self, request: Request) -> dict[str, Any]:
        given = _read_options(await request.body(), _VersionOfModel)
        self._session.versions[given.model] = given.version
        return dict(self._session.versions)

    async def _impose_sampling(self, request: Request) -> dict[str, Any]:
        given = _read_options(await request.body(), _SamplingOfModel)
        try:
            self._session.imposed[given.model] = check_sampling(given.parameters)
        except InvalidValue as error:
            raise ProxyError(422, "invalid_value", error.message, param="parameters") from error
        return dict(self._session.imposed)


def _read_options(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        field = _FIELD.search(str(error))
        raise ProxyError(422, "invalid_value", f"{error}.", param=None if field is None else field[1]) from error
