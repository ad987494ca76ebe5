"""Spans from the bytes of a request, for a store that keeps them as bytes.

Nearly every span is plain (`agentlightning.types.plain_spans`): msgspec reads it, and finds it canonical, in a tenth of
the time that pydantic needs. Every other span goes through pydantic; a test holds the two to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidValue
from agentlightning.http.codec import MAX_NODES, check_node_count, check_unique_keys, decode_strict, keys_in
from agentlightning.http.routes import CLIENT_ROUTES
from agentlightning.store.arguments import check_batch, span_drafts
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.span_json import body_of
from agentlightning.store.validation import MAX_JSON_BYTES, check_id, check_json_size
from agentlightning.types import AttributeValue, Event, Link, Span
from agentlightning.types.plain_spans import PlainSpan, count_keys, encode_plain, has_plain_values

_SCALARS = frozenset({str, bool, int, float})
_LARGE_BYTES = 64 * 1024
"""From this size on, what is wrong with a span may be so much that telling all would take minutes."""
_ATTRIBUTE, _EVENT, _LINK = TypeAdapter[Any](AttributeValue), TypeAdapter(Event), TypeAdapter(Link)


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


def check_span(decoded: Any) -> None:
    """Look at one span of a request, as decoded from JSON. Raises as ``drafts_of``."""
    _check_large(decoded)
    span_drafts([Span.model_validate(decoded)])


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
            check_json_size(body, f"span {span_id}")
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
