"""From the parts of a request to a call of the store, and from its result to a reply."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidId, InvalidValue, NotFound, NotJson
from agentlightning.http.codec import (
    MAX_NODES,
    check_node_count,
    check_unique_keys,
    decode_strict,
    encode_page_parts,
    encode_result,
    keys_in,
)
from agentlightning.http.routes import CLIENT_ROUTES, DIALECTS, LONGEST_WAIT_SECONDS, ROUTES, Dialect, Route
from agentlightning.http.server.exchange import Reply
from agentlightning.http.signatures import arguments_of
from agentlightning.store.arguments import check_batch, span_drafts
from agentlightning.store.base import LightningStore, sequence_ids_of
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.span_json import body_of, span_json
from agentlightning.store.validation import MAX_JSON_BYTES, check_id, check_json_size
from agentlightning.types import AttributeValue, Event, Link, PaginatedResult, Span
from agentlightning.types.plain_spans import PlainSpan, count_keys, encode_plain, has_plain_values

DIRECTIVE_HEADER = b"agl-directive"
"""In the reply to a claim of a worker that has been asked to drain or to stop: which of the two."""
_STREAMED_ITEMS = 512
_MESSAGE_BYTES = 300
_PLACES_SHOWN = 10
_INTEGER = re.compile(r"-?[0-9]{1,40}")
_SCALARS = frozenset({str, bool, int, float})
_LARGE_BYTES = 64 * 1024
"""From this size on, what is wrong with a span may be so much that telling all would hold up others."""
_ATTRIBUTE, _EVENT, _LINK = TypeAdapter[Any](AttributeValue), TypeAdapter(Event), TypeAdapter(Link)


class Endpoint:
    """Answers one route below one prefix: takes a request apart, and makes a reply of what the store returns.

    Args:
        route, dialect: which.
        store: the store, in the form that is served.
        gives_json: whether its methods return records as JSON, and take encoded spans.
    """

    def __init__(self, route: Route, dialect: Dialect, store: Any, *, gives_json: bool) -> None:
        self.route = route
        self.dialect = dialect
        self.may_wait = route.wait_argument is not None
        self.label = f"{route.verb} {dialect.prefix}{route.path}"
        """For metrics and logs."""
        self.direct = route.verb == "POST" and route.priority != "read"
        """Whether a small request may be answered without ASGI. Reads are not, because their replies may be large."""
        self._store = store
        self._keeps_spans = gives_json and route.method in ("add_span", "add_many_spans")
        self._is_claim = route.method == "dequeue_many_rollouts"
        self.call = (
            self._claim if self._is_claim else getattr(store, "add_span_drafts" if self._keeps_spans else route.method)
        )
        """Asks the store; its result is for ``reply``."""
        self._splits_spans = gives_json and route.method == "finish_attempt"
        self.has_body = route.body is not None
        self._body = TypeAdapter[Any](route.body if self.has_body else None)
        wait = route.wait_argument
        self._wait_seconds = None if wait is None else arguments_of(route.method)[wait].default
        self._query = route.query
        fields = {} if self._query is None else self._query.model_fields
        kinds = {name: set(_parts_of(field.annotation)) for name, field in fields.items()}
        self._lists = {name for name, parts in kinds.items() if list in parts}
        self._integers = {name for name, parts in kinds.items() if int in parts}

    def arguments(self, ids: Mapping[str, str], query: bytes, raw: bytes) -> dict[str, Any]:
        """The arguments of ``call``.

        Args:
            ids: the arguments in the path.
            query: the query string.
            raw: the body.

        Raises:
            InvalidValue: an argument is missing, or is not valid.
            NotJson, TooLarge: the body is not strict JSON.
        """
        arguments: dict[str, Any] = {**ids}
        if self._query is not None:
            arguments |= self._from_query(query)
        if self.has_body and (raw or not self.route.body_optional):
            try:
                if self._keeps_spans:
                    arguments["drafts"] = drafts_of(raw, many=self.route.sends_sequence_ids)
                elif self._splits_spans and (parts := plain_report(raw)) is not None:
                    spans, report = parts
                    self._add_body(arguments, report)
                    arguments["spans"] = spans
                else:
                    self._add_body(arguments, decode_strict(raw))
            except ValidationError as error:
                raise _invalid(error, "body") from error
        if self._is_claim and self.dialect.empty_limit_is_empty:
            arguments["limit"] = max(arguments.get("limit", 1), 0)
        if self.route.is_query:
            arguments.setdefault("limit", self.dialect.default_limit)
        if wait := self.route.wait_argument:
            seconds = arguments.get(wait, self._wait_seconds)
            arguments[wait] = LONGEST_WAIT_SECONDS if seconds is None else min(seconds, LONGEST_WAIT_SECONDS)
        return arguments

    def waits(self, arguments: dict[str, Any]) -> bool:
        """Whether a call with these arguments may wait for something to happen in the store."""
        seconds = arguments.get(self.route.wait_argument or "", self._wait_seconds)
        return seconds is None or seconds > 0

    def reply(self, result: Any, arguments: dict[str, Any]) -> Reply:
        """The reply to a call. Raises ``NotFound`` if the store does not know the id."""
        route = self.route
        if route.unknown_is_none and result is None:
            if self.dialect.unknown_is_null:
                return Reply(200, b"null")
            [name] = route.in_path
            raise NotFound(f"there is no {name.removesuffix('_id')} {arguments[name]!r} in this store")
        if isinstance(result, Reply):
            return result
        if self._keeps_spans:
            if not route.sends_sequence_ids:  # one span: as it is stored now, unless it was before
                [draft], [number] = arguments["drafts"], cast("Sequence[int]", result)
                stored = span_json(draft.rollout_id, draft.attempt_id, number, draft.body) if number else b"null"
                return Reply(route.status, stored)
        elif route.sends_sequence_ids:
            result = sequence_ids_of(arguments["spans"], cast("Sequence[Any]", result))
        if isinstance(result, PaginatedResult) and len(cast("PaginatedResult[Any]", result).items) > _STREAMED_ITEMS:
            return Reply(route.status, parts=encode_page_parts(cast("PaginatedResult[Any]", result)))
        return Reply(route.status, encode_result(route, result))

    async def _claim(self, **arguments: Any) -> Any:
        """Claim; the reply to an empty claim says what its worker is asked to do."""
        if arguments.get("limit") == 0 and self.dialect.empty_limit_is_empty:
            return []
        clock = asyncio.get_running_loop().time
        began = clock()
        claimed = await self._store.dequeue_many_rollouts(**arguments)
        worker_id = arguments.get("worker_id")
        # A worker that is asked to drain or stop is answered before its time is up, so only then it is looked up.
        has_waited = 0 < arguments.get("wait_seconds", 0) <= clock() - began
        if claimed or worker_id is None or has_waited:
            return claimed
        worker = await self._store.get_worker_by_id(worker_id)
        if isinstance(worker, bytes):
            worker = msgspec.json.decode(worker, type=_Directed)
        if worker is None or worker.directive is None:
            return claimed
        return Reply(self.route.status, b"[]", ((DIRECTIVE_HEADER, worker.directive.encode()),))

    def _add_body(self, arguments: dict[str, Any], decoded: Any) -> None:
        body = self._body.validate_python(decoded)
        if self.route.body_argument is not None:
            arguments[self.route.body_argument] = body
            return
        values = body.__dict__
        for name in body.__pydantic_fields_set__:
            if name in values:  # a field that the record does not know is elsewhere
                arguments[name] = values[name]

    def _from_query(self, query: bytes) -> dict[str, Any]:
        given: dict[str, Any] = {}
        try:
            pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=20_000)
        except ValueError as error:  # UnicodeDecodeError too
            raise InvalidValue(f"the query string is not URL-encoded UTF-8: {error}") from error
        for name, value in pairs:
            if name in self._lists:
                given.setdefault(name, []).append(value)
            elif name in given:
                raise InvalidValue(f"{name[:80]!r} is given twice in the query string; give it once")
            else:
                given[name] = int(value) if name in self._integers and _INTEGER.fullmatch(value) else value
        try:
            asked = cast(Any, self._query).model_validate(given)
        except ValidationError as error:
            raise _invalid(error, "query") from error
        return {name: getattr(asked, name) for name in asked.model_fields_set}


class _Directed(msgspec.Struct):
    """What interests here of a worker's JSON."""

    directive: str | None = None


