"""Spans as JSON and back: the hot path of the store's door.

Nearly every span is plain: attributes that are strings, booleans, finite numbers and lists of one kind of these,
no events or links, no unknown fields. Those are encoded by msgspec in a fifth of the time that pydantic
takes. Whatever is not plain goes through pydantic, which also finds what is wrong with it; a
test holds the two to the same result.
"""

from __future__ import annotations

from math import isfinite
from typing import cast, get_args

import msgspec

from agentlightning.errors import InvalidValue, NotJson, TooLarge
from agentlightning.store.validation import INT64_END, MAX_JSON_BYTES, check_id, check_json_size, check_json_value
from agentlightning.types import OtelResource, Span, SpanContext, StatusCode, TraceStatus

MAX_SEQUENCE_ID = 2**52
"""The largest span sequence id that may be given: it leaves room for those that are issued after it, below 2^53,
which every JSON reader keeps exact."""

_COLUMNS = {"rollout_id", "attempt_id", "sequence_id"}
_FIELD_COUNT = len(Span.model_fields)
_STATUS_CODES = frozenset(get_args(StatusCode))
_REWARDS = ("agentlightning.reward", "reward")
_encode = msgspec.json.Encoder().encode
_serializer = Span.__pydantic_serializer__


def encode_span(span: Span) -> bytes:
    """A span as a JSON object without its rollout, attempt and sequence id.

    Non-finite attributes become the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

    Raises:
        InvalidId: the span id is not one.
        InvalidValue: a reward or a time is not finite, or the sequence id is out of range.
        NotJson, TooLarge: no JSON can carry it.
    """
    span_id = check_id(span.span_id, "span_id")
    if type(span.sequence_id) is not int or not 0 <= span.sequence_id <= MAX_SEQUENCE_ID:
        raise InvalidValue(
            f"sequence_id {span.sequence_id!r} of span {span_id!r} is not valid; give 0 to have it issued, or 1 to 2^52"
        )
    body = encode_plain(span) or encode_any(span)
    if len(body) > MAX_JSON_BYTES or b"\\u0000" in body:
        check_json_size(body, "span", span_id)
    return body


def span_json(rollout_id: str, attempt_id: str, sequence_id: int, body: bytes) -> bytes:
    """A whole span as JSON, from its columns and its body."""
    head = f'{{"rollout_id":"{rollout_id}","attempt_id":"{attempt_id}","sequence_id":{sequence_id},'
    return head.encode() + body[1:]


def encode_plain(span: Span) -> bytes | None:
    """The body of a span, if it is a plain one."""
    fields = dict(span.__dict__)
    if type(span) is not Span or len(fields) != _FIELD_COUNT:
        return None
    status, resource, context, parent = fields["status"], fields["resource"], fields["context"], fields["parent"]
    start, end = fields["start_time"], fields["end_time"]
    if (
        type(fields["trace_id"]) is not str
        or type(fields["name"]) is not str
        or (fields["parent_id"] is not None and type(fields["parent_id"]) is not str)
        or (start is not None and not (type(start) is float and isfinite(start)))
        or (end is not None and not (type(end) is float and isfinite(end)))
        or fields["events"] != []
        or fields["links"] != []
        or span.__pydantic_extra__
        or not _is_plain_status(status)
        or not (context is None or _is_plain_context(context))
        or not (parent is None or _is_plain_context(parent))
        or type(resource) is not OtelResource
        or type(resource.schema_url) is not str
        or not _are_plain(resource.attributes)
        or not _are_plain(fields["attributes"])
    ):
        return None
    del fields["rollout_id"], fields["attempt_id"], fields["sequence_id"]
    fields["status"] = status.__dict__
    fields["resource"] = resource.__dict__
    fields["context"] = context and context.__dict__
    fields["parent"] = parent and parent.__dict__
    try:
        return _encode(fields)
    except UnicodeEncodeError:
        return None


def encode_any(span: Span) -> bytes:
    """The body of any span, checked until it is known that it can be read back. Raises as ``encode_span``."""
    try:
        body = _serializer.to_json(span, exclude=_COLUMNS, warnings="error")
        check_json_value(msgspec.json.decode(body), f"span {span.span_id!r}")
        Span.model_validate_json(span_json("", "", 0, body))
    except TooLarge:
        raise
    except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:  # pydantic's are ValueErrors
        raise NotJson(f"span {span.span_id!r} cannot be stored: {error}") from error
    for field in ("start_time", "end_time"):
        value = cast("float | None", getattr(span, field))
        if value is not None and not isfinite(value):
            raise InvalidValue(f"{field} of span {span.span_id!r} is {value!r}; a time must be finite")
    for name, value in span.attributes.items():
        if name.startswith(_REWARDS) and isinstance(value, float) and not isfinite(value):
            raise InvalidValue(
                f"{name} of span {span.span_id!r} is {value!r}; a reward must be finite (no reward is None, not NaN)"
            )
    return body


def _are_plain(attributes: object) -> bool:
    """Whether this is a dict of strings, booleans, 64-bit integers, finite numbers, and lists of one kind of these."""
    if type(attributes) is not dict:
        return False
    known = cast("dict[object, object]", attributes)
    for name, value in known.items():
        kind = type(value)
        if type(name) is not str or not (
            kind is str
            or kind is bool
            or (kind is int and -INT64_END <= cast(int, value) < INT64_END)
            or (kind is float and isfinite(cast(float, value)))
            or (kind is list and _is_plain_list(cast("list[object]", value)))
        ):
            return False
    return True


def _is_plain_list(items: list[object]) -> bool:
    kinds = {type(item) for item in items}
    if kinds == {int}:
        numbers = cast("list[int]", items)
        return min(numbers) >= -INT64_END and max(numbers) < INT64_END
    return len(kinds) <= 1 and (
        kinds <= {str, bool} or (kinds == {float} and all(map(isfinite, cast("list[float]", items))))
    )


def _is_plain_status(status: object) -> bool:
    return (
        type(status) is TraceStatus
        and status.status_code in _STATUS_CODES
        and (status.description is None or type(status.description) is str)
        and not status.__pydantic_extra__
    )


def _is_plain_context(context: object) -> bool:
    return (
        type(context) is SpanContext
        and type(context.trace_id) is str
        and type(context.span_id) is str
        and type(context.is_remote) is bool
        and context.trace_state == {}
        and not context.__pydantic_extra__
    )
