"""``agl trace``: an attempt as a transcript of what was said, or its spans as a waterfall."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.text import Text

from agentlightning.cli.rollouts import LATEST, Id, find_rollout
from agentlightning.cli.target import Target
from agentlightning.cli.terminal import (
    STATUS_STYLES,
    Output,
    clean,
    console,
    count,
    duration,
    print_json,
)
from agentlightning.cli.transcript import TranscriptEntry, transcript_of
from agentlightning.cli.waterfall import draw, lines
from agentlightning.errors import NotFound
from agentlightning.types import AttemptedRollout
from agentlightning.types.attempt_spans import used_default_resources
from agentlightning.types.rewards import find_final_reward

if TYPE_CHECKING:
    from rich.console import Console

    from agentlightning.store.base import LightningStore
    from agentlightning.types import Attempt, PaginatedResult, Rollout, Span

_PLAIN_WIDTH = 140
"""How wide the waterfall is where there is no terminal."""
_SHORT_LINES, _SHORT_CHARACTERS = 12, 800
"""What is shown of a text without ``--full``."""
_INDENT = "    "
_STYLES = {
    "system": "magenta",
    "user": "blue",
    "assistant": "green",
    "tool": "cyan",
    "reward": "yellow",
    "error": "red",
}


class _Found(NamedTuple):
    rollout: Rollout
    attempt: Attempt
    page: PaginatedResult[Span]


def trace(
    target: Target,
    rollout: Id = LATEST,
    attempt: Annotated[str, typer.Option("--attempt", "-a", help="Its number or id, or latest.")] = LATEST,
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    spans: Annotated[bool, typer.Option("--spans", help="Draw the spans as a waterfall instead.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the spans only those whose name has this in it.")] = None,
    attributes: Annotated[bool, typer.Option("--attributes", help="Print the attributes of each span, too.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Read at most so many spans.")] = 5_000,
    output: Output = "table",
) -> None:
    """Show what an attempt did, as a transcript: who said what, tool calls and their results, tokens, rewards, errors.

    Each call shows only the messages that no call before it had. Calls on the side (a title, a summary) are marked.
    With [bold]--spans[/bold]: what called what, when, and for how long.

    [bold]Examples[/bold]

      agl trace                                            the newest that has begun
      agl trace ro-01a2 --attempt 1 --full                 its first attempt, with long texts whole
      agl trace ro-01a2 -o json | jq '.entries[].text'
      agl trace ro-01a2 --spans --name chat --attributes   model calls, with all that was recorded
      agl trace ro-01a2 --spans -o json | jq '.items[].name'
    """
    if not spans and (name is not None or attributes):
        raise typer.BadParameter("--name and --attributes are about spans; give --spans as well")

    async def question(store: LightningStore) -> _Found:
        found = await find_rollout(store, rollout, "preparing", "running", "succeeded", "failed", "requeuing")
        chosen = await _find_attempt(store, found, attempt)
        page = await store.query_spans(found.rollout_id, chosen.attempt_id, name_contains=name, limit=limit)
        return _Found(found, chosen, page)

    found = target.look(question)
    if spans and output == "json":
        print_json(found.page)
    elif output == "json":
        told = {"rollout": found.rollout, "attempt": found.attempt, "reward": find_final_reward(found.page.items)}
        told |= {"default_resources": used_default_resources(found.page.items)}
        print_json({**told, "entries": [asdict(each) for each in transcript_of(found.page.items)]})
    elif spans:
        _print_spans(found, attributes)
    else:
        _print_transcript(found, full)
    if len(found.page) < found.page.total:
        typer.echo(f"the first {len(found.page):,} of {found.page.total:,} spans; more with --limit", err=True)


async def _find_attempt(store: LightningStore, rollout: Rollout, name: str) -> Attempt:
    """An attempt by its id, its number, or ``latest``."""
    if name == LATEST:
        if not isinstance(rollout, AttemptedRollout):
            raise NotFound(f"rollout {rollout.rollout_id} has no attempts yet; it is {rollout.status}")
        return rollout.attempt
    attempts = await store.query_attempts(rollout.rollout_id)
    for each in attempts:
        if name in (each.attempt_id, str(each.sequence_id)):
            return each
    raise NotFound(
        f"rollout {rollout.rollout_id} has {len(attempts)} attempts, and none is {name!r}; "
        "give its number or id, or `latest`"
    )


def _print_head(screen: Console, found: _Found, what: str) -> None:
    attempt, reward = found.attempt, find_final_reward(found.page.items)
    reason = "" if attempt.status == "succeeded" or not attempt.reason_code else f" ({attempt.reason_code})"
    screen.print(
        Text.assemble(
            (found.rollout.rollout_id, "bold"),
            f"  attempt {attempt.sequence_id}  ",
            (attempt.status + reason, STATUS_STYLES.get(attempt.status, "")),
            "" if attempt.end_time is None else f"  {duration(attempt.end_time - attempt.start_time)}",
            f"  {what}",
            "  no reward" if reward is None else f"  reward {reward:.4g}",
        )
    )
    why_defaults = used_default_resources(found.page.items)
    if why_defaults is not None:
        screen.print(clean(f"It ran with the default resources of its runner: {why_defaults}"), style="yellow")
    if not found.page.items:
        never = "Was the agent run by a runner with a tracer, and its models called through the proxy?"
        told = "No spans: it has not begun." if attempt.status == "preparing" else f"No spans were recorded. {never}"
        screen.print(told, style="dim")


def _print_spans(found: _Found, attributes: bool) -> None:
    screen = console()
    _print_head(screen, found, count(len(found.page), "span"))
    if found.page.items:
        for line in draw(lines(found.page.items), screen.width if screen.is_terminal else _PLAIN_WIDTH, attributes):
            screen.print(line, no_wrap=True, overflow="ellipsis", crop=screen.is_terminal)


# --- The transcript ----------------------------------------------------------------------------------


def _print_transcript(found: _Found, full: bool) -> None:
    screen = console()
    entries = transcript_of(found.page.items)
    replies = [each for each in entries if each.kind == "reply"]
    tokens = [sum(each.input_tokens or 0 for each in replies), sum(each.output_tokens or 0 for each in replies)]
    told = f"  {tokens[0]:,} → {tokens[1]:,} tokens" if any(tokens) else ""
    _print_head(screen, found, f"{count(len(replies), 'model call')}{told}")
    if found.page.items and not replies:
        screen.print("No model calls were recorded; `agl trace --spans` shows what was.", style="dim")
    for entry in entries:
        for line in _lines_of(entry, full, screen):
            screen.print(line, crop=False, soft_wrap=not screen.is_terminal)
    attempt = found.attempt
    if attempt.status not in ("preparing", "running", "succeeded") and attempt.reason_message:
        screen.print(Text.assemble("\n", (f"{attempt.status}: {clean(attempt.reason_message)}", "red")), crop=False)


def _lines_of(entry: TranscriptEntry, full: bool, screen: Console) -> Iterator[Text]:
    """A heading, and below it what was said, indented."""
    style = "dim" if entry.side else ""
    heading = Text.assemble(
        "\n", (clean(entry.role), f"bold {style or _STYLES.get(entry.role.partition(' ')[0], '')}"), style=style
    )
    facts = ", ".join(_facts(entry))
    if facts:
        heading.append(f"  {clean(facts)}", "dim")
    if entry.problem:
        heading.append(f"  ✗ {clean(entry.problem)}", "red")
    if entry.kind in ("reward", "error"):
        yield heading.append(f"  {_lines(entry.text, full).plain}", _STYLES[entry.kind])
        return
    yield heading
    said = [_lines(entry.text, full, style)] if entry.text else []
    if entry.kind != "tool":
        said += [_lines(f"→ {each['name']}({each['arguments']})", full, style or "cyan") for each in entry.tool_calls]
    for text in said:
        fitted = text.wrap(screen, max(20, screen.width - len(_INDENT))) if screen.is_terminal else text.split("\n")
        for line in fitted:
            line.rstrip()
            yield Text.assemble(_INDENT, line)


def _facts(entry: TranscriptEntry) -> Iterator[str]:
    if entry.kind == "tool":
        yield f"called with {entry.tool_calls[0]['arguments']}" if entry.tool_calls[0]["arguments"] else "called"
    if entry.tool_call_id:
        yield entry.tool_call_id
    if entry.model:
        yield entry.model
    if (entry.input_tokens, entry.output_tokens) != (None, None):
        shown = (f"{each:,}" if each is not None else "?" for each in (entry.input_tokens, entry.output_tokens))
        yield f"{' → '.join(shown)} tokens"
    if entry.finish_reason:
        yield f"finish reason {entry.finish_reason}"
    if entry.seconds is not None:
        yield duration(max(0.0, entry.seconds))
    if entry.side:
        yield entry.side


def _lines(text: str, full: bool, style: str = "") -> Text:
    """A text whose lines stay lines; a long one is cut unless ``full``, and says by how much."""
    shown = text if full else "\n".join(text[:_SHORT_CHARACTERS].splitlines()[:_SHORT_LINES])
    told = Text("\n".join(map(clean, shown.splitlines())), style=style)
    left = len(text) - len(shown)
    if left > 1:  # a line break at the end is no text
        told.append(f"\n… {left:,} more characters: --full", "dim")
    return told
