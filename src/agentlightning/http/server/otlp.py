"""Spans by OTLP/HTTP, as OpenTelemetry exporters send them (opentelemetry.io/docs/specs/otlp, "OTLP/HTTP").

The attributes ``agentlightning.rollout_id`` and ``agentlightning.attempt_id`` name the attempt of a span;
``agentlightning.span_sequence_id`` is optional. They stand on the span or, for all spans of a process, on its resource.
The store takes the spans that it can. The reply counts the others in ``partial_success`` and names their reasons.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pydantic import ValidationError

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    InvalidValue,
    NotJson,
    TooLarge,
)
from agentlightning.http.server.decoder import Decoder
from agentlightning.http.server.exchange import Exchange, Reply
from agentlightning.http.server.intake import in_parts
from agentlightning.http.server.limits import Load
from agentlightning.http.server.otlp_body import JSON_MEDIA, NO_TEXT, PROTOBUF_MEDIA, read_request
from agentlightning.semconv import LightningResourceAttributes, LightningSpanAttributes
from agentlightning.store.arguments import check_batch, span_drafts
from agentlightning.store.base import LightningStore
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.refusals import send_apart
from agentlightning.store.span_json import read_span, span_json
from agentlightning.types import Event, Link, OtelResource, Span, SpanContext, StatusCode, TraceStatus
from agentlightning.types.attributes import dropped_parts

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1 import trace_pb2


# --- Requests and replies ---------------------------------------------------------------------------

_ROLLOUT_ID = LightningResourceAttributes.ROLLOUT_ID.value
_ATTEMPT_ID = LightningResourceAttributes.ATTEMPT_ID.value
_SEQUENCE_ID = LightningResourceAttributes.SPAN_SEQUENCE_ID.value
_STATUS_CODES: Sequence[StatusCode] = ("UNSET", "OK", "ERROR")
_REASONS_SHOWN = 5
_NO_TEXT = re.compile(f"[\0{NO_TEXT}]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PLAIN = b"identity"
_LIGHT_BYTES = 16 * 1024
"""Up to this size the event loop reads a request itself. To make spans of protobuf takes longer than of JSON."""


async def answer_traces(store: LightningStore, load: Load, decoder: Decoder | None, exchange: Exchange) -> Reply:
    """Store the spans of an ``ExportTraceServiceRequest``, and answer in its encoding.

    Exporters retry after 429 and 503 with ``Retry-After``, and drop the spans after any other status.
    """
    media = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    answered_as = media if media in (PROTOBUF_MEDIA, JSON_MEDIA) else JSON_MEDIA
    encoding = exchange.headers.get(b"content-encoding", _PLAIN).lower()
    try:
        load.admit(exchange, "span")
        parts = await load.body_of(exchange)
        size = sum(map(len, parts))
        read = partial(take_in_traces, media, encoding, load.body_bytes)
        if decoder is None or (encoding == _PLAIN and size <= _LIGHT_BYTES):
            taken = list(read(b"".join(parts)))
            parts.clear()
        else:
            taken = await decoder.read(read, parts)
        load.grow(exchange, size + sum([draft.size for each in taken for draft in each.drafts]))
        reasons = await _store(store, taken)
    except AgentLightningError as error:
        headers = [(b"retry-after", b"1")] if error.status in (429, 503, 507) else []
        status = 400 if error.status == 422 else error.status
        return Reply(status, encode_refusal(answered_as, error), headers, content_type=answered_as)
    finally:
        load.give_back(exchange)
    return Reply(200, _encode_outcome(answered_as, reasons), content_type=answered_as)


async def _store(store: LightningStore, taken: Sequence[TakenIn]) -> list[str]:
    """Store spans; returns why some are not stored."""
    reasons = [reason for each in taken for reason in each.refused]
    drafts = [draft for each in taken for draft in each.drafts]

    async def note(refused: Sequence[SpanDraft], error: AgentLightningError) -> Sequence[SpanDraft]:
        reasons.extend(f"span {span.span_id}: {error.message[:200]}" for span in refused)
        return ()

    async def send_records(some: Sequence[SpanDraft]) -> object:
        return await store.add_many_spans([_record(each) for each in some])

    in_json = store.answering_in_json()
    send = send_records if in_json is None else in_json.add_span_drafts
    await send_apart(drafts, send, note, attempt_of=lambda span: (span.rollout_id, span.attempt_id))
    return reasons


def _record(draft: SpanDraft) -> Span:
    return read_span(span_json(draft.rollout_id, draft.attempt_id, draft.sequence_id, draft.body))


class TakenIn(NamedTuple):
    """Some of the spans of a request."""

    drafts: Sequence[SpanDraft]
    refused: Sequence[str] = ()
    """Why other spans of it are refused."""


def take_in_traces(media: bytes, encoding: bytes, limit: int, raw: bytes) -> Iterator[TakenIn]:
    """The spans of a request.

    Args:
        media: ``PROTOBUF_MEDIA`` or ``JSON_MEDIA``.
        encoding: the header ``Content-Encoding``, or ``identity``.
        limit: the most bytes that the body may have, unpacked, and all spans together, as the store keeps them.
        raw: the body.

    Raises:
        BadRequest, NotJson, UnsupportedMedia: it is no ``ExportTraceServiceRequest``.
        TooLarge: it has too many spans, fields or bytes.
    """
    if encoding not in (_PLAIN, b"gzip"):
        raise BadRequest(f"the body is encoded as {encoding[:80].decode('latin-1')!r}; send it as it is, or gzip")
    content = raw if encoding == _PLAIN else _inflate(raw, limit)
    drafts: list[SpanDraft] = []
    reasons: list[str] = []
    size = 0
    for span in _spans_in(media, content, reasons):
        try:
            [draft] = span_drafts([span])
        except AgentLightningError as error:
            reasons.append(f"span {span.span_id}: {error.message[:200]}")
            continue
        size += draft.size
        if size > limit:  # each span has its resource, which all of them share in the request
            raise TooLarge(f"the spans take more than {limit:,} bytes as JSON; send fewer at a time")
        drafts.append(draft)
    yield TakenIn((), reasons)
    yield from map(TakenIn, in_parts(drafts))


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


def _spans_in(media: bytes, content: bytes, reasons: list[str]) -> Iterator[Span]:
    """The spans of a request; why others of it are not among them is added to ``reasons``."""
    groups = read_request(media, content)
    check_batch([each for group in groups for each in group.spans], "spans")
    for head, members, refused in groups:
        reasons += refused
        given = _as_text(_attributes(head.resource.attributes), "", [])
        resource = OtelResource(attributes=given, schema_url=head.schema_url)
        for each in members:
            try:
                yield _convert(each, resource)
            except (ValidationError, InvalidValue) as error:
                reasons.append(f"span {each.name[:80]!r} is not valid: {str(error)[:200]}")


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
    changed: list[str] = []
    attributes = _as_text(attributes, "attributes.", changed)
    events = [
        Event(
            name=_as_text(event.name, f"events.{place}.name", changed),
            attributes=_as_text(_attributes(event.attributes), f"events.{place}.", changed),
            timestamp=_seconds(event.time_unix_nano),
        )
        for place, event in enumerate(span.events)
    ]
    name = _as_text(span.name, "name", changed)
    description = _as_text(span.status.message, "description", changed)
    if changed:
        attributes[LightningSpanAttributes.MENDED.value] = sorted(changed)
    cut = dropped_parts(span.dropped_attributes_count, span.dropped_events_count)
    if cut:
        attributes[LightningSpanAttributes.CUT.value] = cut
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=sequence_id or 0,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        name=name,
        status=TraceStatus(
            status_code=_STATUS_CODES[span.status.code] if 0 <= span.status.code < 3 else "UNSET",
            description=description or None,
        ),
        attributes=attributes,
        events=events,
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


def _as_text(value: Any, path: str, changed: list[str]) -> Any:
    """Replace what no database stores in a text, a list of texts, or names and values of attributes; note the paths."""
    if isinstance(value, dict):
        given = cast("dict[str, Any]", value)
        paths = {name: path + _NO_TEXT.sub(_REPLACEMENT, name) for name in given}
        return {
            _as_text(name, paths[name], changed): _as_text(each, paths[name], changed) for name, each in given.items()
        }
    texts: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not any(isinstance(each, str) and _NO_TEXT.search(each) for each in texts):
        return cast("Any", value)
    changed.append(path)
    better: list[Any] = [_NO_TEXT.sub(_REPLACEMENT, each) if isinstance(each, str) else each for each in texts]
    return better if texts is value else better[0]


def _seconds(nanoseconds: int) -> float | None:
    return nanoseconds / 1e9 if nanoseconds else None
