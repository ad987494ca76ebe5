"""``agl rollouts``: list rollouts, or show one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import inf, nan
from typing import TYPE_CHECKING, Annotated, NamedTuple, get_args

import typer

from agentlightning.cli.overview import reason_of
from agentlightning.cli.rewards import rewards_of
from agentlightning.cli.target import Target, clock_of
from agentlightning.cli.terminal import (
    Age,
    Column,
    Limit,
    Match,
    Offset,
    OptionGroup,
    Output,
    ago,
    count,
    duration,
    one_line,
    plain,
    print_facts,
    print_json,
    print_table,
)
from agentlightning.errors import InvalidValue, NotFound
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, Attempt, AttemptedRollout, PaginatedResult, Rollout, RolloutStatus
from agentlightning.types.attempt_spans import used_default_resources
from agentlightning.types.rewards import find_final_reward

_SHOWN_ATTEMPTS = 20
_SHOWN_NAMES = 12
_MANY_SPANS = 5_000
_REWARDED = 2_000
"""So many rollouts are asked for their rewards, where those decide which are shown."""

Id = Annotated[str, typer.Argument(metavar="ROLLOUT", help="Its id, a part of it that no other has, or latest.")]

if TYPE_CHECKING:
    Status = RolloutStatus
else:  # typer takes a list of an enum, and none of a Literal
    Status = StrEnum("Status", {each.upper(): each for each in get_args(RolloutStatus)})


@dataclass(frozen=True)
class RolloutQuery(OptionGroup):
    """Which rollouts are listed, and in which order."""

    status: Annotated[
        list[Status] | None, typer.Option("--status", "-s", help="Only those in this state; give it several times.")
    ] = None
    match: Match = None
    sort: Annotated[
        str | None,
        typer.Option(
            help="A field to sort by: end_time, priority, …, or reward. [dim]Default: when they were enqueued.[/dim]"
        ),
    ] = None
    min_reward: Annotated[float | None, typer.Option(help="Only those with this reward or more.")] = None
    max_reward: Annotated[float | None, typer.Option(help="Only those with this reward or less.")] = None
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="Turn the order around.")] = False
    limit: Limit = 20
    offset: Offset = 0

    async def read(self, store: LightningStore, rewards: dict[str, float]) -> PaginatedResult[Rollout]:
        """The page; the rewards of its rollouts are added to ``rewards``, by id."""
        page = partial(store.query_rollouts, status_in=self.status or None, rollout_id_contains=self.match)
        if self.sort == "reward" or (self.min_reward, self.max_reward) != (None, None):
            sort = None if self.sort == "reward" else self.sort
            found = await page(sort_by=sort, sort_order="desc", limit=_REWARDED)
            rewards.update(await rewards_of(store, found.items))
            chosen = self._by_reward(found.items, rewards)
            shown = chosen[self.offset :][: self.limit]
            return PaginatedResult(items=shown, limit=self.limit, offset=self.offset, total=len(chosen))
        order = "asc" if self.oldest_first else "desc"
        found = await page(sort_by=self.sort, sort_order=order, limit=self.limit, offset=self.offset)
        rewards.update(await rewards_of(store, found.items))
        return found

    def _by_reward(self, rollouts: Sequence[Rollout], rewards: Mapping[str, float]) -> list[Rollout]:
        """Those with a reward within the limits, the highest first or as they were."""
        least = -inf if self.min_reward is None else self.min_reward
        most = inf if self.max_reward is None else self.max_reward
        chosen = [each for each in rollouts if least <= rewards.get(each.rollout_id, nan) <= most]
        if self.sort == "reward":
            chosen.sort(key=lambda each: -rewards[each.rollout_id])
        return chosen[::-1] if self.oldest_first else chosen


def ls(target: Target, query: RolloutQuery, output: Output = "table") -> None:
    """List rollouts, the newest first, with their rewards.

    Filters and order by reward look at the 2,000 newest rollouts that the other options leave.

    [bold]Examples[/bold]

      agl rollouts ls --status failed
      agl rollouts ls -s queuing -s requeuing --oldest-first
      agl rollouts ls --sort end_time -n 5
      agl rollouts ls --sort reward --oldest-first     the worst first
      agl rollouts ls --max-reward 0.2
      agl rollouts ls -s failed -n 1000 -o json | jq -r '.items[].rollout_id'
    """
    rewards: dict[str, float] = {}
    target.print_page(
        output,
        lambda store: query.read(store, rewards),
        lambda now: _columns(rewards, now),
        empty="No rollouts.",
        record=lambda each: {**plain(each), "reward": rewards.get(each.rollout_id)},
    )


def _columns(rewards: Mapping[str, float], now: float) -> Sequence[Column[Rollout]]:
    return (
        Column("rollout", lambda each: each.rollout_id),
        Column("status", lambda each: each.status),
        Column("reward", lambda each: _reward(rewards.get(each.rollout_id)), right=True),
        Column("tries", _tries, right=True),
        Column("made", lambda each: ago(each.start_time, now), right=True),
        Column("took", lambda each: duration(each.end_time - each.start_time) if each.end_time else "", right=True),
        Column("reason, or input", _reason_or_input, wide=True),
    )


def _reward(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _tries(rollout: Rollout) -> str:
    return str(rollout.attempt.sequence_id) if isinstance(rollout, AttemptedRollout) else "0"


def _reason_or_input(rollout: Rollout) -> str:
    failed = rollout.status in ("failed", "cancelled") or (
        rollout.status == "requeuing" and isinstance(rollout, AttemptedRollout)
    )
    return one_line(": ".join(filter(None, reason_of(rollout))) if failed else rollout.input, 80)


class _Told(NamedTuple):
    """What the spans of one attempt say."""

    attempt: Attempt
    spans: int
    names: Counter[str]
    reward: float | None
    default_resources: str | None
    """Why it ran with the default resources of its runner; None: it had those of the rollout."""
    no_model_calls: bool
    """Whether it has ended without a recorded model call, although it was given a model to call."""


async def _told_of(store: LightningStore, attempt: Attempt, *, has_model: bool) -> _Told:
    from agentlightning.adapter.adapters import TracerTraceToTriplet  # here, so that other commands start faster

    page = await store.query_spans(attempt.rollout_id, attempt.attempt_id, sort_order="desc", limit=_MANY_SPANS)
    spans = list(reversed(page.items))
    is_known = has_model and attempt.end_time is not None and page.total == len(spans)
    no_calls = is_known and not TracerTraceToTriplet().examine(spans).has_calls
    names, defaults = Counter(span.name for span in spans), used_default_resources(spans)
    return _Told(attempt, page.total, names, find_final_reward(spans), defaults, no_calls)


async def _has_model(store: LightningStore, rollout: Rollout) -> bool:
    if rollout.resources_id is None:
        return False
    given = await store.get_resources_by_id(rollout.resources_id)
    return given is not None and any(isinstance(each, LLM) for each in given.resources.values())


def show(target: Target, rollout: Id, output: Output = "table") -> None:
    """Show one rollout: its input, every attempt, why attempts ended, their spans and rewards.

    [bold]Examples[/bold]

      agl rollouts show latest
      agl rollouts show ro-01a2 --url agentlightning.db
      agl rollouts show latest -o json | jq '.attempts[-1].reward'
    """

    async def question(store: LightningStore) -> tuple[Rollout, list[_Told], int, float]:
        found = await find_rollout(store, rollout)
        attempts = await store.query_attempts(found.rollout_id, sort_order="desc", limit=_SHOWN_ATTEMPTS)
        has_model = await _has_model(store, found)
        told = [await _told_of(store, each, has_model=has_model) for each in reversed(attempts)]
        return found, told, attempts.total, clock_of(await store.statistics())

    found, told, total, now = target.look(question)
    if output == "json":
        attempts = [
            {**plain(each.attempt), "spans": each.spans, "span_names": each.names, "reward": each.reward}
            | {"no_model_calls": each.no_model_calls, "default_resources": each.default_resources}
            for each in told
        ]
        print_json({"rollout": found, "attempts": attempts})
        return
    _print_rollout(found, now)
    _print_attempts(found, told, total, now)


def _print_rollout(rollout: Rollout, now: float) -> None:
    config = rollout.config
    limits = [
        count(config.max_attempts, "attempt"),
        f"time limit {duration(config.timeout_seconds)}" if config.timeout_seconds else "",
        f"silent for {duration(config.unresponsive_seconds)} at most" if config.unresponsive_seconds else "",
        f"again after {', '.join(config.retry_condition)}" if config.retry_condition else "",
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
            "priority": str(rollout.priority or ""),
            "resources": f"{rollout.resources_id}{version}" if rollout.resources_id else "none",
            "limits": "; ".join(filter(None, limits)),
            "input": one_line(rollout.input, 2_000),
            "metadata": "" if rollout.metadata is None else one_line(rollout.metadata, 2_000),
        }
    )
    typer.echo()


def _print_attempts(rollout: Rollout, told: Sequence[_Told], total: int, now: float) -> None:
    columns: tuple[Column[_Told], ...] = (
        Column("#", lambda each: str(each.attempt.sequence_id), right=True),
        Column("attempt", lambda each: each.attempt.attempt_id),
        Column("status", lambda each: each.attempt.status),
        Column("worker", lambda each: each.attempt.worker_id or "", wide=True),
        Column("took", lambda each: duration(max(0.0, (each.attempt.end_time or now) - each.attempt.start_time)), True),
        Column("spans", lambda each: f"{each.spans:,}", right=True),
        Column("reward", lambda each: "none" if each.reward is None else f"{each.reward:.4g}", right=True),
        Column("reason", lambda each: _reason_of_attempt(each), wide=True),
    )
    print_table(columns, told, empty="No attempts yet.")
    if total > len(told):
        typer.echo(f"the last {len(told)} of {total} attempts", err=True)
    if any(each.no_model_calls for each in told):
        typer.echo("no_model_calls: an attempt that was given a model ended without a recorded call of it", err=True)
    for each in told:
        if each.default_resources is not None:
            why = f"attempt {each.attempt.sequence_id} ran with default resources: {each.default_resources}"
            typer.echo(one_line(why, 500), err=True)
    if told and told[-1].names:
        names = [f"{name} ×{number}" for name, number in told[-1].names.most_common(_SHOWN_NAMES)]
        typer.echo()
        print_facts({"spans": one_line(", ".join(names), 2_000)})
        typer.echo(f"Read it: agl trace {rollout.rollout_id}")


def _reason_of_attempt(told: _Told) -> str:
    attempt = told.attempt
    reason = ": ".join(filter(None, (attempt.reason_code, attempt.reason_message)))
    if attempt.status == "succeeded":
        return "no_model_calls" if told.no_model_calls else ""
    return one_line(reason, 300)


# --- ``agl rollouts cancel`` and ``prune``: what changes rollouts ---


def cancel(
    target: Target,
    rollouts: Annotated[
        list[str], typer.Argument(metavar="ROLLOUT", help="Their ids, or parts of them that no others have.")
    ],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Why, for those who look later.")] = None,
) -> None:
    """End rollouts that nobody wants any more, whether they wait or are worked on.

    An attempt at work fails with reason cancelled; its runner hears of it with its next heartbeat. A rollout that
    has ended otherwise stays as it is, which is an error.

    [bold]Examples[/bold]

      agl rollouts cancel ro-01a2 --message "wrong prompt"
      agl rollouts ls -s queuing -o json | jq -r '.items[].rollout_id' | xargs agl rollouts cancel
    """

    async def action(store: LightningStore) -> list[Rollout]:
        found = [await find_rollout(store, each) for each in rollouts]  # all are known before one is cancelled
        return [await store.cancel_rollout(each.rollout_id, message=message) for each in found]

    for each in target.act(action):
        typer.echo(f"{each.rollout_id}  {each.status}")


def prune(
    target: Target,
    older_than: Annotated[float, Age(help="How long ago they ended: 90m, 12h, 7d.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete rollouts that ended long ago, with their attempts and spans. There is no way back but a backup.

    A database file does not become smaller by it; the room in it is used again.

    [bold]Examples[/bold]

      agl rollouts prune --older-than 30d
      agl rollouts prune --older-than 12h --yes
    """
    if not yes:
        typer.confirm(f"Delete all rollouts in {target} that ended more than {duration(older_than)} ago?", abort=True)
    deleted = target.act(lambda store: store.delete_finished_rollouts(older_than_seconds=older_than))
    typer.echo(f"{deleted:,} rollouts deleted")