# --- From a verb and a path to a route -------------------------------------------------------------


class Match(NamedTuple):
    """What a request leads to."""

    endpoint: Endpoint
    ids: dict[str, str]
    """The arguments in the path, in order."""


_SHAPES: dict[tuple[str, str], Route] = {}
"""Routes by verb and path; arguments in the path are ``{}``."""
_HOLES: dict[int, list[tuple[int, ...]]] = {}
"""Where arguments may stand in a path, by its number of parts; those with the fewest arguments first."""
for _route in ROUTES:
    _SHAPES[_route.verb, re.sub(r"{\w+}", "{}", _route.path)] = _route
    _parts = _route.path.split("/")
    _places = tuple(number for number, part in enumerate(_parts) if part.startswith("{"))
    _HOLES[len(_parts)] = sorted({*_HOLES.get(len(_parts), ()), _places}, key=len)


class Endpoints:
    """The endpoints of a store, by verb and path; each is made when it is first needed.

    Args:
        store: any store. One that has a form which gives and takes JSON is used in that form.
    """

    def __init__(self, store: LightningStore) -> None:
        in_json = store.answering_in_json()
        self._store: Any = store if in_json is None else in_json
        self._gives_json = in_json is not None
        self._made: dict[tuple[Route, Dialect], Endpoint] = {}
        self._whole: dict[tuple[str, str], Match] = {}
        """What paths without arguments lead to."""

    def find(self, verb: str, path: str) -> Match | None:
        """What ``verb`` and ``path`` lead to; None if there is no route. One that is written out goes first."""
        found = self._whole.get((verb, path))
        if found is not None:
            return found
        for dialect in DIALECTS:
            if path.startswith(dialect.prefix):
                break
        else:
            return None
        parts = path[len(dialect.prefix) :].split("/")
        for holes in _HOLES.get(len(parts), ()):
            shape = [*parts]
            for hole in holes:
                shape[hole] = "{}"
            route = _SHAPES.get((verb, "/".join(shape)))
            if route is None or len(route.in_path) != len(holes):  # the path itself may have a part "{}"
                continue
            endpoint = self._made.get((route, dialect))
            if endpoint is None:
                endpoint = Endpoint(route, dialect, self._store, gives_json=self._gives_json)
                self._made[route, dialect] = endpoint
            match = Match(endpoint, dict(zip(route.in_path, [parts[hole] for hole in holes], strict=True)))
            if not holes:
                self._whole[verb, path] = match
            return match
        return None

    def verbs(self, path: str) -> Sequence[str]:
        """The verbs that ``path`` takes; none if there is nothing under it."""
        return sorted(verb for verb in {route.verb for route in ROUTES} if self.find(verb, path) is not None)


