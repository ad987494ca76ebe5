"""``agl workers``: list workers, and ask them to drain or to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from agentlightning.cli.options import ApiKey, ExitCode, Format, Limit, Output, Url
from agentlightning.cli.output import (
    STATUS_STYLES,
    Cell,
    Column,
    ago,
    duration,
    one_line,
    print_json,
    print_rest,
    print_table,
)
from agentlightning.cli.overview import clock_of, last_heard
from agentlightning.cli.target import act, look
from agentlightning.errors import StoreUnavailable

if TYPE_CHECKING:
    from agentlightning.cli.output import Cell
    from agentlightning.store.base import LightningStore
    from agentlightning.types import PaginatedResult, Worker, WorkerDirective


_LOOK_SECONDS = 0.5

Names = Annotated[list[str] | None, typer.Argument(metavar="WORKER", help="Their ids.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All workers that the store knows.")]
Wait = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="Return when none of them works any more; fail after so long."),
]


def ls(
    url: Url = None,
    api_key: ApiKey = None,
    match: Annotated[str | None, typer.Option(help="Only those whose id has this in it.")] = None,
    alive: Annotated[bool, typer.Option("--alive", help="Only those that were heard of lately.")] = False,
    limit: Limit = 100,
    offset: Annotated[int, typer.Option(min=0, help="Pass over so many.")] = 0,
    output: Output = Format.TABLE,
) -> None:
    """List workers and what they do, the newest first.

    A worker is [bold]busy[/bold], [bold]idle[/bold], or [bold]unknown[/bold]: not heard of for too long.

    [bold]Examples[/bold]

      agl workers ls --alive
      agl workers ls --match gpu-1 -o json | jq -r '.items[].worker_id'
    """

    async def question(store: LightningStore) -> tuple[PaginatedResult[Worker], float]:
        page = await store.query_workers(
            status_in=["idle", "busy"] if alive else None,
            worker_id_contains=match,
            sort_order="desc",
            limit=limit,
            offset=offset,
        )
        return page, clock_of(await store.statistics())

    page, now = look(url, api_key, question)
    if output is Format.JSON:
        print_json(page)
        return
    columns = (
        Column("worker"),
        Column("state"),
        Column("heard", right=True),
        Column("lease", right=True),
        Column("works on"),
        Column("asked to"),
        Column("says of itself", wide=True),
    )
    print_table(columns, [_row(each, now) for each in page], empty="No workers.")
    print_rest(page)


def _row(worker: Worker, now: float) -> list[Cell | str]:
    return [
        worker.worker_id,
        Cell(worker.status, STATUS_STYLES[worker.status]),
        ago(last_heard(worker), now),
        "" if worker.lease_seconds is None else duration(worker.lease_seconds),
        worker.current_rollout_id or "",
        Cell(worker.directive or "", "yellow"),
        one_line(_told(worker.registration or {}), 100),
    ]


_FOR_PROGRAMS = ("platform", "process_space", "start_time")


def _told(registration: Mapping[str, Any]) -> str:
    """What a worker says of itself, in few words: labels first, and nothing that only programs need."""
    facts = {name: value for name, value in registration.items() if name not in _FOR_PROGRAMS}
    labels = facts.pop("labels", None)
    told = {**(cast("dict[str, Any]", labels) if isinstance(labels, dict) else {"labels": labels}), **facts}
    return ", ".join(f"{name} {value}" for name, value in told.items() if value not in (None, "", {}, []))


# --- Orders ------------------------------------------------------------------------------------------


def drain(
    workers: Names = None, every: All = False, wait: Wait = None, url: Url = None, api_key: ApiKey = None
) -> None:
    """Let workers finish what they hold; they take nothing new, and end.

    [bold]Examples[/bold]

      agl workers drain gpu-1-4711-9f2c-0
      agl workers drain --all --wait 600       before the machine goes down
    """
    _direct("drain", _chosen(workers, every), wait, url, api_key)


def stop(workers: Names = None, every: All = False, wait: Wait = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Let workers give up what they hold, and end. Their attempts fail with reason aborted.

    [bold]Examples[/bold]

      agl workers stop gpu-1-4711-9f2c-0
      agl workers stop --all --wait 60
    """
    _direct("stop", _chosen(workers, every), wait, url, api_key)


def resume(workers: Names = None, every: All = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Take back a drain or stop.

    A worker that has ended meanwhile comes back if its machine stays (`agl runner --stay`); else start it again.

    [bold]Examples[/bold]

      agl workers resume --all
    """
    _direct(None, _chosen(workers, every), None, url, api_key)


def _chosen(names: Sequence[str] | None, every: bool) -> Sequence[str] | None:
    """The workers meant; None: all."""
    if bool(names) == every:
        raise typer.BadParameter("name workers, or give --all (`agl workers ls` lists them)")
    return None if every else names


def _direct(
    directive: WorkerDirective | None,
    names: Sequence[str] | None,
    wait: float | None,
    url: str | None,
    api_key: str | None,
) -> None:
    async def action(store: LightningStore) -> None:
        directed = await store.direct_workers(directive, worker_ids=names)
        verb = {"drain": "asked to drain", "stop": "asked to stop", None: "free to go on"}[directive]
        if not directed:
            typer.echo("The store knows no workers.")
        for each in directed:
            holds = f", holds {each.current_rollout_id}" if each.current_rollout_id else ""
            typer.echo(f"{each.worker_id}  {verb}{holds}")
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