# --- From what a user types to the record that is meant ---

LATEST = "latest"
"""Stands for the newest; no id may be this."""
_CANDIDATES = 5


async def find_rollout(store: LightningStore, name: str, *latest_of: RolloutStatus) -> Rollout:
    """A rollout by its id, by a part of it that no other has, or ``latest``: the one enqueued last.

    Args:
        store: has the rollouts.
        name: what the user typed.
        latest_of: states of which ``latest`` has one; none: any.

    Raises:
        NotFound: there is none.
        InvalidValue: there are several.
    """
    if name == LATEST:
        page = await store.query_rollouts(status_in=latest_of or None, sort_order="desc", limit=1)
        if not page.items and latest_of:
            raise NotFound("nobody has begun to work on any rollout yet; `agl status` says why")
        if not page.items:
            raise NotFound("the store has no rollouts yet")
        return page.items[0]
    found = await store.get_rollout_by_id(name)
    if found is not None:
        return found
    page = await store.query_rollouts(rollout_id_contains=name, limit=_CANDIDATES)
    if not page.items:
        raise NotFound(f"there is no rollout {name!r}; `agl rollouts ls` lists them")
    if page.total > 1:
        some = ", ".join(each.rollout_id for each in page.items)
        raise InvalidValue(f"{name!r} is part of {page.total} ids: {some}{', …' if page.total > len(page) else ''}")
    return page.items[0]
