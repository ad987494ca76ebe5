"""From the parts of a request to the arguments of a call of the store.

Large bodies are read in another process (``decoder``). From there the arguments come in parts of moderate size, with
every value checked and encoded already, so that nothing is left that would hold up the event loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidId, InvalidValue, NotJson, RefusedSpan
from agentlightning.http.codec import decode_strict
from agentlightning.http.routes import DIALECTS, LONGEST_WAIT_SECONDS, ROUTES, Dialect, Route
from agentlightning.http.server.span_intake import check_span, drafts_of, plain_report
from agentlightning.http.signatures import arguments_of
from agentlightning.store.arguments import check_batch, draft_of, encode_ahead, span_drafts
from agentlightning.store.operations.rollouts import Draft
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.refusals import find_refused
from agentlightning.store.validation import check_json_size

_MESSAGE_BYTES = 300
_PLACES_SHOWN = 10
_INTEGER = re.compile(r"-?[0-9]{1,40}")
_LIGHT_BYTES = 64 * 1024
SURELY_LIGHT_BYTES = 4 * 1024
"""A body of so many bytes is read on the event loop, whatever is in it."""
_LIGHT_MARKS = 4_000
"""Commas and brackets: the work grows with the number of values, not of bytes."""
_LIGHT_ROLLOUT_MARKS = 500
"""In a list of rollouts, two of them may be a whole rollout, which is much to do."""


class Source(NamedTuple):
    """What a request says of its call outside of its body, and where the call goes."""

    verb: str
    path: str
    """Of the route, with the names of arguments."""
    prefix: str
    gives_json: bool
    """As for ``Intake``."""
    ids: Mapping[str, str]
    query: bytes


class Intake:
    """Takes the requests to one route below one prefix apart.

    Args:
        route, dialect: which.
        gives_json: whether the store takes spans and values that are encoded.
    """

    def __init__(self, route: Route, dialect: Dialect, *, gives_json: bool) -> None:
        self.route = route
        self.dialect = dialect
        self.keeps_spans = gives_json and route.method in ("add_span", "add_many_spans")
        """Whether spans become drafts, in the argument ``drafts``."""
        self.has_body = route.body is not None
        self._gives_json = gives_json
        self._splits_spans = gives_json and route.method == "finish_attempt"
        self._light_marks = _LIGHT_ROLLOUT_MARKS if route.method == "enqueue_many_rollouts" else _LIGHT_MARKS
        self._body = TypeAdapter[Any](route.body if self.has_body else None)
        wait = route.wait_argument
        self._wait_seconds = None if wait is None else arguments_of(route.method)[wait].default
        self._query = route.query
        fields = {} if self._query is None else self._query.model_fields
        kinds = {name: set(_parts_of(field.annotation)) for name, field in fields.items()}
        self._lists = {name for name, parts in kinds.items() if list in parts}
        self._integers = {name for name, parts in kinds.items() if int in parts}

    def is_light(self, parts: Sequence[bytes]) -> bool:
        """Whether the body that arrived in these parts takes so little time that the event loop may read it."""
        size = sum(map(len, parts))
        if size <= SURELY_LIGHT_BYTES:
            return True
        return (
            size <= _LIGHT_BYTES and sum([each.count(mark) for each in parts for mark in b",[{"]) <= self._light_marks
        )

    def source(self, ids: Mapping[str, str], query: bytes) -> Source:
        """What ``take_in`` needs to know of a request."""
        route = self.route
        return Source(route.verb, route.path, self.dialect.prefix, self._gives_json, ids, query)

    def arguments(self, ids: Mapping[str, str], query: bytes, raw: bytes) -> dict[str, Any]:
        """The arguments of the route's method.

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
                if self.keeps_spans:
                    arguments["drafts"] = drafts_of(raw, many=self.route.sends_sequence_ids)
                elif self._splits_spans and (parts := plain_report(raw)) is not None:
                    spans, report = parts
                    self._add_body(arguments, report)
                    arguments["spans"] = spans
                else:
                    self._add_body(arguments, decode_strict(raw))
            except (InvalidValue, ValidationError) as error:
                refused = _invalid(error, "body") if isinstance(error, ValidationError) else error
                if self.route.sends_sequence_ids:
                    refused.refused_spans = _name_refused(raw)
                raise refused from None
        if self.route.method == "dequeue_many_rollouts" and self.dialect.empty_limit_is_empty:
            arguments["limit"] = max(arguments.get("limit", 1), 0)
        if self.route.is_query:
            arguments.setdefault("limit", self.dialect.default_limit)
        if wait := self.route.wait_argument:
            seconds = arguments.get(wait, self._wait_seconds)
            arguments[wait] = LONGEST_WAIT_SECONDS if seconds is None else min(seconds, LONGEST_WAIT_SECONDS)
        return arguments

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


