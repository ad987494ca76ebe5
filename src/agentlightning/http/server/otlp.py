"""Spans by OTLP/HTTP, as OpenTelemetry exporters send them (opentelemetry.io/docs/specs/otlp, "OTLP/HTTP").

The attributes ``agentlightning.rollout_id`` and ``agentlightning.attempt_id`` name the attempt of a span;
``agentlightning.span_sequence_id`` is optional. They stand on the span or, for all spans of a process, on its resource.
The store takes the spans that it can. The reply counts the others in ``partial_success`` and names their reasons.
"""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    InvalidValue,
    NotJson,
    TooLarge,
    UnsupportedMedia,
)
from agentlightning.http.codec import MAX_NODES, decode_strict
from agentlightning.http.server.exchange import Exchange, Reply
from agentlightning.http.server.limits import Load
from agentlightning.semconv import LightningResourceAttributes
from agentlightning.store.arguments import check_batch
from agentlightning.store.base import LightningStore
from agentlightning.store.refusals import send_apart
from agentlightning.types import Event, Link, OtelResource, Span, SpanContext, StatusCode, TraceStatus

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1 import trace_pb2


# --- The number of fields of a protobuf message, counted on its bytes -----------------------------
# A parsed message takes far more memory than its bytes, so a message with too many fields is refused unparsed.

_SMALLEST_FIELD_BYTES = 2
_LONGEST_VARINT = 70
_VARINT, _DELIMITED = 0, 2
_OTHER_BYTES = {1: 8, 3: 0, 4: 0, 5: 4}
"""Bytes after the tag in fields of the other kinds. The fields within a group (3, 4) are counted like all others."""

_Shape = dict[int, Any]
"""The fields of a message that are messages themselves, by number."""


