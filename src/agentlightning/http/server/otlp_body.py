"""The body of an ``ExportTraceServiceRequest``, read span by span, so that a malformed span costs only itself.

A parsed message takes far more memory than its bytes, so a message with too many fields is refused unparsed. Text that
no database stores is kept readable: what is none arrives as ``NO_TEXT``, which ``otlp`` replaces and marks.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from agentlightning.errors import AgentLightningError, NotJson, TooLarge, UnsupportedMedia
from agentlightning.http.codec import MAX_BODY_DEPTH, MAX_NODES, check_node_count, decode_strict

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from opentelemetry.proto.trace.v1 import trace_pb2

PROTOBUF_MEDIA = b"application/x-protobuf"
JSON_MEDIA = b"application/json"
NO_TEXT = "\ufdd0"
"""A character that Unicode reserves for a program's own use."""
_INT64_DIGITS = 19
_ID_FIELDS = {"traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id"}


class SpanGroup(NamedTuple):
    """The spans of one resource."""

    resource: trace_pb2.ResourceSpans
    """Without its spans."""

    spans: list[trace_pb2.Span]
    refused: list[str]
    """Why others of it could not be read."""


def _unreadable(error: Exception, spans: int) -> SpanGroup:
    """The group of a resource that cannot be read: all its spans are refused."""
    from opentelemetry.proto.trace.v1 import trace_pb2

    return SpanGroup(trace_pb2.ResourceSpans(), [], [f"its resource is not readable: {error!s:.200}"] * spans)


def read_request(media: bytes, content: bytes) -> list[SpanGroup]:
    """The spans of a request.

    Args:
        media: ``PROTOBUF_MEDIA`` or ``JSON_MEDIA``.
        content: the body, unpacked.

    Raises:
        NotJson: it is no ``ExportTraceServiceRequest``, apart from its spans.
        TooLarge: it has too many fields.
        UnsupportedMedia: it is neither protobuf nor JSON.
    """
    from google.protobuf.json_format import ParseError
    from google.protobuf.message import DecodeError

    try:
        if media == PROTOBUF_MEDIA:
            return list(_read_protobuf(content))
        if media == JSON_MEDIA:
            return list(_read_json(content))
    except AgentLightningError:
        raise
    except (DecodeError, ParseError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise NotJson(f"the body is no ExportTraceServiceRequest: {str(error)[:300]}") from error
    shown = media[:80].decode("latin-1")
    raise UnsupportedMedia(f"the body is {shown!r}; send application/x-protobuf or application/json")


# --- Protobuf ----------------------------------------------------------------------------------------


def _read_protobuf(content: bytes) -> Iterator[SpanGroup]:
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1 import trace_pb2

    check_fields(content, ExportTraceServiceRequest.DESCRIPTOR, MAX_NODES)
    try:
        for group in ExportTraceServiceRequest.FromString(content).resource_spans:
            yield SpanGroup(group, [span for scope in group.scope_spans for span in scope.spans], [])
        return
    except DecodeError:  # one text that is not UTF-8 is enough; find the span that has it
        pass
    for part in _parts(content, 1):
        spans = [span for scope in _parts(part, 2) for span in _parts(scope, 2)]
        try:
            group = SpanGroup(trace_pb2.ResourceSpans(), [], [])
            for head in _parts(part, 1):
                group.resource.resource.MergeFromString(head)
            group.resource.schema_url = b"".join(_parts(part, 3)).decode()
        except (DecodeError, UnicodeDecodeError) as error:
            yield _unreadable(error, len(spans))
            continue
        for span in spans:
            try:
                group.spans.append(trace_pb2.Span.FromString(span))
            except DecodeError as error:
                group.refused.append(f"a span is not readable: {str(error)[:200]}")
        yield group


def _parts(content: bytes, number: int) -> Iterator[bytes]:
    """The contents of the length-delimited fields of a message that have this number."""
    position = 0
    while position < len(content):
        tag, position = _varint(content, position)
        end = _end_of_field(content, tag, position)
        if end > len(content):
            raise IndexError(end)
        if tag == number << 3 | _DELIMITED:
            _, begin = _varint(content, position)
            yield content[begin:end]
        position = end


# --- The number of fields, counted on the bytes -------------------------------------------------------

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
                behind = _end_of_field(content, tag, position)
                within = fields.get(tag >> 3)
                if within is not None and tag & 7 == _DELIMITED:
                    begin = _varint(content, position)[1]
                    if begin < behind:
                        waiting.append((begin, behind, within))
                position = behind
            if position > end:
                raise IndexError(position)
    except LookupError as error:
        raise NotJson(f"the body is no {message.name}: its fields are not whole") from error


def _end_of_field(content: bytes, tag: int, position: int) -> int:
    """The position behind a field whose tag ends at ``position``."""
    if tag & 7 == _DELIMITED:
        length, position = _varint(content, position)
        return position + length
    if tag & 7 == _VARINT:
        return _varint(content, position)[1]
    return position + _OTHER_BYTES[tag & 7]


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


# --- JSON --------------------------------------------------------------------------------------------

_ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u(?:0000|[dD][89a-fA-F][0-9a-fA-F]{2}))|\\."
)
"""A pair of surrogates; or half of one, or NUL, the only group; or another escape, so that one backslash hides the
next."""