# --- Large bodies ----------------------------------------------------------------------------------

_PART_BYTES = 64 * 1024
_PART_ITEMS = 256


def take_in(source: Source, raw: bytes) -> Iterator[Mapping[str, Any]]:
    """``Intake.arguments`` of a large body, in parts for ``put_together``. Raises as it does, and ``TooLarge``.

    For a store that takes them, values are encoded, and rollouts and spans are drafts.
    """
    intake = _intake_of(source.verb, source.path, source.prefix, source.gives_json)
    arguments = intake.arguments(source.ids, source.query, raw)
    lists: dict[str, Sequence[Any]] = {}
    for name in ("rollouts", "drafts", "spans"):
        if name in arguments:
            check_batch(arguments[name], name)
            lists[name] = arguments.pop(name)
    if source.gives_json:
        encode_ahead(arguments)
        if "rollouts" in lists:
            lists["rollouts"] = [draft_of(each, None) for each in lists["rollouts"]]
        if "spans" in lists:
            lists["spans"] = span_drafts(lists["spans"])
    for name, value in arguments.items():
        _check_size(name, value)
    yield {**arguments, **{name: [] for name in lists}}
    for name, items in lists.items():
        yield from ({name: part} for part in in_parts(items))


def put_together(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments that came in parts: what comes after the first one is added to its lists."""
    arguments: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name in arguments:
                arguments[name] += value
            else:
                arguments[name] = value
    return arguments


def in_parts(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Drafts in their order, in lists that are moderate in number and in bytes."""
    part: list[Any] = []
    size = 0
    for item in items:
        part.append(item)
        size += item.size if isinstance(item, Draft | SpanDraft) else 0
        if size >= _PART_BYTES or len(part) >= _PART_ITEMS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _check_size(name: str, value: Any) -> None:
    """Raise ``TooLarge`` for a text or a list that no method takes, before it is copied to another process."""
    if isinstance(value, list):
        check_batch(cast("list[Any]", value), name)
    if isinstance(value, str | list):
        check_json_size(msgspec.json.encode(cast("Any", value)), name)


@cache
def _intake_of(verb: str, path: str, prefix: str, gives_json: bool) -> Intake:
    [route] = [each for each in ROUTES if (each.verb, each.path) == (verb, path)]
    [dialect] = [each for each in DIALECTS if each.prefix == prefix]
    return Intake(route, dialect, gives_json=gives_json)


# --- What is not valid -----------------------------------------------------------------------------

_KINDS: Mapping[str, type[InvalidValue]] = {
    **dict.fromkeys(("rollout_id", "attempt_id", "worker_id", "resources_id", "request_id", "span_id"), InvalidId),
    **dict.fromkeys(("attempt_ids", "worker_ids"), InvalidId),
    **dict.fromkeys(("metadata", "heartbeat_stats", "registration"), NotJson),
}
"""What is wrong with a field of a wrong type, where it is more than a bad value."""


def _name_refused(raw: bytes) -> Sequence[RefusedSpan]:
    """Which spans of a list are not valid; none if the body is no list of spans at all."""
    try:
        spans: Any = decode_strict(raw)["spans"]
        check_batch(spans, "spans")
    except (InvalidValue, LookupError, TypeError):
        return ()
    return find_refused(cast("Sequence[Any]", spans), _check_span, _id_of_span)


def _check_span(span: Any) -> None:
    try:
        check_span(span)
    except ValidationError as error:
        raise _invalid(error, "span") from None


def _id_of_span(span: Any) -> object:
    return cast("dict[str, Any]", span).get("span_id") if type(span) is dict else None


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
