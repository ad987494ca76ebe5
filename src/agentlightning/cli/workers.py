"""``agl workers``: list workers, and ask them to drain or to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from agentlightning.cli.status import worker_columns
from agentlightning.cli.target import act, print_page
from agentlightning.cli.terminal import (
    ApiKey,
    Column,
    ExitCode,
    Limit,
    Match,
    Offset,
    Output,
    Url,
    duration,
    one_line,
)
from agentlightning.errors import StoreUnavailable

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore
    from agentlightning.types import Worker, WorkerDirective


_LOOK_SECONDS = 0.5
_FOR_PROGRAMS = ("labels", "platform", "process_space", "start_time")

Names = Annotated[list[str] | None, typer.Argument(metavar="WORKER", help="Their ids.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All workers that the store knows.")]
Wait = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Return when none of them works any more; fail after so long."),
]


def ls(
    url: Url = None,
    api_key: ApiKey = None,
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
        known = worker_columns(now)
        return [*known[:3], Column("lease", _lease, right=True), *known[3:], Column("says of itself", _told, wide=True)]

    print_page(
        url,
        api_key,
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


# --- Orders ------------------------------------------------------------------------------------------


def drain(
    workers: Names = None, every: All = False, wait: Wait = None, url: Url = None, api_key: ApiKey = None
) -> None:
    """Let workers finish what they hold; they take nothing new, and end.

    [bold]Examples[/bold]

      agl workers drain gpu-1-4711-9f2c-0
      agl workers drain --all --wait 600       before the machine goes down
    """
    _direct("drain", "asked to drain", workers, every, wait, url, api_key)


def stop(workers: Names = None, every: All = False, wait: Wait = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Let workers give up what they hold, and end. Their attempts fail with reason aborted.

    [bold]Examples[/bold]

      agl workers stop gpu-1-4711-9f2c-0
      agl workers stop --all --wait 60
    """
    _direct("stop", "asked to stop", workers, every, wait, url, api_key)


def resume(workers: Names = None, every: All = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Take back a drain or stop.

    A worker that has ended meanwhile comes back if its machine stays (`agl runner --stay`); else start it again.

    [bold]Examples[/bold]

      agl workers resume --all
    """
    _direct(None, "free to go on", workers, every, None, url, api_key)


def _direct(
    directive: WorkerDirective | None,
    told: str,
    names: Sequence[str] | None,
    every: bool,
    wait: float | None,
    url: str | None,
    api_key: str | None,
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

    act(url, api_key, action)


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
