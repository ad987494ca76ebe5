"""``agl rollouts``: list rollouts, or show one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import typer

from agentlightning.cli.options import ApiKey, Format, Limit, Output, Url

if TYPE_CHECKING:
    from agentlightning.cli.output import Cell
    from agentlightning.store.base import LightningStore
    from agentlightning.types import Attempt, PaginatedResult, Rollout, RolloutStatus


_SHOWN_ATTEMPTS = 20
_SHOWN_NAMES = 12
_MANY_SPANS = 5_000


class Status(StrEnum):
    """The states of a rollout."""

    QUEUING = "queuing"
    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REQUEUING = "requeuing"


def ls(
    url: Url = None,
    api_key: ApiKey = None,
    status: Annotated[
        list[Status] | None, typer.Option("--status", "-s", help="Only those in this state; give it several times.")
    ] = None,
    match: Annotated[str | None, typer.Option(help="Only those whose id has this in it.")] = None,
    sort: Annotated[
        str | None,
        typer.Option(help="A field to sort by: end_time, priority, … [dim]Default: when they were enqueued.[/dim]"),
    ] = None,
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="Turn the order around.")] = False,
    limit: Limit = 20,
    offset: Annotated[int, typer.Option(min=0, help="Pass over so many.")] = 0,
    output: Output = Format.TABLE,
) -> None:
    """List rollouts, the newest first.

    [bold]Examples[/bold]

      agl rollouts ls --status failed
      agl rollouts ls -s queuing -s requeuing --oldest-first
      agl rollouts ls --sort end_time -n 5
      agl rollouts ls -s failed -n 1000 -o json | jq -r '.items[].rollout_id'
    """
    from agentlightning.cli.output import Column, print_json, print_rest, print_table
    from agentlightning.cli.overview import clock_of
    from agentlightning.cli.target import look

    async def question(store: LightningStore) -> tuple[PaginatedResult[Rollout], float]:
        page = await store.query_rollouts(
            status_in=cast("list[RolloutStatus]", [each.value for each in status]) if status else None,
            rollout_id_contains=match,
            sort_by=sort,
            sort_order="asc" if oldest_first else "desc",
            limit=limit,
            offset=offset,
        )
        return page, clock_of(await store.statistics())

    page, now = look(url, api_key, question)
    if output is Format.JSON:
        print_json(page)
        return
    columns = (
        Column("rollout"),
        Column("status"),
        Column("tries", right=True),
        Column("made", right=True),
        Column("took", right=True),
        Column("reason, or input", wide=True),
    )
    print_table(columns, [_row(each, now) for each in page], empty="No rollouts.")
    print_rest(page)


def _row(rollout: Rollout, now: float) -> list[Cell | str]:
    from agentlightning.cli.output import STATUS_STYLES, Cell, ago, duration, one_line
    from agentlightning.cli.overview import reason_of

    attempt: Attempt | None = getattr(rollout, "attempt", None)
    failed = rollout.status in ("failed", "cancelled") or (attempt is not None and rollout.status == "requeuing")
    return [
        rollout.rollout_id,
        Cell(rollout.status, STATUS_STYLES.get(rollout.status, "")),
        str(attempt.sequence_id if attempt else 0),
        ago(rollout.start_time, now),
        "" if rollout.end_time is None else duration(rollout.end_time - rollout.start_time),
        one_line(": ".join(filter(None, reason_of(rollout))) if failed else rollout.input, 80),
    ]


# --- One rollout -----------------------------------------------------------------------------------


class _Told(NamedTuple):
    """What the spans of one attempt say."""

    attempt: Attempt
    spans: int
    names: Counter[str]
    reward: float | None


def show(
    rollout: Annotated[
        str, typer.Argument(metavar="ROLLOUT", help="Its id, a part of it that no other has, or latest.")
    ],
    url: Url = None,
    api_key: ApiKey = None,
    output: Output = Format.TABLE,
) -> None:
    """Show one rollout: its input, every attempt, why attempts ended, their spans and rewards.

    [bold]Examples[/bold]

      agl rollouts show latest
      agl rollouts show ro-01a2 --url agentlightning.db
      agl rollouts show latest -o json | jq '.attempts[-1].reward'
    """
    from agentlightning.cli.lookup import find_rollout
    from agentlightning.cli.output import print_json
    from agentlightning.cli.overview import clock_of
    from agentlightning.cli.target import look

    async def question(store: LightningStore) -> tuple[Rollout, list[_Told], int, float]:
        found = await find_rollout(store, rollout)
        attempts = await store.query_attempts(found.rollout_id, sort_order="desc", limit=_SHOWN_ATTEMPTS)
        told = [await _told(store, each) for each in reversed(attempts)]
        return found, told, attempts.total, clock_of(await store.statistics())

    found, told, total, now = look(url, api_key, question)
    if output is Format.JSON:
        print_json({"rollout": found, "attempts": [_record(each) for each in told]})
    else:
        _print(found, told, total, now)


async def _told(store: LightningStore, attempt: Attempt) -> _Told:
    from agentlightning.types.rewards import find_final_reward

    page = await store.query_spans(attempt.rollout_id, attempt.attempt_id, sort_order="desc", limit=_MANY_SPANS)
    spans = list(reversed(page.items))
    return _Told(attempt, page.total, Counter(each.name for each in spans), find_final_reward(spans))


def _record(told: _Told) -> dict[str, Any]:
    from agentlightning.cli.output import plain

    return {**plain(told.attempt), "spans": told.spans, "span_names": dict(told.names), "reward": told.reward}


def _print(rollout: Rollout, told: Sequence[_Told], total: int, now: float) -> None:
    from agentlightning.cli.output import Column, ago, duration, one_line, print_facts, print_table
    from agentlightning.cli.overview import reason_of

    config = rollout.config
    limits = [
        f"{config.max_attempts} attempts" if config.max_attempts > 1 else "1 attempt",
        *([f"time limit {duration(config.timeout_seconds)}"] if config.timeout_seconds else []),
        *([f"silent for {duration(config.unresponsive_seconds)} at most"] if config.unresponsive_seconds else []),
        *([f"again after {', '.join(config.retry_condition)}"] if config.retry_condition else []),
    ]
    version = "" if rollout.resources_version is None else f" version {rollout.resources_version}"
    ended = "" if rollout.end_time is None else f", ended {ago(rollout.end_time, now)}"
    reason = ": ".join(filter(None, reason_of(rollout))) if rollout.status in ("failed", "cancelled") else ""
    print_facts(
        {
            "rollout": rollout.rollout_id,
            "status": rollout.status,
            "reason": one_line(reason, 2_000),
            "began": f"{ago(rollout.start_time, now)}{ended}",
            "mode": rollout.mode or "",
            "priority": str(rollout.priority) if rollout.priority else "",
            "resources": f"{rollout.resources_id}{version}" if rollout.resources_id else "none",
            "limits": "; ".join(limits),
            "input": one_line(rollout.input, 2_000),
            "metadata": "" if rollout.metadata is None else one_line(rollout.metadata, 2_000),
        }
    )
    typer.echo()
    columns = (
        Column("#", right=True),
        Column("attempt"),
        Column("status"),
        Column("worker", wide=True),
        Column("took", right=True),
        Column("spans", right=True),
        Column("reward", right=True),
        Column("reason", wide=True),
    )
    print_table(columns, [_attempt_row(each, now) for each in told], empty="No attempts yet.")
    if total > len(told):
        typer.echo(f"the last {len(told)} of {total} attempts", err=True)
    if told and told[-1].names:
        names = [f"{name} ×{number}" for name, number in told[-1].names.most_common(_SHOWN_NAMES)]
        typer.echo()
        print_facts({"spans": one_line(", ".join(names), 2_000)})
        typer.echo(f"Draw them: agl trace {rollout.rollout_id}")


def _attempt_row(told: _Told, now: float) -> list[Cell | str]:
    from agentlightning.cli.output import STATUS_STYLES, Cell, duration, one_line

    attempt = told.attempt
    end = attempt.end_time if attempt.end_time is not None else now
    reason = ": ".join(filter(None, (attempt.reason_code, attempt.reason_message)))
    return [
        str(attempt.sequence_id),
        attempt.attempt_id,
        Cell(attempt.status, STATUS_STYLES.get(attempt.status, "")),
        attempt.worker_id or "",
        duration(max(0.0, end - attempt.start_time)),
        f"{told.spans:,}",
        "none" if told.reward is None else f"{told.reward:.4g}",
        "" if attempt.status == "succeeded" else one_line(reason, 300),
    ]
