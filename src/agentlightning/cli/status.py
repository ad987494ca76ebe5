"""``agl status``: one screen that says what goes on, what stands still, and why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from agentlightning.cli.options import ApiKey, Format, Output, Url
from agentlightning.cli.output import (
    STATUS_STYLES,
    Cell,
    Column,
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
from agentlightning.cli.overview import Finding, Overview, explain, gather, last_heard, reason_of
from agentlightning.cli.target import locate, look, open_view
from agentlightning.errors import StoreUnavailable
from agentlightning.types import Worker

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore

_SILENCE_SECONDS = 3.0
"""Answers come sooner than this; what takes longer is shown as silence."""


def status(
    url: Url = None,
    api_key: ApiKey = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl+C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks, with --watch.")] = 2.0,
    output: Output = Format.TABLE,
) -> None:
    """One screen: what goes on, what stands still, and why.

    [bold]Examples[/bold]

      agl status                                    the server on this machine
      agl status --url http://gpu-1:4747 --watch    another one, looked at again and again
      agl status --url agentlightning.db            a file, also while its owner runs
      agl status -o json | jq .rollouts.queuing

    With --watch and -o json each look is one line of JSON.
    """
    place = str(locate(url, api_key))
    if watch:
        asyncio.run(_watch(url, api_key, place, interval, output))
        return
    overview = look(url, api_key, gather)
    if output is Format.JSON:
        print_json(record_of(overview, place))
    else:
        console().print(screen_of(overview, place), crop=False)


async def _watch(url: str | None, api_key: str | None, place: str, interval: float, output: Format) -> None:
    """Look until interrupted."""
    from rich.live import Live

    screen = console()
    async with open_view(url, api_key) as store:
        if output is Format.JSON:
            async for overview, silence in _looks(store, interval):
                if overview is not None and not silence:
                    typer.echo(json_text(record_of(overview, place)))
        elif screen.is_terminal:
            with Live(console=screen, screen=True, auto_refresh=False) as live:
                async for overview, silence in _looks(store, interval):
                    live.update(_watched(overview, silence, place), refresh=True)
        else:
            async for overview, silence in _looks(store, interval):
                screen.print(_watched(overview, silence, place))


async def _looks(store: LightningStore, interval: float) -> AsyncIterator[tuple[Overview | None, float]]:
    """One look after the other: (the newest overview, for how many seconds the next one has been awaited).

    A server that is away is waited for: the client tries again by itself, and when it gives up, we do.
    """
    overview: Overview | None = None
    silent_since: float | None = None
    while True:
        began = time.monotonic()
        look = asyncio.ensure_future(gather(store))
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


def _watched(overview: Overview | None, silence: float, place: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [screen_of(overview, place)] if overview is not None else [Text(place, style="bold")]
    if silence:
        parts += [
            Text(),
            Text(f"✗ No answer for {duration(silence)}; trying on. What is above is old.", style="bold red"),
        ]
    return Group(*parts)


# --- What ``agl status`` shows: an overview as one screen, or as a record ---

_SHOWN_WORKERS = 12
_SHOWN_FAILURES = 5


def record_of(overview: Overview, place: str) -> dict[str, Any]:
    """What `agl status -o json` prints. Times are seconds since the Unix epoch, on the store's clock."""
    statistics = overview.statistics
    oldest = overview.oldest_waiting
    return {
        "store": place,
        "time": overview.now,
        "version": statistics.get("host", {}).get("version"),
        "uptime_seconds": statistics.get("uptime"),
        "answer_seconds": overview.answer_seconds,
        "rollouts": statistics.get("rollouts_by_status", {}),
        "attempts": statistics.get("total_attempts", 0),
        "spans": statistics.get("total_spans", 0),
        "span_bytes": statistics.get("total_span_bytes", 0),
        "disk_free_bytes": statistics.get("host", {}).get("disk_free_bytes"),
        "oldest_waiting": None
        if oldest is None
        else {"rollout_id": oldest.rollout_id, "waits_seconds": max(0.0, overview.now - oldest.start_time)},
        "ended_per_minute": None if overview.pace is None else overview.pace.per_minute,
        "workers": [
            {
                "worker_id": each.worker_id,
                "status": each.status,
                "alive": overview.is_alive(each),
                "directive": each.directive,
                "last_heard": last_heard(each),
                "current_rollout_id": each.current_rollout_id,
            }
            for each in overview.workers
        ],
        "failures": [
            {"reason": each.reason, "count": each.count, "newest": each.newest.rollout_id} for each in overview.failures
        ],
        "findings": [each._asdict() for each in explain(overview)],
    }


# --- As a screen -----------------------------------------------------------------------------------


