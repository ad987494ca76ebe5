"""``agl status``: one screen that says what goes on, what stands still, and why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from agentlightning.cli.overview import Failures, Overview, explain, gather, last_heard, reason_of
from agentlightning.cli.rewards import mean, trend
from agentlightning.cli.target import Target
from agentlightning.cli.terminal import (
    STATUS_STYLES,
    Column,
    Output,
    ago,
    clean,
    console,
    duration,
    json_text,
    one_line,
    print_json,
    size,
    table,
)
from agentlightning.cli.workers import worker_columns
from agentlightning.errors import StoreUnavailable

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore

_SILENCE_SECONDS = 3.0
"""Answers come sooner than this; what takes longer is shown as silence."""
_SHOWN_WORKERS = 12
_SHOWN_FAILURES = 5


def status(
    target: Target,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl+C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks, with --watch.")] = 2.0,
    output: Output = "table",
) -> None:
    """One screen: what goes on, what stands still, and why.

    [bold]Examples[/bold]

      agl status                                    the server on this machine
      agl status --url http://gpu-1:4747 --watch    another one, looked at again and again
      agl status --url agentlightning.db            a file, also while its owner runs
      agl status -o json | jq .rollouts.queuing

    With --watch and -o json each look is one line of JSON.
    """
    place, screen = str(target), console()

    async def go_on() -> None:
        async with target.open("look") as store:
            if output == "json":
                async for overview, silence in _looks(store, interval, target):
                    if overview is not None and not silence:
                        typer.echo(json_text(_record(overview, place)))
            elif screen.is_terminal:
                with Live(console=screen, screen=True, auto_refresh=False) as live:
                    async for overview, silence in _looks(store, interval, target):
                        live.update(_watched(overview, silence, place, screen.width), refresh=True)
            else:
                async for overview, silence in _looks(store, interval, target):
                    screen.print(_watched(overview, silence, place, screen.width))

    if watch:
        asyncio.run(go_on())
    elif output == "json":
        print_json(_record(target.look(lambda store: gather(store, target)), place))
    else:
        screen.print(_screen(target.look(lambda store: gather(store, target)), place, screen.width), crop=False)


async def _looks(
    store: LightningStore, interval: float, target: Target
) -> AsyncIterator[tuple[Overview | None, float]]:
    """One look after the other: (the newest overview, for how many seconds the next one has been awaited).

    A server that is away is waited for: the client tries again by itself, and when it gives up, we do.
    """
    overview: Overview | None = None
    silent_since: float | None = None
    while True:
        began = time.monotonic()
        look = asyncio.ensure_future(gather(store, target))
        try:
            while not (await asyncio.wait({look}, timeout=max(interval, _SILENCE_SECONDS)))[0]:
                silent_since = began if silent_since is None else silent_since
                yield overview, time.monotonic() - silent_since
            overview, silent_since = look.result(), None
            yield overview, 0.0
        except StoreUnavailable:
            silent_since = began if silent_since is None else silent_since
            yield overview, time.monotonic() - silent_since
        finally:
            look.cancel()
        await asyncio.sleep(interval)


def _watched(overview: Overview | None, silence: float, place: str, width: int) -> RenderableType:
    told = Text(place, style="bold") if overview is None else _screen(overview, place, width)
    if not silence:
        return told
    old = f"✗ No answer for {duration(silence)}; trying on. What is above is old."
    return Group(told, Text(), Text(old, style="bold red"))


def _record(overview: Overview, place: str) -> dict[str, Any]:
    """What `agl status -o json` prints. Times are seconds since the Unix epoch, on the store's clock."""
    statistics, host = overview.statistics, overview.statistics.get("host", {})
    oldest = overview.oldest_waiting
    return {
        "store": place,
        "time": overview.now,
        "version": host.get("version"),
        "uptime_seconds": statistics.get("uptime"),
        "answer_seconds": overview.answer_seconds,
        "rollouts": statistics.get("rollouts_by_status", {}),
        "attempts": statistics.get("total_attempts", 0),
        "spans": statistics.get("total_spans", 0),
        "span_bytes": statistics.get("total_span_bytes", 0),
        "disk_free_bytes": host.get("disk_free_bytes"),
        "oldest_waiting": oldest
        and {"rollout_id": oldest.rollout_id, "waits_seconds": max(0.0, overview.now - oldest.start_time)},
        "reward_mean": mean(overview.in_order),
        "reward_trend": trend(overview.in_order) or None,
        "rewards": len(overview.in_order),
        "ended_per_minute": overview.pace and overview.pace.per_minute,
        "workers": [
            {
                **{name: getattr(each, name) for name in ("worker_id", "status", "directive", "current_rollout_id")},
                "alive": overview.is_alive(each),
                "last_heard": last_heard(each),
            }
            for each in overview.workers
        ],
        "failures": [
            {"reason": each.reason, "count": each.number, "newest": each.newest.rollout_id}
            for each in overview.failures
        ],
        "findings": [each._asdict() for each in explain(overview)],
    }