def _read_json(content: bytes) -> Iterator[SpanGroup]:
    from google.protobuf.json_format import ParseDict, ParseError
    from opentelemetry.proto.trace.v1 import trace_pb2

    for group in _objects(_decode(_whole_text(content)), "resourceSpans", "resource_spans"):
        scopes = list(_objects(group, "scopeSpans", "scope_spans"))
        head = {name: value for name, value in group.items() if name not in ("scopeSpans", "scope_spans")}
        spans = [span for scope in scopes for span in _items(scope, "spans")]
        try:
            read = SpanGroup(ParseDict(head, trace_pb2.ResourceSpans(), ignore_unknown_fields=True), [], [])
        except (ParseError, ValueError, TypeError, AttributeError) as error:
            yield _unreadable(error, len(spans))
            continue
        for span in spans:
            try:
                if not isinstance(span, dict):
                    raise TypeError("it is not an object")
                parsed = ParseDict(_with_base64_ids(span), trace_pb2.Span(), ignore_unknown_fields=True)
                read.spans.append(parsed)
            except (ParseError, ValueError, TypeError, AttributeError) as error:
                name = cast("dict[str, Any]", span).get("name") if isinstance(span, dict) else span
                read.refused.append(f"span {str(name)[:80]!r} is not readable: {str(error)[:200]}")
        yield read


class _Ambiguous(dict[str, Any]):
    """An object that has a key twice."""


def _decode(content: bytes) -> Any:
    """The value of strict JSON; of other JSON a value whose bad parts are still seen to be bad, span by span.

    Numbers that are none of 64 bits become texts, as OTLP writes such numbers, and ``ParseDict`` judges them.
    """
    check_node_count(content, "the body")
    try:
        return decode_strict(content)
    except (NotJson, TooLarge) as error:
        try:
            return json.loads(
                content, object_pairs_hook=_object, parse_constant=str, parse_int=_int, parse_float=_float
            )
        except (ValueError, RecursionError):
            raise error from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Ambiguous(made)


def _int(text: str) -> int | str:
    return int(text) if len(text) <= _INT64_DIGITS else text


def _float(text: str) -> float | str:
    value = float(text)
    return value if isfinite(value) else text


def _objects(holder: Any, *names: str) -> Iterator[dict[str, Any]]:
    """The objects in a list of an object, which has one of these names; none if it is absent."""
    for each in _items(holder, *names):
        if not isinstance(each, dict):
            raise TypeError(f"{names[0]} holds {str(each)[:80]!r}; it must hold objects")
        yield cast("dict[str, Any]", each)


def _items(holder: Any, *names: str) -> Iterator[Any]:
    """The items of such a list, whatever they are."""
    if not isinstance(holder, dict):
        raise TypeError(f"{str(holder)[:80]!r} is not an object")
    for name in dict.fromkeys(names):
        values = cast("dict[str, Any]", holder).get(name)
        if values is not None and not isinstance(values, list):
            raise TypeError(f"{name} is {str(values)[:80]!r}; it must be a list")
        yield from cast("list[Any]", values or [])


def _whole_text(content: bytes) -> bytes:
    """The JSON with ``NO_TEXT`` in place of what no database stores: NUL, half a pair of surrogates, other bytes than
    UTF-8."""
    if not content.isascii():
        text = content.decode("utf-8", "surrogateescape")
        content = re.sub("[\udc80-\udcff]+", NO_TEXT, text).encode()
    if b"\\u" in content:
        content = _ESCAPES.sub(lambda found: NO_TEXT.encode() if found[1] else found[0], content)
    return content


def _with_base64_ids(value: Any, depth: int = MAX_BODY_DEPTH) -> Any:
    """The JSON form has hexadecimal ids, while protobuf's own JSON has base64 for bytes.

    Raises:
        ValueError: an object has a key twice, or objects are nested too deeply.
    """
    if isinstance(value, _Ambiguous) or depth == 0:
        raise ValueError("it is nested too deeply" if depth == 0 else "an object in it has a key twice")
    if isinstance(value, list):
        return [_with_base64_ids(each, depth - 1) for each in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    return {
        name: base64.b64encode(bytes.fromhex(each)).decode()
        if name in _ID_FIELDS and isinstance(each, str)
        else _with_base64_ids(each, depth - 1)
        for name, each in fields.items()
    }
