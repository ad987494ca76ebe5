"""From the parts of a request to a call of the store, and from its result to a reply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from time import monotonic
from typing import Any, NamedTuple, cast, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidId, InvalidValue, NotFound, NotJson
from agentlightning.http.codec import decode_strict, encode_json_value, encode_page_parts, encode_result
from agentlightning.http.routes import CLIENT_ROUTES, Route
from agentlightning.http.server.matching import Bound
from agentlightning.http.server.span_intake import draft_of_span, drafts_of_spans, plain_drafts_of
from agentlightning.http.signatures import arguments_of
from agentlightning.store.base import LightningStore, sequence_ids_of
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.span_json import span_json
from agentlightning.types import PaginatedResult, Span

DIRECTIVE_HEADER = b"agl-directive"
"""In the reply to a claim of a worker that has been asked to drain or to stop: which of the two."""
_STREAMED_ITEMS = 512
_MESSAGE_BYTES = 300
_PLACES_SHOWN = 10
_INTEGER = re.compile(r"-?[0-9]{1,40}")


class Reply(NamedTuple):
    """What goes back."""

    status: int
    body: bytes = b""
    headers: Sequence[tuple[bytes, bytes]] = ()
    parts: Iterable[bytes] | None = None
    """The body in parts, where it is large."""
    content_type: bytes = b"application/json"


class InvalidRequest(Exception):
    """A body or a query that is not as the route wants it.

    Args:
        error: what is raised on the other side.
        places: where it is not, and why.
    """

    def __init__(self, error: InvalidValue, places: list[dict[str, Any]]) -> None:
        super().__init__(error.message)
        self.error = error
        self.places = places


class Endpoint:
    """Answers one route below one prefix: takes a request apart, and makes a reply of what the store returns.

    Args:
        bound: the route.
        store: the store, in the form that is served.
        gives_json: whether its methods return records as JSON, and take encoded spans.
    """

    def __init__(self, bound: Bound, store: Any, *, gives_json: bool) -> None:
        self.bound = bound
        self._route = route = bound.route
        self._store = store
        self._gives_json = gives_json
        self._takes_drafts = gives_json and route.method in _SPAN_METHODS
        self._has_body = route.body is not None
        self._has_query = route.query is not None

    def arguments(self, values: Sequence[str], query: bytes, raw: bytes) -> dict[str, Any]:
        """The arguments of the store's method.

        Args:
            values: the arguments in the path.
            query: the query string.
            raw: the body.

        Raises:
            InvalidRequest: an argument is missing, or is not valid.
            NotJson, TooLarge: the body is not strict JSON.
        """
        route = self._route
        arguments: dict[str, Any] = dict(zip(self.bound.names, values, strict=True))
        if self._has_query:
            arguments |= _from_query(route, query)
        if self._has_body and (raw or not route.body_optional):
            try:
                if self._takes_drafts:
                    _SPAN_METHODS[route.method](raw, arguments)
                else:
                    arguments |= _from_body(route, raw)
            except ValidationError as error:
                raise _invalid(error, "body") from error
        if self.bound.dialect.empty_limit_is_empty and route.method == "dequeue_many_rollouts":
            arguments["limit"] = max(arguments.get("limit", 1), 0)
        return arguments

    def waits(self, arguments: dict[str, Any]) -> bool:
        """Whether a call with these arguments may wait for something to happen in the store."""
        name = self._route.wait_argument
        if name is None:
            return False
        seconds = arguments.get(name, arguments_of(self._route.method)[name].default)
        return seconds is None or seconds > 0

    async def answer(self, arguments: dict[str, Any]) -> Reply:
        """Call the store. Raises what its method does."""
        route = self._route
        method = route.method
        if method == "dequeue_many_rollouts":
            return await self._claim(arguments)
        if self._takes_drafts and method != "finish_attempt":
            issued = await self._store.add_span_drafts(arguments["spans"])
            return Reply(route.status, self._encode_issued(arguments["spans"], issued))
        result = await getattr(self._store, method)(**arguments)
        if result is None and route.unknown_is_none:
            return self._unknown(arguments)
        if route.sends_sequence_ids:
            result = sequence_ids_of(arguments["spans"], cast("Sequence[Span]", result))
        if isinstance(result, PaginatedResult):
            page = cast("PaginatedResult[Any]", result)
            if len(page.items) > _STREAMED_ITEMS:
                return Reply(route.status, parts=encode_page_parts(page))
        return Reply(route.status, encode_result(route, result))

    def _unknown(self, arguments: dict[str, Any]) -> Reply:
        """The answer about an id that the store does not know."""
        if self.bound.dialect.unknown_is_null:
            return Reply(200, b"null")
        [name] = self.bound.names
        raise NotFound(f"there is no {name.removesuffix('_id')} {arguments[name]!r} in this store")

    def _encode_issued(self, drafts: Sequence[SpanDraft], issued: Sequence[int]) -> bytes:
        """The reply to spans that were stored: their sequence ids, or the one span as it is stored now."""
        if self._route.sends_sequence_ids:
            return b'{"sequence_ids":%b}' % encode_json_value(issued)
        if not issued[0]:
            return b"null"
        [draft] = drafts
        return span_json(draft.rollout_id, draft.attempt_id, issued[0], draft.body)

    async def _claim(self, arguments: dict[str, Any]) -> Reply:
        """Claim; the reply to an empty claim says what its worker is asked to do."""
        route = self._route
        if arguments.get("limit") == 0 and self.bound.dialect.empty_limit_is_empty:
            return Reply(route.status, b"[]")
        began = monotonic()
        claimed = await self._store.dequeue_many_rollouts(**arguments)
        worker_id = arguments.get("worker_id")
        # A worker that is asked to drain or stop is answered before its time is up, so only then it is looked up.
        has_waited = 0 < arguments.get("wait_seconds", 0) <= monotonic() - began
        if claimed or worker_id is None or has_waited:
            return Reply(route.status, encode_result(route, claimed))
        worker = await self._store.get_worker_by_id(worker_id)
        directive = _directive_of(worker)
        headers = () if directive is None else ((DIRECTIVE_HEADER, directive.encode()),)
        return Reply(route.status, b"[]", headers)


class Endpoints(dict[Bound, Endpoint]):
    """The endpoints of a store, by route and prefix; each is made when it is first needed.

    Args:
        store: any store. One that has a form which gives and takes JSON is used in that form.
    """

    def __init__(self, store: LightningStore) -> None:
        super().__init__()
        in_json = store.answering_in_json()
        self._store: Any = store if in_json is None else in_json
        self._gives_json = in_json is not None

    def __missing__(self, bound: Bound) -> Endpoint:
        made = self[bound] = Endpoint(bound, self._store, gives_json=self._gives_json)
        return made


def _directive_of(worker: Any) -> str | None:
    if isinstance(worker, bytes):
        return msgspec.json.decode(worker, type=_Directed).directive
    return None if worker is None else worker.directive


class _Directed(msgspec.Struct):
    """What interests here of a worker's JSON."""

    directive: str | None = None


