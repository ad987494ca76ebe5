"""Spans as the store keeps them: JSON without the fields that are columns.

Nearly every span is plain, and msgspec encodes it (`agentlightning.types.plain_spans`). Whatever is not plain goes
through pydantic, which also finds what is wrong with it; a test holds the two to the same result.
"""

from __future__ import annotations

from math import isfinite
from typing import cast

import msgspec

from agentlightning.errors import InvalidValue, NotJson, TooLarge
from agentlightning.store.validation import MAX_JSON_BYTES, check_id, check_json_size, check_json_value
from agentlightning.types import Span
from agentlightning.types.plain_spans import (
    MAX_SEQUENCE_ID,
    PlainSpan,
    SpanOrPlain,
    decode_plain,
    encode_plain,
    plain_of,
)

_COLUMNS = {"rollout_id", "attempt_id", "sequence_id"}
_REWARDS = ("agentlightning.reward", "reward")
_serializer = Span.__pydantic_serializer__


def encode_span(span: SpanOrPlain) -> bytes:
    """A whole span as JSON. Its rollout and attempt ids are valid ones.

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
    encoded = encode_quickly(span)
    if encoded is None:
        encoded = span_json(span.rollout_id, span.attempt_id, span.sequence_id, encode_any_body(span))
    if len(encoded) > MAX_JSON_BYTES or (b"\\" in encoded and b"\\u0000" in encoded):  # one byte is found sooner
        check_json_size(body_of(span, encoded), f"span {span_id}")
    return encoded


def span_json(rollout_id: str, attempt_id: str, sequence_id: int, body: bytes) -> bytes:
    """A whole span as JSON, from its columns and its body."""
    head = f'{{"rollout_id":"{rollout_id}","attempt_id":"{attempt_id}","sequence_id":{sequence_id},'
    return head.encode() + body[1:]


def body_of(span: SpanOrPlain, encoded: bytes) -> bytes:
    """The JSON of a span without its columns: what ``span_json`` puts in front is cut off.

    Args:
        span: its ids are valid ones, so that JSON writes each of their characters as one byte.
        encoded: the same span as ``encode_span`` returns it.
    """
    columns = len(span.rollout_id) + len(span.attempt_id) + len(str(span.sequence_id)) + _HEAD_BYTES
    return b"{" + encoded[columns:]


_HEAD_BYTES = len('{"rollout_id":"","attempt_id":"","sequence_id":,')


_TOLD_APART = ("name", "parent_id", "status", "attributes", "events", "links", "start_time", "end_time")


def same_body(one: bytes, other: bytes) -> bool:
    """Whether two bodies tell of the same event. A repeat may differ in what it says of its resource and context."""
    if one == other:
        return True
    first, second = msgspec.json.decode(one), msgspec.json.decode(other)
    return all(first.get(field) == second.get(field) for field in _TOLD_APART)


def read_span(raw: bytes) -> Span:
    """The span that this JSON is, which the store has written."""
    span = decode_plain(raw)
    return Span.model_validate_json(raw) if span is None else span.to_span()


def encode_quickly(span: SpanOrPlain) -> bytes | None:
    """A whole span as JSON, if it is a plain one."""
    plain = plain_of(span)
    if plain is None:
        return None
    try:
        return encode_plain(plain)
    except UnicodeEncodeError:  # a lone surrogate: pydantic says where
        return None


def encode_any_body(span: SpanOrPlain) -> bytes:
    """The body of any span, checked until it is known that it can be read back. Raises as ``encode_span``."""
    what = f"span {span.span_id!r}"
    try:
        record = span.to_span() if isinstance(span, PlainSpan) else span
        body = _serializer.to_json(record, exclude=_COLUMNS, warnings="error")
        check_json_value(msgspec.json.decode(body), what)
        Span.model_validate_json(span_json("", "", 0, body))
    except TooLarge:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
        raise NotJson(f"{what} cannot be stored: {error}") from error  # pydantic's errors are ValueErrors
    for field in ("start_time", "end_time"):
        value = cast("float | None", getattr(span, field))
        if value is not None and not isfinite(value):
            raise InvalidValue(f"{field} of {what} is {value!r}; a time must be finite")
    for name, value in span.attributes.items():
        if str(name).startswith(_REWARDS) and isinstance(value, float) and not isfinite(value):
            raise InvalidValue(f"{name} of {what} is {value!r}; a reward must be finite (no reward is None, not NaN)")
    return body