def _screen(overview: Overview, place: str, width: int) -> Group:
    """Numbers first, then workers and failures, and at the end, where the eye is, what they mean."""
    statistics = overview.statistics
    more = [statistics.get("name", "store"), statistics.get("host", {}).get("version", "version unknown")]
    if place.startswith("http"):
        more.append(f"up {duration(statistics.get('uptime', 0.0))}")
        more.append(f"answers within {duration(overview.answer_seconds)}")
    parts: list[RenderableType] = [Text.assemble((clean(place), "bold"), ("  " + ", ".join(more), "dim")), Text()]
    parts += [Text.assemble((f"{name:<16}", "bold"), value) for name, value in _facts(overview)]
    if overview.workers:
        parts += [Text(), *_workers(overview, width)]
    if overview.failures:
        columns: tuple[Column[Failures], ...] = (
            Column("failed", lambda each: f"{each.number} of {len(overview.ended)}", right=True),
            Column("reason", lambda each: each.reason, style="red"),
            Column("the newest said", lambda each: one_line(reason_of(each.newest)[1], 60), wide=True),
            Column("rollout", lambda each: each.newest.rollout_id),
        )
        parts += [Text(), *table(columns, overview.failures[:_SHOWN_FAILURES], width)]
    parts.append(Text())
    marks = {"problem": ("✗ ", "bold red"), "warning": ("! ", "yellow"), "note": ("· ", "dim")}
    for finding in explain(overview):
        parts.append(Text.assemble(marks[finding.level], clean(finding.text)))
        if finding.fix:
            parts.append(Text.assemble("  ", (clean(finding.fix), "dim")))
    return Group(*parts)


def _facts(overview: Overview) -> Iterator[tuple[str, Text | str]]:
    statistics, pace, oldest = overview.statistics, overview.pace, overview.oldest_waiting
    line = Text(f"{statistics.get('total_rollouts', 0):,}")
    for state in ("queuing", "requeuing", "preparing", "running", "succeeded", "failed", "cancelled"):
        if overview.by_status[state]:
            line.append(f"   {overview.by_status[state]:,} {state}", style=STATUS_STYLES.get(state, ""))
    yield "rollouts", line
    if oldest is not None:
        yield "oldest waiting", f"enqueued {ago(oldest.start_time, overview.now)}   {oldest.rollout_id}"
    if overview.waiting or overview.running:
        told = pace and f"{pace.per_minute:,.0f} rollouts a minute, within the last {duration(pace.seconds)}"
        yield "pace", told or "nothing ended within a minute"
    elif overview.ended:
        yield "newest end", ago(max(each.end_time or 0.0 for each in overview.ended), overview.now)
    if overview.in_order:
        rewards = overview.in_order
        yield "reward", f"{mean(rewards):.4g} on average of the last {len(rewards):,}   {trend(rewards)}".rstrip()
    yield "attempts", f"{statistics.get('total_attempts', 0):,}"
    spans = f"{statistics.get('total_spans', 0):,}   {size(statistics.get('total_span_bytes', 0))}"
    free = statistics.get("host", {}).get("disk_free_bytes")
    yield "spans", spans if free is None else f"{spans}   {size(free)} free on the disk"


def _workers(overview: Overview, width: int) -> Iterator[RenderableType]:
    alive, silent = overview.alive, overview.silent
    left = len(overview.workers) - len(alive) - len(silent)
    counts = {"more alive": len(alive) - _SHOWN_WORKERS, "ended in order": left, "silent": len(silent)}
    if overview.unowned:
        counts = {"ended in order": left, "known, and no process has the file open that they worked for": len(silent)}
    if alive:
        yield from table(worker_columns(overview.now), alive[:_SHOWN_WORKERS], width)
    remarks = [f"{number} {what}" for what, number in counts.items() if number > 0]
    if remarks:
        yield Text(f"{', '.join(remarks)}: `agl workers ls`", style="dim")
