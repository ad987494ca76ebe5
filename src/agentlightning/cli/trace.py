"""``agl trace``: the spans of an attempt as a waterfall in the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from agentlightning.cli.options import ApiKey, Format, Output, Url
from agentlightning.cli.output import STATUS_STYLES, clean, console, duration, one_line, print_json
from agentlightning.cli.rollouts import find_attempt, find_begun_rollout
from agentlightning.cli.target import look
from agentlightning.semconv import GenAIAttributes, LightningSpanAttributes, LLMCallAttributes
from agentlightning.types import Span
from agentlightning.types.rewards import find_final_reward, get_rewards_from_span

if TYPE_CHECKING:
    from rich.text import Text

    from agentlightning.store.base import LightningStore
    from agentlightning.types import Attempt, PaginatedResult, Rollout

_NAME_LIMIT = 60
_NOTE_WIDTH = 34
_MIN_BAR, _MAX_BAR = 12, 60
_PLAIN_WIDTH = 140
"""How wide the picture is where there is no terminal."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def trace(
    rollout: Annotated[
        str, typer.Argument(metavar="ROLLOUT", help="Its id, a part of it that no other has, or latest.")
    ] = "latest",
    attempt: Annotated[str, typer.Option("--attempt", "-a", help="Its number or id, or latest.")] = "latest",
    name: Annotated[str | None, typer.Option(help="Only spans whose name has this in it.")] = None,
    attributes: Annotated[bool, typer.Option("--attributes", help="Print the attributes of each span, too.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many spans.")] = 500,
    url: Url = None,
    api_key: ApiKey = None,
    output: Output = Format.TABLE,
) -> None:
    """Draw the spans of an attempt: what called what, when, for how long, with which tokens and rewards.

    [bold]Examples[/bold]

      agl trace                                    the newest that has begun
      agl trace ro-01a2 --attempt 1                its first attempt
      agl trace ro-01a2 --name chat --attributes   model calls, whole
      agl trace ro-01a2 -o json | jq '.items[].name'
    """

    async def question(store: LightningStore) -> tuple[Rollout, Attempt, PaginatedResult[Span]]:
        found = await find_begun_rollout(store, rollout)
        chosen = await find_attempt(store, found, attempt)
        page = await store.query_spans(found.rollout_id, chosen.attempt_id, name_contains=name, limit=limit)
        return found, chosen, page

    found, chosen, page = look(url, api_key, question)
    if output is Format.JSON:
        print_json(page)
        return
    _print(found, chosen, list(page.items), attributes)
    if len(page) < page.total:
        typer.echo(f"the first {len(page):,} of {page.total:,} spans; more with --limit", err=True)


def _print(rollout: Rollout, attempt: Attempt, spans: Sequence[Span], attributes: bool) -> None:
    from rich.text import Text

    screen = console()
    reward = find_final_reward(spans)
    reason = "" if attempt.status == "succeeded" or not attempt.reason_code else f" ({attempt.reason_code})"
    screen.print(
        Text.assemble(
            (f"{rollout.rollout_id}", "bold"),
            f"  attempt {attempt.sequence_id}  ",
            (attempt.status + reason, STATUS_STYLES.get(attempt.status, "")),
            "" if attempt.end_time is None else f"  {duration(attempt.end_time - attempt.start_time)}",
            f"  {len(spans)} span{'' if len(spans) == 1 else 's'}",
            "  no reward" if reward is None else f"  reward {reward:.4g}",
        )
    )
    if not spans:
        screen.print(_why_empty(attempt), style="dim")
        return
    drawn = lines(spans)
    width = screen.width if screen.is_terminal else _PLAIN_WIDTH
    for line in _draw(drawn, width, attributes):
        screen.print(line, no_wrap=True, overflow="ellipsis", crop=screen.is_terminal)


def _why_empty(attempt: Attempt) -> str:
    if attempt.status == "preparing":
        return "No spans: it has not begun."
    return (
        "No spans were recorded. Was the agent run by a runner with a tracer, and its models called through the proxy?"
    )


def _draw(drawn: Sequence[Line], width: int, attributes: bool) -> list[Text]:
    from rich.text import Text

    names = [f"{'  ' * each.depth}{clean(each.span.name)}" for each in drawn]
    room = max(20, min(_NAME_LIMIT, max(map(len, names))))
    bar_width = max(_MIN_BAR, min(_MAX_BAR, width - room - 11 - _NOTE_WIDTH))
    whole = max((each.start + (each.seconds or 0.0) for each in drawn), default=0.0)
    found: list[Text] = []
    for line, name in zip(drawn, names, strict=True):
        failed = line.span.status.status_code == "ERROR"
        short = name if len(name) <= room else name[: room - 1] + "…"
        took = "" if line.seconds is None else duration(line.seconds)
        found.append(
            Text.assemble(
                (f"{short:<{room}}", "red" if failed else ""),
                (f"{took:>9}  ", "dim"),
                (_bar(line, whole, bar_width), "red" if failed else "cyan"),
                ("  " + line.note if line.note else "", "red" if failed else "yellow"),
            )
        )
        found[-1].rstrip()
        if attributes:
            indent = "  " * (line.depth + 1)
            found += [
                Text(f"{indent}{clean(key)} = {one_line(value, 2_000)}", style="dim")
                for key, value in sorted(line.span.attributes.items())
            ]
    return found


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
