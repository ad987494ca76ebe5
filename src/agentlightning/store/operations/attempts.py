"""Claim rollouts, start attempts, and hear from those who work on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from agentlightning.errors import IdReused
from agentlightning.lifecycle import attempts, reasons, workers
from agentlightning.lifecycle.attempts import Started, standing
from agentlightning.lifecycle.records import AttemptRow, Claim, Pair, Reason, RolloutRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import AttemptsBy, Transaction
from agentlightning.store.operations.loading import load_change, load_pair
from agentlightning.store.operations.rollouts import Draft, existing, with_resources
from agentlightning.store.operations.saving import hold, insert_rollout, save, save_started, save_worker, worker_of
from agentlightning.types import AttemptStatus

__all__ = ["Report", "claim", "lose_attempts", "report", "start_attempt", "start_rollout"]


class Report(NamedTuple):
    """What a worker says about its attempt; None leaves a field as it is."""

    status: AttemptStatus | None = None
    reason: Reason | None = None
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    metadata: tuple[bytes | None] | None = None
    """The new metadata, in a tuple of one."""


async def claim(
    tx: Transaction,
    limit: int,
    worker_id: str | None,
    request_id: str | None,
    confirm_seconds: float,
    mint: Callable[[], str],
) -> list[Pair]:
    """Start attempts of the next rollouts in the queue; a repeated request gets those that it has."""
    if request_id is not None:
        held = await _held_by_request(tx, request_id, confirm_seconds)
        if held:
            return held
    now = tx.now()
    lease = None if request_id is None else confirm_seconds
    taken: list[Pair] = []
    for rollout in await tx.next_claimable(limit):
        started = attempts.start(rollout, None, Claim(mint(), worker_id, request_id, lease), now)
        taken.append(_pair(await save_started(tx, Change(rollout, None), started)))
    if worker_id is not None:
        worker = await worker_of(tx, worker_id)
        after = workers.took(worker, taken[-1].attempt, now) if taken else workers.came_empty(worker, now)
        await save_worker(tx, worker, after)
    return taken


async def start_attempt(tx: Transaction, rollout_id: str, wanted: Claim, *, repeatable: bool) -> Pair:
    """Start an attempt whatever the retry policy says; a live one is superseded.

    Raises:
        NotFound: the rollout is unknown.
        IllegalMove: the rollout has ended.
        IdReused: the attempt's id exists already, for something else.
    """
    before = await load_change(tx, rollout_id)
    if repeatable:
        same = await tx.get(AttemptRow, wanted.attempt_id)
        if same is not None:
            if (same.rollout_id, same.worker_id) != (rollout_id, wanted.worker_id):
                raise _reused(same)
            return Pair(before.rollout, same)
    started = attempts.start(before.rollout, before.attempt, wanted, tx.now())
    return await _begin(tx, before, started)


async def start_rollout(tx: Transaction, draft: Draft, wanted: Claim) -> Pair:
    """Make a rollout together with its first attempt.

    Raises:
        NotFound: the resources that it names are unknown.
        IdReused: one of the ids exists already, for something else.
    """
    known = await existing(tx, draft)
    if known is not None:
        return _pair(known)
    taken = await tx.get(AttemptRow, wanted.attempt_id)
    if taken is not None:
        raise _reused(taken)
    rollout = await with_resources(tx, replace(draft.row, start_time=tx.now().wall))
    rollout = await insert_rollout(tx, rollout)
    started = attempts.start(rollout, None, wanted, tx.now())
    return await _begin(tx, Change(rollout, None), started)


async def report(tx: Transaction, rollout_id: str, attempt_id: str, said: Report) -> AttemptRow:
    """Take a worker's report. Being heard is a sign of life, whatever is said.

    Raises:
        NotFound: the rollout or the attempt is unknown.
        StaleAttempt: the attempt has lost its rollout, and the report is about more than its metadata.
        IllegalMove: there is no such move.
    """
    before = await load_pair(tx, rollout_id, attempt_id)
    now = tx.now()
    edits = said.worker_id is not None or said.last_heartbeat_time is not None
    if said.status is not None:
        after = attempts.report(before, said.status, said.reason, now)
    elif edits and standing(before) == "stale" and not _same(before.attempt, said):
        raise attempts.stale(before)
    else:
        after = attempts.beat(before, now)
    attempt = after.attempt
    heard = attempt is not before.attempt  # else it has ended, and only its metadata may still change
    if said.metadata is not None:
        attempt = replace(attempt, metadata=said.metadata[0])
    if said.last_heartbeat_time is not None and heard:
        attempt = replace(attempt, last_heartbeat_time=said.last_heartbeat_time)
    if said.worker_id is not None and heard:
        attempt = replace(attempt, worker_id=said.worker_id)
    return _pair(await save(tx, Change(*before), Change(after.rollout, attempt))).attempt


async def lose_attempts(tx: Transaction, worker_id: str, message: str) -> list[AttemptRow]:
    """End all live attempts of a worker that is gone."""
    lost: list[AttemptRow] = []
    for attempt in reversed(await tx.attempts_by(AttemptsBy("worker_id", worker_id, live_only=True))):
        rollout = await tx.get(RolloutRow, attempt.rollout_id)
        if rollout is not None:
            before = Pair(rollout, attempt)
            after = attempts.lose(before, Reason(reasons.WORKER_LOST, message), tx.now())
            lost.append(_pair(await save(tx, Change(*before), Change(*after))).attempt)
    return lost


async def _held_by_request(tx: Transaction, request_id: str, confirm_seconds: float) -> list[Pair]:
    held: list[Pair] = []
    for attempt in reversed(await tx.attempts_by(AttemptsBy("request_id", request_id, live_only=False))):
        rollout = await tx.get(RolloutRow, attempt.rollout_id)
        if rollout is None:
            continue
        before = Pair(rollout, attempt)
        match standing(before):
            case "live":
                held.append(before)
            case "revivable":
                after = attempts.reclaim(before, confirm_seconds, tx.now())
                held.append(_pair(await save(tx, Change(*before), Change(*after))))
            case "stale":
                pass
    return held


async def _begin(tx: Transaction, before: Change, started: Started) -> Pair:
    pair = _pair(await save_started(tx, before, started))
    await hold(tx, pair.attempt)
    return pair


def _pair(change: Change) -> Pair:
    assert change.attempt is not None
    return Pair(change.rollout, change.attempt)


def _same(attempt: AttemptRow, said: Report) -> bool:
    pairs: Sequence[tuple[object, object]] = (
        (said.worker_id, attempt.worker_id),
        (said.last_heartbeat_time, attempt.last_heartbeat_time),
    )
    return all(wanted is None or wanted == stored for wanted, stored in pairs)


def _reused(attempt: AttemptRow) -> IdReused:
    return IdReused(
        f"attempt {attempt.attempt_id!r} exists already, for rollout {attempt.rollout_id!r} and worker "
        f"{attempt.worker_id!r}; a new attempt needs a new id"
    )