# --- Arguments -------------------------------------------------------------------------------------


def _from_body(route: Route, raw: bytes) -> dict[str, Any]:
    body = _body_adapter(route).validate_python(decode_strict(raw))
    if route.body_argument is not None:
        return {route.body_argument: body}
    values = body.__dict__
    return {name: values[name] for name in body.__pydantic_fields_set__ if name in values}


def _from_query(route: Route, query: bytes) -> dict[str, Any]:
    model, lists, integers = cast(Any, route.query), _fields_of(route, list), _fields_of(route, int)
    given: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=20_000)
    except ValueError as error:  # UnicodeDecodeError too
        raise InvalidValue(f"the query string is not URL-encoded UTF-8: {error}") from error
    for name, value in pairs:
        if name in lists:
            given.setdefault(name, []).append(value)
        elif name in given:
            raise InvalidValue(f"{name[:80]!r} is given twice in the query string; give it once")
        else:
            given[name] = int(value) if name in integers and _INTEGER.fullmatch(value) else value
    try:
        asked = model.model_validate(given)
    except ValidationError as error:
        raise _invalid(error, "query") from error
    return {name: getattr(asked, name) for name in asked.model_fields_set}


def _one_span(raw: bytes, arguments: dict[str, Any]) -> None:
    arguments["spans"] = [draft_of_span(raw)]


