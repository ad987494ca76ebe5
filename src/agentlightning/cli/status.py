"""``agl status``: one screen that says what goes on, what stands still, and why. ``agl workers``: who is at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    ExitCode,
    Limit,
    Match,
    Offset,
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
from agentlightning.errors import StoreUnavailable

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore
    from agentlightning.types import Worker, WorkerDirective

_SILENCE_SECONDS = 3.0
"""Answers come sooner than this; what takes longer is shown as silence."""
_SHOWN_WORKERS = 12
_SHOWN_FAILURES = 5
_LOOK_SECONDS = 0.5
"""Time between two looks at workers that are waited for."""
_FOR_PROGRAMS = ("labels", "platform", "process_space", "start_time")

Names = Annotated[list[str] | None, typer.Argument(metavar="WORKER", help="Their ids.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All workers that the store knows.")]
Wait = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Return when none of them works any more; fail after so long."),
]


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


def _worker_columns(now: float) -> list[Column[Worker]]:
    """What a table shows of workers.

    Args:
        now: the time on the store's clock.
    """
    return [
        Column("worker", lambda each: each.worker_id),
        Column("state", lambda each: each.status),
        Column("heard", lambda each: ago(last_heard(each), now), right=True),
        Column("works on", lambda each: each.current_rollout_id or ""),
        Column("asked to", lambda each: each.directive or "", style="yellow"),
    ]


def _workers(overview: Overview, width: int) -> Iterator[RenderableType]:
    alive, silent = overview.alive, [each for each in overview.workers if not overview.is_alive(each)]
    gone = sum(each.directive is not None for each in silent)
    counts = {"more alive": len(alive) - _SHOWN_WORKERS, "gone as asked": gone, "silent": len(silent) - gone}
    if overview.unowned:
        counts = {"known, and no process has the file open that they worked for": len(silent)}
    if alive:
        yield from table(_worker_columns(overview.now), alive[:_SHOWN_WORKERS], width)
    remarks = [f"{number} {what}" for what, number in counts.items() if number > 0]
    if remarks:
        yield Text(f"{', '.join(remarks)}: `agl workers ls`", style="dim")


# --- Workers -------------------------------------------------------------------------------------------


def ls(
    target: Target,
    match: Match = None,
    alive: Annotated[bool, typer.Option("--alive", help="Only those that were heard of lately.")] = False,
    limit: Limit = 100,
    offset: Offset = 0,
    output: Output = "table",
) -> None:
    """List workers and what they do, the newest first.

    A worker is [bold]busy[/bold], [bold]idle[/bold], or [bold]unknown[/bold]: not heard of for too long.

    [bold]Examples[/bold]

      agl workers ls --alive
      agl workers ls --match gpu-1 -o json | jq -r '.items[].worker_id'
    """

    def columns(now: float) -> list[Column[Worker]]:
        known = _worker_columns(now)
        if target.is_unowned():  # what they last said was to a process that is gone
            known[1] = Column("state", lambda each: f"was {each.status}")
        return [*known[:3], Column("lease", _lease, right=True), *known[3:], Column("says of itself", _told, wide=True)]

    target.print_page(
        output,
        lambda store: store.query_workers(
            status_in=["idle", "busy"] if alive else None,
            worker_id_contains=match,
            sort_order="desc",
            limit=limit,
            offset=offset,
        ),
        columns,
        empty="No workers.",
    )


def _lease(worker: Worker) -> str:
    return "" if worker.lease_seconds is None else duration(worker.lease_seconds)


def _told(worker: Worker) -> str:
    """What a worker says of itself, in few words: labels first, and nothing that only programs need."""
    facts = worker.registration or {}
    labels = facts.get("labels")
    told: dict[str, Any] = cast("dict[str, Any]", labels) if isinstance(labels, dict) else {"labels": labels}
    told = {**told, **{name: value for name, value in facts.items() if name not in _FOR_PROGRAMS}}
    return one_line(
        ", ".join(f"{name} {value}" for name, value in told.items() if value not in (None, "", {}, [])), 100
    )


def drain(target: Target, workers: Names = None, every: All = False, wait: Wait = None) -> None:
    """Let workers finish what they hold; they take nothing new, and end.

    [bold]Examples[/bold]

      agl workers drain gpu-1-4711-9f2c-0
      agl workers drain --all --wait 600       before the machine goes down
    """
    _direct("drain", "asked to drain", target, workers, every, wait)


def stop(target: Target, workers: Names = None, every: All = False, wait: Wait = None) -> None:
    """Let workers give up what they hold, and end. Their attempts fail with reason aborted.

    [bold]Examples[/bold]

      agl workers stop gpu-1-4711-9f2c-0
      agl workers stop --all --wait 60
    """
    _direct("stop", "asked to stop", target, workers, every, wait)


def resume(target: Target, workers: Names = None, every: All = False) -> None:
    """Take back a drain or stop.

    A worker that has ended meanwhile comes back if its machine stays (`agl runner --stay`); else start it again.

    [bold]Examples[/bold]

      agl workers resume --all
    """
    _direct(None, "free to go on", target, workers, every, None)


def _direct(
    directive: WorkerDirective | None,
    told: str,
    target: Target,
    names: Sequence[str] | None,
    every: bool,
    wait: float | None,
) -> None:
    if bool(names) == every:
        raise typer.BadParameter("name workers, or give --all (`agl workers ls` lists them)")

    async def action(store: LightningStore) -> None:
        directed = await store.direct_workers(directive, worker_ids=None if every else names)
        if not directed:
            typer.echo("The store knows no workers.")
        for each in directed:
            holds = f", holds {each.current_rollout_id}" if each.current_rollout_id else ""
            typer.echo(f"{each.worker_id}  {told}{holds}")
        if wait is not None:
            await _wait_until_free(store, [each.worker_id for each in directed], wait)

    target.act(action)


async def _wait_until_free(store: LightningStore, names: Sequence[str], seconds: float) -> None:
    until = time.monotonic() + seconds
    busy = wanted = set(names)
    while True:
        left = until - time.monotonic()
        try:
            busy = {each.worker_id for each in await store.query_workers(status_in=["busy"])} & wanted
        except StoreUnavailable:
            if left <= 0:
                raise
        if not busy:
            typer.echo("None of them works any more.")
            return
        if left <= 0:
            typer.echo(f"After {seconds:g} s, still at work: {', '.join(sorted(busy))}", err=True)
            raise typer.Exit(ExitCode.FAILED)
        await asyncio.sleep(min(_LOOK_SECONDS, left))
