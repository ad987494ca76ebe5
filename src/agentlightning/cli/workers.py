"""``agl workers``: who is at work, who was, and what they are asked to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from agentlightning.cli.overview import has_left, last_heard
from agentlightning.cli.target import Target, clock_of
from agentlightning.cli.terminal import (
    Age,
    Column,
    ExitCode,
    Limit,
    Match,
    Offset,
    Output,
    ago,
    count,
    duration,
    one_line,
    print_table,
)
from agentlightning.errors import StoreUnavailable

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore
    from agentlightning.types import Worker, WorkerDirective

_LOOK_SECONDS = 0.5
"""Time between two looks at workers that are waited for."""
_AT_ONCE = 1_000
_FOR_PROGRAMS = ("labels", "platform", "process_space", "start_time")

Names = Annotated[list[str] | None, typer.Argument(metavar="WORKER", help="Their ids.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All workers that the store knows.")]
Wait = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Return when none of them works any more; fail after so long."),
]


def worker_columns(now: float) -> list[Column[Worker]]:
    """What a table shows of workers.

    Args:
        now: the time on the store's clock.
    """
    return [
        Column("worker", lambda each: each.worker_id),
        Column("state", _state),
        Column("heard", lambda each: ago(last_heard(each), now), right=True),
        Column("works on", lambda each: each.current_rollout_id or ""),
        Column("asked to", lambda each: each.directive or "", style="yellow"),
    ]


def _state(worker: Worker) -> str:
    """Its state; of one that is gone, whether it has left, and else why it is missing."""
    if worker.status != "unknown" or worker.reason_code is None:
        return worker.status
    return "left" if has_left(worker) else worker.reason_code


def ls(
    target: Target,
    match: Match = None,
    alive: Annotated[bool, typer.Option("--alive", help="Only those that were heard of lately.")] = False,
    limit: Limit = 100,
    offset: Offset = 0,
    output: Output = "table",
) -> None:
    """List workers and what they do, the newest first.

    A worker is [bold]busy[/bold], [bold]idle[/bold], or gone: it has [bold]left[/bold] (ended in order or as asked), or
    is missing for the reason that is shown.

    [bold]Examples[/bold]

      agl workers ls --alive
      agl workers ls --match gpu-1 -o json | jq -r '.items[].worker_id'
    """

    def columns(now: float) -> list[Column[Worker]]:
        known = worker_columns(now)
        if target.is_unowned():  # what they last said was to a process that is gone
            known[1] = Column("state", lambda each: _state(each) if each.reason_code else f"was {each.status}")
        why: Column[Worker] = Column("because", lambda each: one_line(each.reason_message or "", 80), wide=True)
        told: Column[Worker] = Column("says of itself", _told, wide=True)
        return [*known[:3], Column("lease", _lease, right=True), *known[3:], why, told]

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


def prune(
    target: Target,
    older_than: Annotated[float, Age(help="How long ago they were last heard of: 90m, 12h, 7d.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show which they are.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forget workers that ended, or died, long ago. What they did is kept.

    [bold]Examples[/bold]

      agl workers prune --older-than 7d --dry-run
      agl workers prune --older-than 30d --yes
    """

    async def question(store: LightningStore) -> tuple[list[Worker], float]:
        now = clock_of(await store.statistics())
        known = await store.query_workers(limit=-1)
        return [each for each in known if _is_long_gone(each, now - older_than)], now

    gone, now = target.look(question)
    print_table(worker_columns(now), gone, empty="No workers.")
    if dry_run or not gone:
        typer.echo(f"{count(len(gone), 'worker')} would be forgotten" if dry_run else "Nothing to forget.")
        return
    if not yes:
        typer.confirm(f"Forget {count(len(gone), 'worker')} of {target}?", abort=True)
    names = [each.worker_id for each in gone]

    async def action(store: LightningStore) -> int:
        parts = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
        return sum([len(await store.delete_workers(part)) for part in parts])

    deleted = target.act(action)
    typer.echo(f"{count(deleted, 'worker')} forgotten")
    if deleted < len(names):
        typer.echo(f"{len(names) - deleted} came back meanwhile, or still have a lease", err=True)


def _is_long_gone(worker: Worker, since: float) -> bool:
    """Whether a worker is gone, or has no lease that would tell, and was last heard of before this time."""
    missing = worker.current_attempt_id is None and (worker.status == "unknown" or worker.lease_seconds is None)
    return missing and (last_heard(worker) or 0.0) < since


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