def check_fields(content: bytes, message: Descriptor, most: int) -> None:
    """Count the fields of a message and of the messages within it, before it is parsed.

    Args:
        content: the bytes of the message.
        message: its type.
        most: the most fields that it may have.

    Raises:
        TooLarge: it has more.
        NotJson: the bytes end within a field. Few fields do not prove that the message is well-formed.
    """
    if len(content) < most * _SMALLEST_FIELD_BYTES:
        return
    count = 0
    waiting: list[tuple[int, int, Mapping[int, Any]]] = [(0, len(content), _shape_of(message, {}))]
    try:
        while waiting:
            position, end, fields = waiting.pop()
            while position < end:
                count += 1
                if count > most:
                    raise TooLarge(f"the body has more than {most:,} fields; send fewer spans at a time")
                tag, position = _varint(content, position)
                if tag & 7 == _DELIMITED:
                    length, position = _varint(content, position)
                    within = fields.get(tag >> 3)
                    if within is not None and length:
                        waiting.append((position, position + length, within))
                    position += length
                elif tag & 7 == _VARINT:
                    _, position = _varint(content, position)
                else:
                    position += _OTHER_BYTES[tag & 7]
            if position > end:
                raise IndexError(position)
    except LookupError as error:
        raise NotJson(f"the body is no {message.name}: its fields are not whole") from error


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number, and the position after it. Raises ``LookupError`` if the bytes end before it does."""
    value = shift = 0
    while shift < _LONGEST_VARINT:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
    raise IndexError(position)


def _shape_of(message: Descriptor, known: dict[str, _Shape]) -> _Shape:
    """The fields of a message type that are messages. Types may contain each other, so shapes are shared by name."""
    shape = known.get(message.full_name)
    if shape is None:
        shape = known[message.full_name] = {}
        for field in message.fields:
            if field.message_type is not None:
                shape[field.number] = _shape_of(field.message_type, known)
    return shape


# --- Requests and replies ---------------------------------------------------------------------------

PROTOBUF_MEDIA = b"application/x-protobuf"
JSON_MEDIA = b"application/json"
_ROLLOUT_ID = LightningResourceAttributes.ROLLOUT_ID.value
_ATTEMPT_ID = LightningResourceAttributes.ATTEMPT_ID.value
_SEQUENCE_ID = LightningResourceAttributes.SPAN_SEQUENCE_ID.value
_STATUS_CODES: Sequence[StatusCode] = ("UNSET", "OK", "ERROR")
_REASONS_SHOWN = 5
_LARGE_BYTES = 256 * 1024
"""From this size on a request is parsed in a thread, because parsing would delay other requests noticeably."""
_ID_FIELDS = {"traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id"}


async def answer_traces(store: LightningStore, load: Load, exchange: Exchange) -> Reply:
    """Store the spans of an ``ExportTraceServiceRequest``, and answer in its encoding.

    Exporters retry after 429 and 503 with ``Retry-After``, and drop the spans after any other status.
    """
    media = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    answered_as = media if media in (PROTOBUF_MEDIA, JSON_MEDIA) else JSON_MEDIA
    reasons: list[str] = []

    async def note(refused: Sequence[Span], error: AgentLightningError) -> None:
        reasons.extend(f"span {span.span_id}: {error.message[:200]}" for span in refused)

    try:
        load.admit(exchange, "span")
        content = await _content(load, exchange)
        if len(content) < _LARGE_BYTES:
            spans = _spans_in(media, content, reasons)
        else:
            spans = await asyncio.to_thread(_spans_in, media, content, reasons)
        await send_apart(spans, store.add_many_spans, note, attempt_of=lambda span: (span.rollout_id, span.attempt_id))
    except AgentLightningError as error:
        headers = [(b"retry-after", b"1")] if error.status in (429, 503, 507) else []
        status = 400 if error.status == 422 else error.status
        return Reply(status, encode_refusal(answered_as, error), headers, content_type=answered_as)
    finally:
        load.give_back(exchange)
    return Reply(200, _encode_outcome(answered_as, reasons), content_type=answered_as)


async def _content(load: Load, exchange: Exchange) -> bytes:
    """The body of a request, unpacked."""
    raw = await load.body_of(exchange)
    encoding = exchange.headers.get(b"content-encoding", b"identity").lower()
    if encoding == b"identity":
        return raw
    if encoding != b"gzip":
        raise BadRequest(f"the body is encoded as {encoding[:80].decode('latin-1')!r}; send it as it is, or gzip")
    content = await asyncio.to_thread(_inflate, raw, load.body_bytes)
    load.grow(exchange, len(raw) + len(content))
    return content


def _inflate(raw: bytes, limit: int) -> bytes:
    """The content of gzip data. No more than ``limit`` bytes of it are unpacked."""
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(raw, limit + 1)
    except zlib.error as error:
        raise NotJson(f"the body is not gzip data: {error}") from error
    if len(content) > limit or unpacker.unconsumed_tail:
        raise TooLarge(f"the body unpacks to more than {limit:,} bytes; send fewer spans at a time")
    if not unpacker.eof or unpacker.unused_data:
        raise NotJson("the body is not one whole piece of gzip data")
    return content


def _spans_in(media: bytes, content: bytes, reasons: list[str]) -> list[Span]:
    """The spans of a request; why others of it are not among them is added to ``reasons``."""
    spans: list[Span] = []
    groups = [
        (group, [span for scope in group.scope_spans for span in scope.spans])
        for group in _read(media, content).resource_spans
    ]
    check_batch([each for _, members in groups for each in members], "spans")
    for group, members in groups:
        resource = OtelResource(attributes=_attributes(group.resource.attributes), schema_url=group.schema_url)
        for each in members:
            try:
                spans.append(_convert(each, resource))
            except (ValidationError, InvalidValue) as error:
                reasons.append(f"span {each.name[:80]!r} is not valid: {str(error)[:200]}")
    return spans


def _encode_outcome(media: bytes, reasons: Sequence[str]) -> bytes:
    """The ``ExportTraceServiceResponse``: how many spans were not stored, and why."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    message = "; ".join(reasons[:_REASONS_SHOWN])
    if media == JSON_MEDIA:
        partial = {"rejectedSpans": str(len(reasons)), "errorMessage": message}
        return json.dumps({"partialSuccess": partial} if reasons else {}).encode()
    response = ExportTraceServiceResponse()
    if reasons:
        response.partial_success.rejected_spans = len(reasons)
        response.partial_success.error_message = message
    return response.SerializeToString()


def encode_refusal(media: bytes, error: AgentLightningError) -> bytes:
    """A ``google.rpc.Status`` with the message of an error, in the encoding of the request.

    The message has two fields that matter here: 1, ``code`` (3: INVALID_ARGUMENT; 14: UNAVAILABLE), a varint;
    and 2, ``message``, a string.
    """
    code = 14 if error.status in (429, 503, 507) else 3
    if media == JSON_MEDIA:
        return json.dumps({"code": code, "message": error.message}).encode()
    text = error.message.encode()[:2000].decode(errors="ignore").encode()  # whole characters
    length = bytes([len(text)]) if len(text) < 128 else bytes([len(text) & 0x7F | 0x80, len(text) >> 7])
    return b"\x08" + bytes([code]) + b"\x12" + length + text