# --- What is not valid -----------------------------------------------------------------------------

_KINDS: Mapping[str, type[InvalidValue]] = {
    **dict.fromkeys(("rollout_id", "attempt_id", "worker_id", "resources_id", "request_id", "span_id"), InvalidId),
    **dict.fromkeys(("attempt_ids", "worker_ids"), InvalidId),
    **dict.fromkeys(("metadata", "heartbeat_stats", "registration"), NotJson),
}
"""What is wrong with a field of a wrong type, where it is more than a bad value."""


def _invalid(error: ValidationError, where: str) -> InvalidValue:
    """What pydantic found, in our words: the first of it as the message, up to ten as a list."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    path = ".".join(str(part)[:80] for part in first["loc"])
    kind = next((_KINDS[part] for part in reversed(first["loc"]) if isinstance(part, str) and part in _KINDS), None)
    if kind is NotJson and (first["type"] == "missing" or first["input"] is None):
        kind = None
    refused = (kind or InvalidValue)(f"{path or 'the ' + where} is not valid: {first['msg'][:_MESSAGE_BYTES]}")
    refused.places = [
        {"loc": [where, *each["loc"]], "msg": each["msg"][:_MESSAGE_BYTES], "type": each["type"]}
        for each in found[:_PLACES_SHOWN]
    ]
    return refused


def _parts_of(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of, with what is inside of unions and of ``Annotated``."""
    yield get_origin(annotation) or annotation
    for part in get_args(annotation):
        yield from _parts_of(part)


# --- Spans from bytes, for a store that keeps them as bytes -----------------------------------------
# Nearly every span is plain (`agentlightning.types.plain_spans`): msgspec reads it, and finds it canonical, in a tenth
# of the time that pydantic needs. Every other span goes through pydantic; a test holds the two to the same result.


class _PlainBody(msgspec.Struct, forbid_unknown_fields=True):
    """An object with a list of plain spans."""

    spans: list[PlainSpan]


_REPORTED = [name for name in CLIENT_ROUTES["finish_attempt"].body.model_fields if name != "spans"]
_PlainReport = msgspec.defstruct(
    "_PlainReport",
    [("spans", list[PlainSpan]), *[(name, msgspec.Raw, msgspec.Raw()) for name in _REPORTED]],
    forbid_unknown_fields=True,
)
"""The body of ``finish_attempt``, with plain spans."""

_decode_span = msgspec.json.Decoder(PlainSpan).decode
_decode_body = msgspec.json.Decoder(_PlainBody).decode
_decode_report = cast("Any", msgspec.json.Decoder(_PlainReport).decode)


def drafts_of(raw: bytes, *, many: bool) -> list[SpanDraft]:
    """The spans of a request.

    Args:
        raw: the JSON of an object with the list ``spans``, or of one ``Span``.
        many: which of the two.

    Raises:
        ValidationError: it is neither.
        InvalidValue: there is a span that no store would take, or there are too many.
    """
    drafts = plain_drafts(raw, many=many)
    if drafts is not None:
        return drafts
    decoded = decode_strict(raw)
    if many and type(decoded) is dict and type(spans := cast("dict[str, Any]", decoded).get("spans")) is list:
        check_batch(cast("list[Any]", spans), "spans")
    if len(raw) > _LARGE_BYTES:
        _check_large(decoded)
    if many:
        return span_drafts(CLIENT_ROUTES["add_many_spans"].body.model_validate(decoded).spans)
    return span_drafts([Span.model_validate(decoded)])


