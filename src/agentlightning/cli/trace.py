"""``agl trace``: the spans of an attempt as a waterfall in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.options import ApiKey, Format, Output, Url

if TYPE_CHECKING:
    from rich.text import Text

    from agentlightning.cli.waterfall import Line
    from agentlightning.store.base import LightningStore
    from agentlightning.types import Attempt, PaginatedResult, Rollout, Span


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
    from agentlightning.cli.lookup import find_attempt, find_begun_rollout
    from agentlightning.cli.output import print_json
    from agentlightning.cli.target import look

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

    from agentlightning.cli.output import STATUS_STYLES, console, duration
    from agentlightning.cli.waterfall import lines
    from agentlightning.types.rewards import find_final_reward

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

    from agentlightning.cli.output import clean, duration, one_line

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