# --- From OTLP to spans ------------------------------------------------------------------------------


def _read(media: bytes, content: bytes) -> ExportTraceServiceRequest:
    from google.protobuf.json_format import ParseDict, ParseError
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    try:
        if media == PROTOBUF_MEDIA:
            check_fields(content, ExportTraceServiceRequest.DESCRIPTOR, MAX_NODES)
            request.ParseFromString(content)
        elif media == JSON_MEDIA:
            decoded = decode_strict(content)
            if not isinstance(decoded, dict):
                raise TypeError("it is not an object")
            ParseDict(_with_base64_ids(decoded), request, ignore_unknown_fields=True)
        else:
            shown = media[:80].decode("latin-1")
            raise UnsupportedMedia(f"the body is {shown!r}; send application/x-protobuf or application/json")
    except AgentLightningError:
        raise
    except (DecodeError, ParseError, ValueError, TypeError, AttributeError) as error:
        raise NotJson(f"the body is no ExportTraceServiceRequest: {str(error)[:300]}") from error
    return request


def _with_base64_ids(value: Any) -> Any:
    """The JSON form has hexadecimal ids, while protobuf's own JSON has base64 for bytes."""
    if isinstance(value, list):
        return [_with_base64_ids(each) for each in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    return {
        name: base64.b64encode(bytes.fromhex(each)).decode()
        if name in _ID_FIELDS and isinstance(each, str)
        else _with_base64_ids(each)
        for name, each in fields.items()
    }


def _convert(span: trace_pb2.Span, resource: OtelResource) -> Span:
    attributes = _attributes(span.attributes)
    said = {**resource.attributes, **attributes}
    rollout_id, attempt_id, sequence_id = said.get(_ROLLOUT_ID), said.get(_ATTEMPT_ID), said.get(_SEQUENCE_ID)
    if not isinstance(rollout_id, str) or not isinstance(attempt_id, str):
        raise InvalidValue(f"it does not name its attempt: set the attributes {_ROLLOUT_ID} and {_ATTEMPT_ID}")
    if sequence_id is not None and (not isinstance(sequence_id, int) or sequence_id < 0):
        raise InvalidValue(f"{_SEQUENCE_ID} is {sequence_id!r:.80}; give 0 or more")
    if len(span.trace_id) != 16 or len(span.span_id) != 8:
        raise InvalidValue("its trace id or span id has a wrong length")
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=sequence_id or 0,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        name=span.name,
        status=TraceStatus(
            status_code=_STATUS_CODES[span.status.code] if 0 <= span.status.code < 3 else "UNSET",
            description=span.status.message or None,
        ),
        attributes=attributes,
        events=[
            Event(name=event.name, attributes=_attributes(event.attributes), timestamp=_seconds(event.time_unix_nano))
            for event in span.events
        ],
        links=[Link(context=_context(link), attributes=_attributes(link.attributes)) for link in span.links],
        start_time=_seconds(span.start_time_unix_nano),
        end_time=_seconds(span.end_time_unix_nano),
        context=_context(span),
        parent=None,
        resource=resource,
    )


def _context(of: trace_pb2.Span | trace_pb2.Span.Link) -> SpanContext:
    pairs = (part.strip().partition("=") for part in of.trace_state.split(",") if "=" in part)
    state = {key: value for key, _, value in pairs}
    return SpanContext(trace_id=of.trace_id.hex(), span_id=of.span_id.hex(), is_remote=False, trace_state=state)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    values = ((pair.key, _value(pair.value)) for pair in pairs)
    return {key: value for key, value in values if value is not None}


def _value(value: AnyValue) -> Any:
    """An attribute's value; what our attributes do not have (objects, mixed lists, bytes) becomes text."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        items = [_value(each) for each in value.array_value.values]
        uniform = any(all(type(each) is kind for each in items) for kind in (str, bool, int, float))
        return items if uniform else json.dumps(items)
    if kind == "kvlist_value":
        return json.dumps({pair.key: _value(pair.value) for pair in value.kvlist_value.values})
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    return None if kind is None else getattr(value, kind)


def _seconds(nanoseconds: int) -> float | None:
    return nanoseconds / 1e9 if nanoseconds else None