def plain_drafts(raw: bytes, *, many: bool) -> list[SpanDraft] | None:
    """As ``drafts_of``, if all spans are plain and the JSON is strict; else None, and pydantic decides."""
    body = _read_plain(raw, _decode_body if many else _decode_span)
    if body is None:
        return None
    spans: list[PlainSpan] = body.spans if many else [body]
    check_batch(spans, "spans")
    if not _have_plain_values(spans, raw, arrays=int(many)):
        return None
    encoded: list[bytes] = list(map(encode_plain, spans))
    canonical = b'{"spans":[' + b",".join(encoded) + b"]}" if many else encoded[0]
    if canonical != raw:  # else it is what we would write ourselves, and that has no key twice
        check_unique_keys(raw, many + sum(map(count_keys, spans)), "the body")
    return _drafts(spans, encoded)


def plain_report(raw: bytes) -> tuple[list[SpanDraft], dict[str, Any]] | None:
    """The spans in the body of ``finish_attempt``, and its other fields, under the conditions of ``plain_drafts``."""
    body = _read_plain(raw, _decode_report)
    if body is None:
        return None
    check_batch(body.spans, "spans")
    if not _have_plain_values(body.spans, raw, arrays=1):
        return None
    encoded: list[bytes] = list(map(encode_plain, body.spans))
    canonical = b'"spans":[' + b",".join(encoded) + b"]"
    start = raw.find(b'"spans":[')
    if raw.startswith(canonical, start):  # as in ``plain_drafts``; only what stands around the spans is looked at
        report = decode_strict(raw[:start] + b'"spans":0' + raw[start + len(canonical) :])
        if report.pop("spans") == 0:  # else these were a copy of the spans, in some other field
            return _drafts(body.spans, encoded), report
    given = {name: part for name in _REPORTED if bytes(part := getattr(body, name))}
    report = decode_strict(msgspec.json.encode(given))
    keys = 1 + keys_in([report], "the body")
    check_unique_keys(raw, keys + sum(map(count_keys, body.spans)), "the body")
    return _drafts(body.spans, encoded), report


def _have_plain_values(spans: Sequence[PlainSpan], raw: bytes, *, arrays: int) -> bool:
    """``has_plain_values`` of spans that msgspec has read: names are strings, and JSON has only finite numbers.

    Only a list may still be of several types. Each span has two arrays, and ``arrays`` are around all of them: where
    the text has no others, there is no list.
    """
    return raw.count(b"[") == arrays + 2 * len(spans) or all(map(has_plain_values, spans))


def _read_plain(raw: bytes, decode: Callable[[bytes], Any]) -> Any | None:
    if b"\\" in raw and b"\\u0000" in raw:  # one byte is found sooner
        return None
    if len(raw) > MAX_NODES:
        check_node_count(raw, "the body")
    try:
        return decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _drafts(spans: Sequence[PlainSpan], encoded: Sequence[bytes]) -> list[SpanDraft]:
    drafts: list[SpanDraft] = []
    rollout_id = attempt_id = None
    for span, whole in zip(spans, encoded, strict=True):
        if span.rollout_id != rollout_id:
            rollout_id = check_id(span.rollout_id, "rollout_id")
        if span.attempt_id != attempt_id:
            attempt_id = check_id(span.attempt_id, "attempt_id")
        span_id, body = check_id(span.span_id, "span_id"), body_of(span, whole)
        if len(body) > MAX_JSON_BYTES:
            check_json_size(body, "span", span_id)
        drafts.append(SpanDraft(span.rollout_id, span.attempt_id, span.sequence_id, span_id, body))
    return drafts


def _check_large(value: Any) -> None:
    """Raise ``InvalidValue`` for the first attribute, event or link that is not valid.

    Pydantic would list all of them before anybody could stop it, and take a minute for those of one body.
    """
    if type(value) is not dict:
        return
    for name, part in cast("dict[str, Any]", value).items():
        if name == "attributes" and type(part) is dict:
            for key, each in cast("dict[str, Any]", part).items():
                if type(each) not in _SCALARS:
                    _check_part(_ATTRIBUTE, each, f"the attribute {key[:80]!r}")
        elif name == "resource":
            _check_large(part)
        elif name in ("events", "links", "spans") and type(part) is list:
            for number, each in enumerate(cast("list[Any]", part)):
                _check_large(each)
                if name != "spans":
                    _check_part(_EVENT if name == "events" else _LINK, each, f"{name}.{number}")


def _check_part(kind: TypeAdapter[Any], value: Any, what: str) -> None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise InvalidValue(f"{what} is not valid: {first['msg'][:300]}") from error
