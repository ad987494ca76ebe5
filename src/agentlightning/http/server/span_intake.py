"""Spans from the bytes of a request, for a store that keeps them as bytes.

Nearly every span is plain: all its fields of the very types that they should have, attributes that are
strings, booleans and numbers. Such a one is taken as it is, in a tenth of the time that pydantic needs.
Every other span goes through pydantic, as do all in a store that wants records; a test holds the
two ways to the same result.
"""

from __future__ import annotations

from typing import Any, cast, get_args

import msgspec
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidValue
from agentlightning.http.codec import decode_strict
from agentlightning.http.messages import SpansBody
from agentlightning.store.arguments import check_batch, span_drafts
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.span_json import MAX_SEQUENCE_ID
from agentlightning.store.validation import MAX_JSON_BYTES, check_id, check_json_size
from agentlightning.types import AttributeValue, Event, Link, Span, StatusCode

_encode = msgspec.json.Encoder().encode
_STATUS_CODES = frozenset(get_args(StatusCode))
_FIELDS = frozenset(Span.model_fields)
_COUNT = len(_FIELDS)
_STATUS = frozenset({"status_code", "description"})
_RESOURCE = frozenset({"attributes", "schema_url"})
_SCALARS = frozenset({str, bool, int, float})
_LARGE_BYTES = 64 * 1024
"""From this size on, what is wrong with a span may be so much that telling all would hold up others."""
_ATTRIBUTE, _EVENT, _LINK = TypeAdapter[Any](AttributeValue), TypeAdapter(Event), TypeAdapter(Link)


def draft_of_span(raw: bytes) -> SpanDraft:
    """One span. ``raw``: the JSON of a ``Span``.

    Raises:
        ValidationError: it is no span.
        InvalidValue: a span that no store would take.
    """
    decoded = decode_strict(raw)
    draft = plain_draft(decoded)
    if draft is not None:
        return draft
    if len(raw) > _LARGE_BYTES:
        _check_large(decoded)
    return span_drafts([Span.model_validate(decoded)])[0]


def drafts_of_spans(raw: bytes) -> list[SpanDraft]:
    """Many spans. ``raw``: the JSON of a ``SpansBody``. Raises as ``draft_of_span``."""
    decoded = decode_strict(raw)
    if type(decoded) is dict:
        spans = cast("dict[str, Any]", decoded).get("spans")
        if type(spans) is list:
            items = cast("list[Any]", spans)
            check_batch(items, "spans")
            drafts = [plain_draft(each) for each in items]
            if None not in drafts:
                return cast("list[SpanDraft]", drafts)
    decoded = decode_strict(raw)  # plain ones were used up
    if len(raw) > _LARGE_BYTES:
        _check_large(decoded)
    return span_drafts(SpansBody.model_validate(decoded).spans)


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


def plain_draft(decoded: Any) -> SpanDraft | None:
    """The span that a decoded JSON value is, if it is a plain one; the value is used up.

    The value is strict JSON, as ``decode_strict`` returns it.

    Raises:
        InvalidId: one of its ids is not valid.
        TooLarge: it has too many bytes.
    """
    if type(decoded) is not dict:
        return None
    fields = cast("dict[str, Any]", decoded)
    if len(fields) != _COUNT or not _FIELDS.issuperset(fields):
        return None
    sequence_id, parent_id, start, end = (
        fields["sequence_id"],
        fields["parent_id"],
        fields["start_time"],
        fields["end_time"],
    )
    if (
        type(sequence_id) is not int
        or not 0 <= sequence_id <= MAX_SEQUENCE_ID
        or type(fields["trace_id"]) is not str
        or type(fields["name"]) is not str
        or (parent_id is not None and type(parent_id) is not str)
        or (start is not None and type(start) is not float)
        or (end is not None and type(end) is not float)
        or fields["events"] != []
        or fields["links"] != []
        or (fields["context"] is not None and not _is_context(fields["context"]))
        or (fields["parent"] is not None and not _is_context(fields["parent"]))
        or not _is_status(fields["status"])
        or not _is_resource(fields["resource"])
        or not _are_plain(fields["attributes"])
    ):
        return None
    rollout_id = check_id(fields.pop("rollout_id"), "rollout_id")
    attempt_id = check_id(fields.pop("attempt_id"), "attempt_id")
    span_id = check_id(fields["span_id"], "span_id")
    del fields["sequence_id"]
    body = _encode(fields)
    if len(body) > MAX_JSON_BYTES:
        check_json_size(body, "span", span_id)
    return SpanDraft(rollout_id, attempt_id, sequence_id, span_id, body)


def _are_plain(attributes: Any) -> bool:
    if type(attributes) is not dict:
        return False
    known = cast("dict[str, Any]", attributes)
    return _SCALARS.issuperset(map(type, known.values()))


def _is_status(status: Any) -> bool:
    if type(status) is not dict:
        return False
    fields = cast("dict[str, Any]", status)
    description = fields.get("description")
    return (
        len(fields) == 2
        and _STATUS.issuperset(fields)
        and type(fields["status_code"]) is str
        and fields["status_code"] in _STATUS_CODES
        and (description is None or type(description) is str)
    )


def _is_context(context: Any) -> bool:
    if type(context) is not dict:
        return False
    fields = cast("dict[str, Any]", context)
    return (
        len(fields) == 4
        and type(fields.get("trace_id")) is str
        and type(fields.get("span_id")) is str
        and type(fields.get("is_remote")) is bool
        and fields.get("trace_state") == {}
    )


def _is_resource(resource: Any) -> bool:
    if type(resource) is not dict:
        return False
    fields = cast("dict[str, Any]", resource)
    return (
        len(fields) == 2
        and _RESOURCE.issuperset(fields)
        and type(fields["schema_url"]) is str
        and _are_plain(fields["attributes"])
    )
