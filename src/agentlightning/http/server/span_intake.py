"""Spans from the bytes of a request, for a store that keeps them as bytes.

Nearly every span is plain (`agentlightning.types.plain_spans`): msgspec reads it, and finds it canonical, in a tenth
of the time that pydantic needs. Every other span goes through pydantic, as do all in a store that wants records; a test
holds the two ways to the same result.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidValue
from agentlightning.http.codec import MAX_NODES, check_node_count, check_unique_keys, decode_strict
from agentlightning.http.routes import CLIENT_ROUTES
from agentlightning.store.arguments import check_batch, span_drafts
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.span_json import body_of
from agentlightning.store.validation import MAX_JSON_BYTES, check_id, check_json_size
from agentlightning.types import AttributeValue, Event, Link, Span
from agentlightning.types.plain_spans import PlainSpan, count_keys, encode_plain, has_plain_values

_SCALARS = frozenset({str, bool, int, float})
_LARGE_BYTES = 64 * 1024
"""From this size on, what is wrong with a span may be so much that telling all would hold up others."""
_ATTRIBUTE, _EVENT, _LINK = TypeAdapter[Any](AttributeValue), TypeAdapter(Event), TypeAdapter(Link)


class _PlainBody(msgspec.Struct, forbid_unknown_fields=True):
    """An object with a list of plain spans."""

    spans: list[PlainSpan]


_decode_span = msgspec.json.Decoder(PlainSpan).decode
_decode_body = msgspec.json.Decoder(_PlainBody).decode


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
    if b"\\u0000" in raw:
        return None
    if len(raw) > MAX_NODES:
        check_node_count(raw, "the body")
    try:
        spans = _decode_body(raw).spans if many else [_decode_span(raw)]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if many:
        check_batch(spans, "spans")
    if not all(map(has_plain_values, spans)):
        return None
    encoded: list[bytes] = list(map(encode_plain, spans))
    canonical = b'{"spans":[' + b",".join(encoded) + b"]}" if many else encoded[0]
    if canonical != raw:  # else it is what we would write ourselves, and that has no key twice
        check_unique_keys(raw, many + sum(map(count_keys, spans)), "the body")
    return list(map(_draft, spans, encoded))


def plain_drafts_of(value: Any) -> list[SpanDraft] | None:
    """The spans that a value of strict JSON is, if it is a list of plain ones; else None, and pydantic decides.

    Raises:
        InvalidId: one of the ids is not valid.
        TooLarge: there are too many spans, or one of them has too many bytes.
    """
    try:
        spans = msgspec.convert(value, list[PlainSpan])
    except msgspec.ValidationError:
        return None
    check_batch(spans, "spans")
    if not all(map(has_plain_values, spans)):
        return None
    encoded: list[bytes] = list(map(encode_plain, spans))
    return list(map(_draft, spans, encoded))


def _draft(span: PlainSpan, encoded: bytes) -> SpanDraft:
    rollout_id, attempt_id = check_id(span.rollout_id, "rollout_id"), check_id(span.attempt_id, "attempt_id")
    span_id = check_id(span.span_id, "span_id")
    body = body_of(span, encoded)
    if len(body) > MAX_JSON_BYTES:
        check_json_size(body, "span", span_id)
    return SpanDraft(rollout_id, attempt_id, span.sequence_id, span_id, body)


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
