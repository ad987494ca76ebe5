"""Converts spans of the OpenTelemetry SDK into ``PlainSpan``, cheaply, and changes what stores refuse.

The result equals that of ``Span.from_opentelemetry`` (a test compares the two), in a tenth of the time: the SDK has
checked the values of its span, so they are not checked again.

A store refuses text with NUL or with half of a surrogate pair, integers outside ±2^63, rewards that are not
finite, and spans of more than 4 MiB as JSON. An agent's output may contain any of these. Its trace must not be lost
for that, so such a part is changed as little as possible, and the changed parts are listed in the span. Texts are cut
first. Token ids and log-probabilities would be wrong without their end, so a list of numbers is whole or not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec

from agentlightning.errors import InvalidValue
from agentlightning.semconv import LightningSpanAttributes
from agentlightning.types import StatusCode
from agentlightning.types.attributes import convert_attributes, convert_timestamp, dropped_parts
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

_INT64_END = 2**63
_STATUS_CODES: tuple[StatusCode, ...] = ("UNSET", "OK", "ERROR")
"""By the values of OpenTelemetry's enumeration."""
_CHARACTERS_LIMIT = 600_000
"""A span with fewer characters of text fits into 4 MiB, since JSON escapes one in at most 6 bytes."""
_SPAN_BYTES = 3 * 1024 * 1024
"""How many bytes of JSON the attributes of one span may take; the rest of the 4 MiB is for its other parts."""
_NAME_CHARACTERS = 5000
_REWARDS = ("agentlightning.reward", "reward")
_MENDED, _CUT = LightningSpanAttributes.MENDED.value, LightningSpanAttributes.CUT.value
_encode = msgspec.json.Encoder().encode


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
        if src.dropped_attributes or src.dropped_events:
            attributes[_CUT] = dropped_parts(src.dropped_attributes, src.dropped_events)
        if (
            odd
            or span.events
            or span.links
            or status.description is not None
            or len(name) > _NAME_CHARACTERS
            or not fits(name)
        ):
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
            odd = odd or not math.isfinite(value)
        elif kind is int:
            odd = odd or not -_INT64_END <= value < _INT64_END
        elif kind is not bool:
            foreign = True
        odd = odd or "\0" in name or not name.isascii()
    if foreign:
        attributes = convert_attributes(attributes)
    return attributes, odd or foreign or size > _CHARACTERS_LIMIT


# --- What stores refuse ------------------------------------------------------------------------------


def fits(text: str) -> bool:
    """Whether every store accepts this text."""
    if "\0" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sanitize_text(text: str) -> str:
    """The text with U+FFFD for NULs and for surrogates without a partner. Pairs become the character they mean."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _sanitize(span: PlainSpan) -> None:
    """Change what stores refuse in place, and list the changes in the span."""
    parts = [("attributes", span.attributes)]
    parts += [(f"events.{position}", event.attributes) for position, event in enumerate(span.events)]
    links = [(f"links.{position}", link.attributes or {}) for position, link in enumerate(span.links)]
    texts = [("name", span, "name"), ("description", span.status, "description")]
    texts += [(f"events.{position}.name", event, "name") for position, event in enumerate(span.events)]
    changed = [path for where, attributes in parts + links for path in _sanitize_values(attributes, where)]
    for path, holder, field in texts:
        text = getattr(holder, field)
        if text is not None and not fits(text):
            setattr(holder, field, sanitize_text(text))
            changed.append(path)
    if len(span.name) > _NAME_CHARACTERS:
        span.name = span.name[:_NAME_CHARACTERS] + "… (cut)"
        changed.append("name")
    if sum(_characters_in(attributes) for _, attributes in parts) > _CHARACTERS_LIMIT:
        cut = _cut_to_size([parts[0], *((f"{where}.attributes", attributes) for where, attributes in parts[1:])])
        if cut:
            changed += cut
            span.attributes[_CUT] = sorted({*cast("list[str]", span.attributes.get(_CUT, [])), *cut})
    if changed:
        span.attributes[_MENDED] = sorted(set(changed))


def _sanitize_values(attributes: dict[str, Any], where: str) -> list[str]:
    """Change refused names and values in place; returns the paths of what was changed."""
    changed: list[str] = []
    for name, value in list(attributes.items()):
        if not fits(name):
            del attributes[name]
            name = sanitize_text(name)
            attributes[name] = value
            changed.append(f"{where}.{name}")
        better = _sanitized(name, value)
        if better is not value:
            attributes[name] = better
            changed.append(f"{where}.{name}")
    return changed


def _sanitized(name: str, value: Any) -> Any:
    """The value itself if stores accept it, else one as close to it as possible."""
    if isinstance(value, str):
        return value if fits(value) else sanitize_text(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -_INT64_END <= value < _INT64_END else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) or not name.startswith(_REWARDS) else str(value)
    items = cast("Sequence[Any]", value)
    better = [_sanitized("", item) for item in items]
    if all(after is before for after, before in zip(better, items, strict=True)):
        return value
    return [str(item) for item in better]  # OpenTelemetry allows only lists of one type


def _characters_in(attributes: dict[str, Any]) -> int:
    """An upper bound of the characters in the attributes: a number in a list counts as 24."""
    size = 0
    for name, value in attributes.items():
        size += len(name) + 8
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Sequence):
            items = cast("Sequence[Any]", value)
            size += sum(len(item) for item in items) if items and isinstance(items[0], str) else 24 * len(items)
    return size


def _cut_to_size(parts: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Cut the largest values in place until all fit into a span; returns the paths of those that are not whole now.

    The beginning of a text, or of a list of texts, is kept; a cut text ends with a mark. Lists of numbers are taken
    out only if there is no room for them without any texts.
    """
    sizes = {(where, name): len(_encode(value)) for where, attributes in parts for name, value in attributes.items()}
    excess = sum(sizes.values()) + sum(len(_encode(name)) + 2 for _, name in sizes) - _SPAN_BYTES
    held = dict(parts)
    changed: list[str] = []
    for where, name in sorted(sizes, key=lambda each: (_is_numbers(held[each[0]][each[1]]), -sizes[each])):
        if excess <= 0:
            break
        attributes, before = held[where], sizes[where, name]
        if _is_numbers(attributes[name]):
            del attributes[name]
            excess -= before
        else:
            attributes[name] = _cut(attributes[name], before, max(before - excess, 256))
            excess -= before - len(_encode(attributes[name]))
        changed.append(f"{where}.{name}")
    return changed


def _is_numbers(value: Any) -> bool:
    return not isinstance(value, str) and isinstance(value, Sequence) and not isinstance(next(iter(value), ""), str)  # pyright: ignore[reportUnknownArgumentType]


def _cut(value: Any, size: int, wanted: int) -> Any:
    """The beginning of a text, or of a list of texts, that takes ``size`` bytes; it takes at most about ``wanted``."""
    while size > wanted and isinstance(value, Sequence) and len(cast("Sequence[Any]", value)) > 1:
        items = cast("Sequence[Any]", value)
        kept = max(1, int(len(items) * wanted / size * 0.9))
        value = items[:kept]
        size = len(_encode(value))
    if isinstance(value, str):
        return value + "… (cut)"
    kept = list(cast("Sequence[Any]", value))
    return [_cut(kept[0], size, wanted)] if size > wanted and kept and isinstance(kept[0], str) else kept
