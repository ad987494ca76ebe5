"""``PlainSpan``: a span without pydantic, for the paths on which every microsecond per span counts.

Tracer, proxy, client, server and spool all hand spans on in this one form. It has the fields of ``Span`` and the same
JSON, and msgspec reads, checks and writes it in a tenth of the time that pydantic takes. Nearly every span is plain:
no fields beyond those of ``Span``, each of exactly the declared type, and lists of one type in attributes. A span that
is not plain goes through pydantic, which also finds out what is wrong with it. A test holds the two to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, TypeAlias, TypeVar, cast

import msgspec
from msgspec.structs import asdict
from pydantic import BaseModel

from agentlightning.types.spans import Event, Link, OtelResource, Span, SpanContext, StatusCode, TraceStatus

MAX_SEQUENCE_ID = 2**52
"""The largest span sequence id that a caller may give. Ids issued after it stay below 2^53, which every JSON reader
keeps exact."""

Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""The integers that every database keeps."""

PlainValue: TypeAlias = str | bool | Int64 | float | list[str | bool | Int64 | float]
"""The value of an attribute. msgspec cannot say "a list of one type", so ``has_plain_values`` checks that."""

PlainAttributes: TypeAlias = dict[str, PlainValue]


class PlainStatus(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of ``TraceStatus``."""

    status_code: StatusCode
    description: str | None = None


class PlainContext(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of ``SpanContext``."""

    trace_id: str
    span_id: str
    is_remote: bool
    trace_state: dict[str, str]


class PlainEvent(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of ``Event``."""

    name: str
    attributes: PlainAttributes
    timestamp: float | None = None


class PlainLink(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of ``Link``."""

    context: PlainContext
    attributes: PlainAttributes | None = None


class PlainResource(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of ``OtelResource``."""

    attributes: PlainAttributes
    schema_url: str


class PlainSpan(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of ``Span``, in the same order, which is also the order of its JSON.

    Whoever constructs one vouches for the types; ``plain_of`` checks them.
    """

    rollout_id: str
    attempt_id: str
    sequence_id: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQUENCE_ID)]
    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    status: PlainStatus
    attributes: PlainAttributes
    events: list[PlainEvent]
    links: list[PlainLink]
    start_time: float | None
    end_time: float | None
    context: PlainContext | None
    parent: PlainContext | None
    resource: PlainResource

    def to_span(self) -> Span:
        """The same span as the public record. Attributes are shared with it, not copied."""
        fields = asdict(self)
        fields["status"] = _construct(TraceStatus, asdict(self.status))
        fields["events"] = [_construct(Event, asdict(each)) for each in self.events]
        fields["links"] = [
            _construct(Link, {"context": _context(each.context), "attributes": each.attributes}) for each in self.links
        ]
        fields["context"] = _context(self.context)
        fields["parent"] = _context(self.parent)
        fields["resource"] = _construct(OtelResource, asdict(self.resource))
        return _construct(Span, fields)


SpanOrPlain: TypeAlias = Span | PlainSpan
"""A span in the one form or in the other."""

AnySpan = TypeVar("AnySpan", bound=SpanOrPlain)
"""Stores take both forms, and give back the one that they were given."""

encode_plain = cast("Any", msgspec.json.Encoder().encode)
"""A plain span as JSON (bytes). Numbers that are not finite become null: ``plain_of`` and ``decode_plain`` have refused
them before."""

_decode = msgspec.json.Decoder(PlainSpan).decode


class _CheckedSpan(PlainSpan):
    """msgspec returns an object of the wanted type as it is, and checks one of another type field by field."""


def plain_of(span: Span | PlainSpan) -> PlainSpan | None:
    """The span as a ``PlainSpan`` whose types and numbers were checked; None if it is not plain.

    Both kinds of span can hold anything by now: Python checks no type when an attribute is set.
    """
    try:
        if not has_plain_values(span):
            return None
        if type(span) is PlainSpan:
            msgspec.convert(span, _CheckedSpan, from_attributes=True)
            return span
        if type(span) is Span and _is_made_of_records(span):
            return msgspec.convert(span, PlainSpan, from_attributes=True)
    except (msgspec.ValidationError, AttributeError, TypeError, RecursionError):
        pass  # what is wrong with it is found by pydantic
    return None


def decode_plain(raw: bytes) -> PlainSpan | None:
    """The plain span that this JSON is; None if it is none, or no JSON.

    Keys that appear twice in an object and NUL characters are not noticed: code that reads what strangers sent has to
    look for them.
    """
    try:
        span = _decode(raw)
        return span if has_plain_values(span) else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def has_plain_values(span: Span | PlainSpan) -> bool:
    """Whether numbers are finite, and attributes of exactly the plain types; msgspec alone does not say so."""
    start, end = span.start_time, span.end_time
    return (
        (start is None or isfinite(start))
        and (end is None or isfinite(end))
        and _are_plain(span.attributes)
        and _are_plain(span.resource.attributes)
        and (not span.events or all(map(_is_plain_event, span.events)))
        and (not span.links or all(each.attributes is None or _are_plain(each.attributes) for each in span.links))
    )


def count_keys(span: PlainSpan) -> int:
    """How many keys all objects in the span's JSON have together."""
    keys = 16 + 2 + 2 + len(span.attributes) + len(span.resource.attributes)
    for context in (span.context, span.parent):
        if context is not None:
            keys += 4 + len(context.trace_state)
    for event in span.events:
        keys += 3 + len(event.attributes)
    for link in span.links:
        keys += 2 + 4 + len(link.context.trace_state) + len(link.attributes or ())
    return keys


_SIMPLE: frozenset[type[Any]] = frozenset({str, bool, int})
_NAMES: frozenset[type[Any]] = frozenset({str})


def _are_plain(attributes: Mapping[str, Any]) -> bool:
    """Sets of types, because they are built without a step of Python for each attribute."""
    if not set(map(type, attributes)) <= _NAMES:
        return False
    values = attributes.values()
    # Nearly all are simple. That integers fit is found by msgspec.
    return set(map(type, values)) <= _SIMPLE or all(map(_is_plain_value, values))


def _is_plain_value(value: Any) -> bool:
    kind = cast("type[Any]", type(value))
    if kind is list:
        kinds = set(map(type, cast("list[Any]", value)))
        return len(kinds) <= 1 and (kinds <= _SIMPLE or (kinds == {float} and all(map(isfinite, value))))
    return kind in _SIMPLE or (kind is float and isfinite(value))


def _is_plain_event(event: Event | PlainEvent) -> bool:
    return _are_plain(event.attributes) and (event.timestamp is None or isfinite(event.timestamp))


def _is_made_of_records(span: Span) -> bool:
    """Whether the parts of a span are the records that pydantic would have made, without fields of others."""
    events, links, context, parent = span.events, span.links, span.context, span.parent
    if (
        type(span.status) is not TraceStatus
        or type(span.resource) is not OtelResource
        or type(events) is not list
        or type(links) is not list
        or span.__pydantic_extra__
        or span.status.__pydantic_extra__
    ):
        return False
    if not events and not links and context is None and parent is None:
        return True
    contexts = [each for each in (context, parent, *(link.context for link in links)) if each is not None]
    return (
        all(type(each) is Event and not each.__pydantic_extra__ for each in events)
        and all(type(each) is Link and not each.__pydantic_extra__ for each in links)
        and all(type(each) is SpanContext and not each.__pydantic_extra__ for each in contexts)
    )


# --- Public records, built without checking again -------------------------------------------------

_M = TypeVar("_M", bound=BaseModel)
_new = object.__new__
_set = object.__setattr__
_FIELDS: dict[type[BaseModel], tuple[set[str], bool]] = {
    model: (set(model.model_fields), model.model_config.get("extra") == "allow")
    for model in (Span, SpanContext, TraceStatus, Event, Link, OtelResource)
}
"""For each model the names of its fields, and whether it takes others, too."""


def _construct(model: type[_M], fields: dict[str, Any]) -> _M:
    """What pydantic's ``model_construct`` makes when no field is missing, in a third of the time."""
    names, takes_extra = _FIELDS[model]
    made = _new(model)
    _set(made, "__dict__", fields)
    _set(made, "__pydantic_fields_set__", set(names))
    _set(made, "__pydantic_extra__", {} if takes_extra else None)
    _set(made, "__pydantic_private__", None)
    return made


def _context(context: PlainContext | None) -> SpanContext | None:
    return None if context is None else _construct(SpanContext, asdict(context))