def _many_spans(raw: bytes, arguments: dict[str, Any]) -> None:
    arguments["spans"] = drafts_of_spans(raw)


def _last_spans(raw: bytes, arguments: dict[str, Any]) -> None:
    """The arguments of ``finish_attempt``, whose spans stay bytes if all of them are plain."""
    decoded = decode_strict(raw)
    drafts: list[SpanDraft] | None = None
    if isinstance(decoded, dict) and "spans" in decoded:
        fields = cast("dict[str, Any]", decoded)
        drafts = plain_drafts_of(fields["spans"])
        if drafts is not None:
            del fields["spans"]
    body = _body_adapter(CLIENT_ROUTES["finish_attempt"]).validate_python(decoded)
    arguments |= {name: getattr(body, name) for name in body.model_fields_set}
    if drafts:
        arguments["spans"] = drafts


_SPAN_METHODS: Mapping[str, Callable[[bytes, dict[str, Any]], None]] = {
    "add_span": _one_span,
    "add_many_spans": _many_spans,
    "finish_attempt": _last_spans,
}
"""How the bodies with spans are read for a store that keeps spans as bytes."""


# --- What is not valid -----------------------------------------------------------------------------

_KINDS: Mapping[str, type[InvalidValue]] = {
    "rollout_id": InvalidId,
    "attempt_id": InvalidId,
    "worker_id": InvalidId,
    "resources_id": InvalidId,
    "request_id": InvalidId,
    "span_id": InvalidId,
    "attempt_ids": InvalidId,
    "worker_ids": InvalidId,
    "metadata": NotJson,
    "heartbeat_stats": NotJson,
    "registration": NotJson,
}
"""What is wrong with a field of a wrong type, where it is more than a bad value."""


def _invalid(error: ValidationError, where: str) -> InvalidRequest:
    """What pydantic found, in our words: the first of it as the message, up to ten as a list."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    places = [
        {"loc": [where, *each["loc"]], "msg": each["msg"][:_MESSAGE_BYTES], "type": each["type"]}
        for each in found[:_PLACES_SHOWN]
    ]
    first = found[0]
    path = ".".join(str(part)[:80] for part in first["loc"])
    kind = next((_KINDS[part] for part in reversed(first["loc"]) if isinstance(part, str) and part in _KINDS), None)
    if kind is NotJson and (first["type"] in ("missing",) or _is_null(error)):
        kind = None
    message = f"{path or 'the ' + where} is not valid: {first['msg'][:_MESSAGE_BYTES]}"
    return InvalidRequest((kind or InvalidValue)(message), places)


def _is_null(error: ValidationError) -> bool:
    """Whether the first thing wrong is a null."""
    return error.errors(include_url=False, include_context=False)[0].get("input") is None


@cache
def _body_adapter(route: Route) -> TypeAdapter[Any]:
    return TypeAdapter(route.body)


@cache
def _fields_of(route: Route, kind: type[Any]) -> frozenset[str]:
    """The arguments in the query string that are of this kind."""
    fields = cast(Any, route.query).model_fields
    return frozenset(name for name, field in fields.items() if kind in _parts_of(field.annotation))


def _parts_of(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of, with what is inside of unions and of ``Annotated``."""
    yield get_origin(annotation) or annotation
    for part in get_args(annotation):
        yield from _parts_of(part)
