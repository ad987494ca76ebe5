"""From the parts of a request to a call of the store, and from its result to a reply."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from time import monotonic
from typing import Any, NamedTuple, cast, get_args, get_origin
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidId, InvalidValue, NotFound, NotJson
from agentlightning.http.codec import decode_strict, encode_page_parts, encode_result
from agentlightning.http.routes import Route
from agentlightning.http.server.matching import Bound
from agentlightning.http.server.span_intake import draft_of_span, drafts_of_spans
from agentlightning.http.signatures import arguments_of
from agentlightning.store.base import LightningStore, sequence_ids_of
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


class Call(NamedTuple):
    """A request, taken apart."""

    bound: Bound
    arguments: dict[str, Any]
    raw: bytes
    """The body, for routes that look at the bytes themselves."""

    @property
    def waits(self) -> bool:
        """Whether it may wait for something to happen in the store."""
        route = self.bound.route
        if route.wait_argument is None:
            return False
        seconds = self.arguments.get(route.wait_argument, arguments_of(route.method)[route.wait_argument].default)
        return seconds is None or seconds > 0


class Answerer:
    """Answers the routes of the table from a store.

    Args:
        store: any store. One of our own is asked for bytes, and given them.
    """

    def __init__(self, store: LightningStore) -> None:
        self._engine: Any = store.answering_in_json()
        self._store: Any = self._engine or store
        self._records = store

    def call(self, bound: Bound, values: Sequence[str], query: bytes, raw: bytes) -> Call:
        """Take a request apart.

        Args:
            bound: the route.
            values: the arguments in the path.
            query: the query string.
            raw: the body.

        Raises:
            InvalidRequest: an argument is missing, or is not valid.
            NotJson, TooLarge: the body is not strict JSON.
        """
        route = bound.route
        arguments: dict[str, Any] = dict(zip(bound.names, values, strict=True))
        if route.query is not None:
            arguments |= self._from_query(route, query)
        if route.body is not None and (raw or not route.body_optional) and not self._takes_bytes(route):
            arguments |= self._from_body(route, raw)
        if bound.dialect.empty_limit_is_empty and route.method == "dequeue_many_rollouts":
            arguments["limit"] = max(arguments.get("limit", 1), 0)
        return Call(bound, arguments, raw)

    async def answer(self, call: Call) -> Reply:
        """Call the store. Raises what its method does."""
        route = call.bound.route
        match route.method:
            case "add_span":
                return Reply(route.status, await self._add_span(call))
            case "add_many_spans":
                return Reply(route.status, encode_result(route, await self._add_spans(call)))
            case "dequeue_many_rollouts":
                return await self._claim(call)
            case method:
                result = await getattr(self._store, method)(**call.arguments)
        if result is None and route.unknown_is_none:
            if call.bound.dialect.unknown_is_null:
                return Reply(200, b"null")
            [name] = call.bound.names
            raise NotFound(f"there is no {name.removesuffix('_id')} {call.arguments[name]!r} in this store")
        if isinstance(result, PaginatedResult):
            page = cast("PaginatedResult[Any]", result)
            if len(page.items) > _STREAMED_ITEMS:
                return Reply(route.status, parts=encode_page_parts(page))
        return Reply(route.status, encode_result(route, result))

    # --- Arguments -------------------------------------------------------------------------------

    def _takes_bytes(self, route: Route) -> bool:
        return self._engine is not None and route.method in ("add_span", "add_many_spans")

    def _from_body(self, route: Route, raw: bytes) -> dict[str, Any]:
        decoded = decode_strict(raw)
        try:
            body = _body_adapter(route).validate_python(decoded)
        except ValidationError as error:
            raise _invalid(error, "body") from error
        if route.body_argument is not None:
            return {route.body_argument: body}
        return {name: getattr(body, name) for name in body.model_fields_set}

    def _from_query(self, route: Route, query: bytes) -> dict[str, Any]:
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

    # --- Routes that differ ----------------------------------------------------------------------

    async def _add_span(self, call: Call) -> bytes:
        if self._engine is None:
            stored = await self._store.add_span(**call.arguments)
            return b"null" if stored is None else stored.model_dump_json().encode()
        try:
            draft = draft_of_span(call.raw)
        except ValidationError as error:
            raise _invalid(error, "body") from error
        [sequence_id] = await self._engine.add_span_drafts([draft])
        if not sequence_id:
            return b"null"
        return span_json(draft.rollout_id, draft.attempt_id, sequence_id, draft.body)

    async def _add_spans(self, call: Call) -> Sequence[int]:
        if self._engine is None:
            spans: list[Span] = call.arguments["spans"]
            return sequence_ids_of(spans, await self._store.add_many_spans(spans))
        try:
            drafts = drafts_of_spans(call.raw)
        except ValidationError as error:
            raise _invalid(error, "body") from error
        return await self._engine.add_span_drafts(drafts)

    async def _claim(self, call: Call) -> Reply:
        route = call.bound.route
        if call.arguments.get("limit") == 0 and call.bound.dialect.empty_limit_is_empty:
            return Reply(route.status, b"[]")
        began = monotonic()
        claimed = await self._store.dequeue_many_rollouts(**call.arguments)
        worker_id = call.arguments.get("worker_id")
        has_waited_in_vain = 0 < call.arguments.get("wait_seconds", 0) <= monotonic() - began
        if claimed or worker_id is None or has_waited_in_vain:  # one that is asked something does not wait to the end
            return Reply(route.status, encode_result(route, claimed))
        worker = await self._records.get_worker_by_id(worker_id)
        directive = None if worker is None else worker.directive
        headers = () if directive is None else ((DIRECTIVE_HEADER, directive.encode()),)
        return Reply(route.status, b"[]", headers)


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
