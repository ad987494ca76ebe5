"""The spans of an attempt as a tree in time. Pure: spans go in, lines come out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agentlightning.cli.output import one_line
from agentlightning.semconv import GenAIAttributes, LightningSpanAttributes, LLMCallAttributes
from agentlightning.types import Span
from agentlightning.types.rewards import get_rewards_from_span


class Line(NamedTuple):
    """One span, as it is to be drawn."""

    span: Span
    depth: int
    start: float
    """Seconds after the earliest span of all began; 0 where its time is not known."""
    seconds: float | None
    """How long it took. None: it has not ended, or its times are not known."""
    note: str
    """What matters of it, in a few words."""


def lines(spans: Sequence[Span]) -> list[Line]:
    """Spans below their parents, siblings in the order in which they began.

    Whatever holes there are, each span is there once: one whose parent is missing is a root, and so is one of each
    circle of parents.
    """
    known = {each.span_id: each for each in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    for each in spans:
        children[each.parent_id if each.parent_id in known else None].append(each)
    for siblings in children.values():
        siblings.sort(key=_begins)
    origin = min((each.start_time for each in spans if each.start_time is not None), default=0.0)
    drawn: set[int] = set()
    found = [line for root in children[None] for line in _below(root, children, origin, drawn)]
    for each in spans:  # those in a circle have no root
        if id(each) not in drawn:
            found += _below(each, children, origin, drawn)
    return found


def _below(root: Span, children: dict[str | None, list[Span]], origin: float, drawn: set[int]) -> Iterator[Line]:
    """A span and all below it. Not recursive: agents may nest deeper than Python does."""
    pending = [(root, 0)]
    while pending:
        span, depth = pending.pop()
        if id(span) in drawn:
            continue
        drawn.add(id(span))
        yield _line(span, depth, origin)
        pending += [(child, depth + 1) for child in reversed(children.get(span.span_id, ()))]


def _line(span: Span, depth: int, origin: float) -> Line:
    start, end = span.start_time, span.end_time
    seconds = None if start is None or end is None else max(0.0, end - start)
    return Line(span, depth, 0.0 if start is None else start - origin, seconds, _note(span))


def _begins(span: Span) -> tuple[float, int]:
    return (span.start_time if span.start_time is not None else float("inf"), span.sequence_id)


def _note(span: Span) -> str:
    attributes = span.attributes
    operation = attributes.get(LightningSpanAttributes.OPERATION_NAME.value)
    parts: list[str] = [] if operation is None else [one_line(operation, 40)]
    parts += [f"{each.name} reward {each.value:.4g}" for each in get_rewards_from_span(span)]
    asked = _number(attributes.get(GenAIAttributes.USAGE_INPUT_TOKENS.value))
    answered = _number(attributes.get(GenAIAttributes.USAGE_OUTPUT_TOKENS.value))
    if asked is not None or answered is not None:
        parts.append(f"{'?' if asked is None else asked} → {'?' if answered is None else answered} tokens")
    retries = _number(attributes.get(LLMCallAttributes.RETRIES.value))
    if retries:
        parts.append(f"{retries} retries")
    version = attributes.get(LLMCallAttributes.MODEL_VERSION.value)
    if version is not None:
        parts.append(f"weights {one_line(version, 20)}")
    if span.status.status_code == "ERROR":
        parts.append(f"error: {one_line(span.status.description or _exception(span), 80)}")
    elif _exception(span):
        parts.append(f"raised {one_line(_exception(span), 80)}")
    if span.end_time is None:
        parts.append("not ended")
    return ", ".join(parts)


def _exception(span: Span) -> str:
    for event in span.events:
        if event.name == "exception":
            kind, message = (event.attributes.get(f"exception.{each}", "") for each in ("type", "message"))
            return f"{kind}: {message}".strip(": ")
    return ""


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) else None
