"""The spans of an attempt as a waterfall: what called what, when, and for how long."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from rich.text import Text

from agentlightning.cli.terminal import clean, duration, one_line
from agentlightning.semconv import GenAIAttributes, LightningSpanAttributes, LLMCallAttributes
from agentlightning.types import Span
from agentlightning.types.rewards import get_rewards_from_span

if TYPE_CHECKING:
    from agentlightning.types import Event

_NAME_LIMIT = 60
_NOTE_WIDTH = 34
_MIN_BAR, _MAX_BAR = 12, 60
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def draw(drawn: Sequence[Line], width: int, attributes: bool) -> Iterator[Text]:
    """A line for each span, with its bar.

    Args:
        drawn: from ``lines``.
        width: of the terminal.
        attributes: whether those of each span follow it.
    """
    names = [f"{'  ' * each.depth}{clean(each.span.name)}" for each in drawn]
    room = max(20, min(_NAME_LIMIT, max(map(len, names))))
    bar_width = max(_MIN_BAR, min(_MAX_BAR, width - room - 11 - _NOTE_WIDTH))
    whole = max(each.start + (each.seconds or 0.0) for each in drawn)
    for line, name in zip(drawn, names, strict=True):
        failed = line.span.status.status_code == "ERROR"
        short = name if len(name) <= room else name[: room - 1] + "…"
        took = "" if line.seconds is None else duration(line.seconds)
        text = Text.assemble(
            (f"{short:<{room}}", "red" if failed else ""),
            (f"{took:>9}  ", "dim"),
            (_bar(line, whole, bar_width), "red" if failed else "cyan"),
            (f"  {line.note}", "red" if failed else "yellow"),
        )
        text.rstrip()
        yield text
        if attributes:
            for key, value in sorted(line.span.attributes.items()):
                yield Text(f"{'  ' * (line.depth + 1)}{clean(key)} = {one_line(value, 2_000)}", style="dim")


def _bar(line: Line, whole: float, width: int) -> str:
    """Where in the whole time the span lies, in eighths of a character; what took no time is a thin line."""
    if whole <= 0.0:
        return "▏" + " " * (width - 1)
    begin = min(int(line.start / whole * width), width - 1)
    if line.seconds is None:
        return " " * begin + "┄" * (width - begin)
    eighths = max(1, round(line.seconds / whole * width * 8))
    full, rest = divmod(min(eighths, (width - begin) * 8), 8)
    bar = " " * begin + "█" * full + (_EIGHTHS[rest] if rest else "")
    return f"{bar:<{width}}"


# --- The spans of an attempt as a tree in time. Pure: spans go in, lines come out ---


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
    known = {each.span_id for each in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    begins = sorted(spans, key=lambda each: (inf if each.start_time is None else each.start_time, each.sequence_id))
    for each in reversed(begins):
        children[each.parent_id if each.parent_id in known else None].append(each)
    origin = min((each.start_time for each in spans if each.start_time is not None), default=0.0)
    # A stack, and no recursion: agents may nest deeper than Python does. Those in a circle are no root's children.
    pending = [(each, 0) for each in (*reversed(spans), *children[None])]
    drawn: set[int] = set()
    found: list[Line] = []
    while pending:
        span, depth = pending.pop()
        if id(span) in drawn:
            continue
        drawn.add(id(span))
        start, end = span.start_time, span.end_time
        seconds = None if start is None or end is None else max(0.0, end - start)
        found.append(Line(span, depth, 0.0 if start is None else start - origin, seconds, _note(span)))
        pending += [(child, depth + 1) for child in children.get(span.span_id, ())]
    return found


def raised(event: Event) -> str:
    """The exception that an event of a span tells of."""
    kind, message = (event.attributes.get(f"exception.{each}", "") for each in ("type", "message"))
    return f"{kind}: {message}".strip(": ")


def _note(span: Span) -> str:
    attributes = span.attributes

    def number(name: GenAIAttributes | LLMCallAttributes) -> int | None:
        value = attributes.get(name.value)
        return int(value) if isinstance(value, int | float) else None

    operation = attributes.get(LightningSpanAttributes.OPERATION_NAME.value)
    parts: list[str] = [] if operation is None else [one_line(operation, 40)]
    parts += [f"{each.name} reward {each.value:.4g}" for each in get_rewards_from_span(span)]
    tokens = [number(each) for each in (GenAIAttributes.USAGE_INPUT_TOKENS, GenAIAttributes.USAGE_OUTPUT_TOKENS)]
    if tokens != [None, None]:
        parts.append(f"{' → '.join('?' if each is None else str(each) for each in tokens)} tokens")
    if retries := number(LLMCallAttributes.RETRIES):
        parts.append(f"{retries} retries")
    version = attributes.get(LLMCallAttributes.MODEL_VERSION.value)
    if version is not None:
        parts.append(f"weights {one_line(version, 20)}")
    exception = next((raised(each) for each in span.events if each.name == "exception"), "")
    if span.status.status_code == "ERROR":
        parts.append(f"error: {one_line(span.status.description or exception, 80)}")
    elif exception:
        parts.append(f"raised {one_line(exception, 80)}")
    if span.end_time is None:
        parts.append("not ended")
    return ", ".join(parts)
