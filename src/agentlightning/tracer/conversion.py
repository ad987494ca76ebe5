"""Converts spans of the OpenTelemetry SDK into ``PlainSpan``, cheaply.

The result equals that of ``Span.from_opentelemetry`` (a test compares the two), in a tenth of the time: the SDK has
checked the values of its span, so they are not checked again. Values that stores refuse are changed on the way (see
`agentlightning.tracer.sanitize`).
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, cast

from agentlightning.errors import InvalidValue
from agentlightning.tracer import sanitize
from agentlightning.types import StatusCode
from agentlightning.types.otel import convert_attributes, convert_timestamp
from agentlightning.types.plain_spans import (
    PlainContext,
    PlainEvent,
    PlainLink,
    PlainResource,
    PlainSpan,
    PlainStatus,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource as OtelSdkResource
    from opentelemetry.sdk.trace import Event as OtelEvent, ReadableSpan
    from opentelemetry.trace import Link as OtelLink, SpanContext as OtelSpanContext


_PLAIN_START, _PLAIN_END = -(2**63), 2**63
_STATUS_CODES: tuple[StatusCode, ...] = ("UNSET", "OK", "ERROR")
"""By the values of OpenTelemetry's enumeration."""


class SpanConverter:
    """Converts the spans of one process. Those of the same OpenTelemetry resource share one record of it."""

    def __init__(self) -> None:
        self._resource: tuple[OtelSdkResource, PlainResource] | None = None

    def convert(self, src: ReadableSpan, rollout_id: str, attempt_id: str) -> PlainSpan:
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
        name, status = src.name, src.status
        span = PlainSpan(
            rollout_id,
            attempt_id,
            0,
            own_context.trace_id,
            own_context.span_id,
            None if parent is None else parent.span_id,
            name,
            PlainStatus(_STATUS_CODES[status.status_code.value], status.description),
            attributes,
            # The properties copy under a lock, 5 µs each, and mostly there is nothing to copy.
            [_event(each) for each in src.events] if src._events else [],  # pyright: ignore[reportPrivateUsage]
            [_link(each) for each in src.links] if src._links else [],  # pyright: ignore[reportPrivateUsage]
            None if src.start_time is None else src.start_time / 1e9,
            None if src.end_time is None else src.end_time / 1e9,
            own_context,
            parent,
            self._resource_of(src.resource),
        )
        if odd or span.events or span.links or status.description is not None or sanitize.is_odd_name(name):
            _sanitize(span)
        return span

    def _resource_of(self, src: OtelSdkResource) -> PlainResource:
        known = self._resource
        if known is None or known[0] is not src:
            resource = PlainResource(convert_attributes(src.attributes), src.schema_url or "")
            known = self._resource = (src, resource)
        return known[1]


def _context(src: OtelSpanContext) -> PlainContext:
    state = src.trace_state
    return PlainContext(f"{src.trace_id:032x}", f"{src.span_id:016x}", src.is_remote, dict(state) if state else {})


def _event(src: OtelEvent) -> PlainEvent:
    return PlainEvent(src.name, convert_attributes(src.attributes), convert_timestamp(src.timestamp))


def _link(src: OtelLink) -> PlainLink:
    attributes = None if src.attributes is None else convert_attributes(src.attributes)
    return PlainLink(_context(src.context), attributes)


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


def _sanitize(span: PlainSpan) -> None:
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


def _cut_to_size(span: PlainSpan) -> list[str]:
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
