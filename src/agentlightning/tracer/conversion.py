"""Converts spans of the OpenTelemetry SDK into our spans, cheaply.

The result equals that of ``Span.from_opentelemetry`` (a test compares the two), in a tenth of the time: the SDK has
checked the values of its span, so the records are built without checking them again. Values that stores refuse are
changed on the way (see `agentlightning.tracer.sanitize`).
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import BaseModel

from agentlightning.errors import InvalidValue
from agentlightning.tracer import sanitize
from agentlightning.types import Event, Link, OtelResource, Span, SpanContext, TraceStatus
from agentlightning.types.otel import convert_attributes

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource as OtelSdkResource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext as OtelSpanContext


_M = TypeVar("_M", bound=BaseModel)
_SHAPES: dict[type[BaseModel], tuple[set[str], bool]] = {
    model: (set(model.model_fields), model.model_config.get("extra") == "allow")
    for model in (Span, SpanContext, TraceStatus)
}
"""For each model the names of its fields, which are always all set, and whether it takes others, too."""
_new = object.__new__
_set = object.__setattr__
_PLAIN_START, _PLAIN_END = -(2**63), 2**63
_REWARDS = ("agentlightning.reward", "reward")
_STATUS_CODES = ("UNSET", "OK", "ERROR")
"""By the values of OpenTelemetry's enumeration."""


def put_together(model: type[_M], fields: dict[str, Any]) -> _M:
    """An instance of a model whose fields are known to be valid, all given, and from now on its own.

    It is what pydantic's ``model_construct`` makes when no field is missing, in a third of the time.
    """
    names, has_extra = _SHAPES[model]
    made = _new(model)
    _set(made, "__dict__", fields)
    _set(made, "__pydantic_fields_set__", names)
    _set(made, "__pydantic_extra__", {} if has_extra else None)
    _set(made, "__pydantic_private__", None)
    return made


class SpanConverter:
    """Converts the spans of one process. Those of the same OpenTelemetry resource share one record of it."""

    def __init__(self) -> None:
        self._resource: tuple[OtelSdkResource, OtelResource] | None = None

    def convert(self, src: ReadableSpan, rollout_id: str, attempt_id: str) -> Span:
        """The span without a sequence id, sanitized where stores would refuse it.

        Raises:
            InvalidValue: it has no span context.
        """
        context = src.context
        if context is None:
            raise InvalidValue(f"the span {src.name!r} has no span context; only a span that a tracer made can be kept")
        attributes, odd = _attributes(src)
        own_context = _context(context)
        parent = None if src.parent is None else _context(src.parent)
        status = src.status
        span = put_together(
            Span,
            {
                "rollout_id": rollout_id,
                "attempt_id": attempt_id,
                "sequence_id": 0,
                "trace_id": own_context.trace_id,
                "span_id": own_context.span_id,
                "parent_id": None if parent is None else parent.span_id,
                "name": src.name,
                "status": put_together(
                    TraceStatus,
                    {"status_code": _STATUS_CODES[status.status_code.value], "description": status.description},
                ),
                "attributes": attributes,
                # The properties copy under a lock, 5 µs each, and mostly there is nothing to copy.
                "events": [Event.from_opentelemetry(each) for each in src.events] if src._events else [],  # pyright: ignore[reportPrivateUsage]
                "links": [Link.from_opentelemetry(each) for each in src.links] if src._links else [],  # pyright: ignore[reportPrivateUsage]
                "start_time": None if src.start_time is None else src.start_time / 1e9,
                "end_time": None if src.end_time is None else src.end_time / 1e9,
                "context": own_context,
                "parent": parent,
                "resource": self._resource_of(src.resource),
            },
        )
        if odd or sanitize.is_odd_name(src.name) or status.description is not None or span.events or span.links:
            _sanitize(span)
        return span

    def _resource_of(self, src: OtelSdkResource) -> OtelResource:
        known = self._resource
        if known is None or known[0] is not src:
            known = self._resource = (src, OtelResource.from_opentelemetry(src))
        return known[1]


def _context(src: OtelSpanContext) -> SpanContext:
    return put_together(
        SpanContext,
        {
            "trace_id": f"{src.trace_id:032x}",
            "span_id": f"{src.span_id:016x}",
            "is_remote": src.is_remote,
            "trace_state": dict(src.trace_state) if src.trace_state else {},
        },
    )


def _attributes(src: ReadableSpan) -> tuple[dict[str, Any], bool]:
    """The attributes, and whether they may contain something that stores refuse."""
    if not src.attributes:
        return {}, False
    attributes: dict[Any, Any] = dict(src.attributes.copy())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]
    size, odd, foreign = 0, False, False
    for name, value in attributes.items():
        kind = cast("type[object]", type(value))
        if kind is str:
            size += len(value)
            odd = odd or "\0" in value or not value.isascii()
        elif kind is float:
            odd = odd or not isfinite(value)
        elif kind is int:
            odd = odd or not _PLAIN_START <= value < _PLAIN_END
        elif kind is not bool:
            foreign = True
        odd = odd or "\0" in name or not name.isascii()
    if foreign:
        attributes = convert_attributes(attributes)
    return attributes, odd or foreign or size > sanitize.CHARACTERS_LIMIT


def _sanitize(span: Span) -> None:
    """Change what stores refuse in place, and list the changes in the span."""
    changed = sanitize.sanitize_values(span.attributes)
    for field, holder in (("name", span), ("description", span.status)):
        text = getattr(holder, field)
        if text is not None and not sanitize.fits(text):
            setattr(holder, field, sanitize.sanitize_text(text))
            changed.append(field)
    for position, event in enumerate(span.events):
        changed += sanitize.sanitize_values(event.attributes, f"events.{position}")
        if not sanitize.fits(event.name):
            event.name = sanitize.sanitize_text(event.name)
            changed.append(f"events.{position}.name")
    for position, link in enumerate(span.links):
        if link.attributes is not None:
            changed += sanitize.sanitize_values(link.attributes, f"links.{position}")
    changed += _cut_to_size(span)
    if changed:
        sanitize.mark(span.attributes, changed)


def _cut_to_size(span: Span) -> list[str]:
    parts = [span.attributes, *(event.attributes for event in span.events)]
    changed: list[str] = []
    if len(span.name) > sanitize.NAME_CHARACTERS:
        span.name = span.name[: sanitize.NAME_CHARACTERS] + "… (cut)"
        changed.append("name")
    if sum(sanitize.characters_in(part) for part in parts) <= sanitize.CHARACTERS_LIMIT:
        return changed
    share = sanitize.SPAN_BYTES // (1 + len(span.events))
    for position, event in enumerate(span.events):
        cut = sanitize.cut_to_size(event.attributes, share)
        changed += [f"events.{position}.{path}" for path in cut]
    return changed + sanitize.cut_to_size(span.attributes, share)