def screen_of(overview: Overview, place: str) -> RenderableType:
    """Numbers first, then workers and failures, and at the end, where the eye is, what they mean."""
    parts: list[RenderableType] = [_headline(overview, place), Text()]
    parts += [_fact(name, text) for name, text in _facts(overview)]
    for block in (_workers(overview), _failures(overview)):
        if block is not None:
            parts += [Text(), block]
    parts.append(Text())
    parts += [line for each in explain(overview) for line in _finding(each)]
    return Group(*parts)


def _headline(overview: Overview, place: str) -> Text:
    statistics = overview.statistics
    version = statistics.get("host", {}).get("version", "version unknown")
    more = [statistics.get("name", "store"), version]
    if place.startswith("http"):
        more.append(f"up {duration(statistics.get('uptime', 0.0))}")
        more.append(f"answers within {duration(overview.answer_seconds)}")
    return Text.assemble((clean(place), "bold"), ("  " + ", ".join(more), "dim"))


def _facts(overview: Overview) -> Iterator[tuple[str, Text]]:
    statistics = overview.statistics
    states = ("queuing", "requeuing", "preparing", "running", "succeeded", "failed", "cancelled")
    counts = [(state, overview.count(state)) for state in states]
    line = Text(f"{statistics.get('total_rollouts', 0):,}")
    for state, number in counts:
        if number:
            line.append(f"   {number:,} {state}", style=STATUS_STYLES.get(state, ""))
    yield "rollouts", line
    if overview.oldest_waiting is not None:
        oldest = overview.oldest_waiting
        yield "oldest waiting", Text(f"enqueued {ago(oldest.start_time, overview.now)}   {oldest.rollout_id}")
    if overview.waiting or overview.running:
        pace = overview.pace
        told = f"{pace.per_minute:,.0f} rollouts a minute, within the last {duration(pace.seconds)}" if pace else ""
        yield "pace", Text(told or "nothing ended within a minute")
    elif overview.ended:
        yield "newest end", Text(ago(max(each.end_time or 0.0 for each in overview.ended), overview.now))
    yield "attempts", Text(f"{statistics.get('total_attempts', 0):,}")
    spans = f"{statistics.get('total_spans', 0):,}   {size(statistics.get('total_span_bytes', 0))}"
    free = statistics.get("host", {}).get("disk_free_bytes")
    yield "spans", Text(spans if free is None else f"{spans}   {size(free)} free on the disk")


def _fact(name: str, value: Text) -> Text:
    return Text.assemble((f"{name:<16}", "bold"), value)


def _workers(overview: Overview) -> RenderableType | None:
    if not overview.workers:
        return None
    alive = overview.alive
    silent = [each for each in overview.workers if each not in alive]
    gone = sum(each.directive is not None for each in silent)
    columns = (
        Column("worker"),
        Column("state"),
        Column("heard", right=True),
        Column("works on"),
        Column("asked to"),
    )
    rows: list[list[Cell | str]] = [_worker(each, overview) for each in alive[:_SHOWN_WORKERS]]
    hidden = len(alive) - len(rows)
    remarks = [f"{hidden} more alive"] if hidden else []
    if gone:
        remarks.append(f"{gone} gone as asked")
    if len(silent) > gone:
        remarks.append(f"{len(silent) - gone} silent")
    parts: list[RenderableType] = [table(columns, rows)] if rows else []
    if remarks:
        parts.append(Text(f"{', '.join(remarks)}: `agl workers ls`", style="dim"))
    return Group(*parts)


def _worker(worker: Worker, overview: Overview) -> list[Cell | str]:
    return [
        worker.worker_id,
        Cell(worker.status, STATUS_STYLES[worker.status]),
        ago(last_heard(worker), overview.now),
        worker.current_rollout_id or "",
        Cell(worker.directive or "", "yellow"),
    ]


def _failures(overview: Overview) -> RenderableType | None:
    if not overview.failures:
        return None
    columns = (Column("failed", right=True), Column("reason"), Column("the newest said", wide=True), Column("rollout"))
    return table(
        columns,
        [
            [
                f"{each.count} of {len(overview.ended)}",
                Cell(each.reason, "red"),
                one_line(reason_of(each.newest)[1], 60),
                each.newest.rollout_id,
            ]
            for each in overview.failures[:_SHOWN_FAILURES]
        ],
    )


def _finding(finding: Finding) -> Iterator[Text]:
    mark, style = {"problem": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("·", "dim")}[finding.level]
    yield Text.assemble((f"{mark} ", style), clean(finding.text))
    if finding.fix:
        yield Text.assemble("  ", (clean(finding.fix), "dim"))
