"""Claim rollouts, start attempts, and hear from those who work on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from agentlightning.errors import IdReused, StaleAttempt
from agentlightning.lifecycle import attempts, workers
from agentlightning.lifecycle.attempts import Started, standing
from agentlightning.lifecycle.records import AttemptRow, Claim, Holder, Moment, Pair, Reason, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Claimed, Filter, PageQuery, Transaction
from agentlightning.store.operations.rollouts import Draft, existing, with_resources
from agentlightning.store.operations.rows import (
    hold,
    insert_rollout,
    load_change,
    load_pair,
    load_rollout,
    save,
    save_started,
    save_worker,
    worker_of,
)
from agentlightning.store.operations.spans import SpanDraft, insert_spans
from agentlightning.store.slices import ATTEMPTS
from agentlightning.types import AttemptStatus


class ClaimRequest(NamedTuple):
    """Which rollouts a worker wants."""

    limit: int
    worker_id: str | None
    request_id: str | None
    """Makes the claim repeatable; its attempts must be confirmed."""
    digest: bytes
    """Digest of the request, if it has an id."""
    confirm_seconds: float
    waited: bool = False
    """Whether its caller asked earlier, and has waited since: it may be gone."""


class Report(NamedTuple):
    """What a worker says about its attempt; None leaves a field as it is."""

    status: AttemptStatus | None = None
    reason: Reason | None = None
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    metadata: tuple[bytes | None] | None = None
    """The new metadata, in a tuple of one."""
    retry: bool | None = None


class Finish(NamedTuple):
    """What finishing an attempt did."""

    attempt: AttemptRow
    sequence_ids: list[int]
    """That of each span; 0 for one that was stored before."""
    claimed: list[Pair]
    refused: StaleAttempt | None = None
    """Why only the spans were stored. It is not raised by the operation, which would undo that."""


async def claim(tx: Transaction, wanted: ClaimRequest, mint: Callable[[], str]) -> list[Pair] | None:
    """Start attempts of the next rollouts in the queue; None if this request will never get any.

    That is so for a worker that shall take no more work, and for a repeated request: it gets those of its attempts that
    it still has, and no others, so none if it has none any more.

    Raises:
        IdReused: ``request_id`` was used for another claim.
    """
    held = await claimed_before(tx, wanted)
    return await claim_new(tx, wanted, mint) if held is None else held or None


async def claim_for_waiter(tx: Transaction, wanted: ClaimRequest, mint: Callable[[], str]) -> None:
    """``claim`` in the name of a caller that waits, who repeats the claim when it is told of what it got."""
    assert wanted.request_id is not None
    if not await tx.attempts_of_request(wanted.request_id):  # else it is told by whoever claimed, or need not be
        taken = await claim_new(tx, wanted._replace(waited=True), mint)
        if taken:
            tx.publish(Claimed(wanted.request_id, len(taken)))


async def claim_new(tx: Transaction, wanted: ClaimRequest, mint: Callable[[], str]) -> list[Pair] | None:
    """``claim``, of a request that is known to be none that is repeated."""
    worker_id, waited, now = wanted.worker_id, wanted.waited, tx.now()
    worker = None if worker_id is None else await worker_of(tx, worker_id)
    if worker is not None and worker.directive is not None:
        await save_worker(tx, worker, workers.came_empty(worker, now, waited=waited))
        return None
    taken = await claim_more(tx, wanted, mint)
    if worker is not None:
        if taken:
            after = workers.took(worker, taken[-1].attempt, now, waited=waited)
        else:
            after = workers.came_empty(worker, now, waited=waited)
        await save_worker(tx, worker, after)
    return taken


async def claim_more(tx: Transaction, wanted: ClaimRequest, mint: Callable[[], str]) -> list[Pair]:
    """Start attempts of the next rollouts for a claim, without a look at its worker."""
    limit, worker_id, request_id, digest, confirm_seconds, _ = wanted
    lease = None if request_id is None else confirm_seconds
    taken: list[Pair] = []
    for rollout in await tx.next_claimable(limit):
        started = attempts.start(rollout, None, Claim(mint(), worker_id, request_id, lease, digest), tx.now())
        taken.append(_pair(await save_started(tx, Change(rollout, None), started)))
    return taken


async def start_attempt(tx: Transaction, rollout_id: str, wanted: Claim) -> Pair:
    """Start an attempt whatever the retry policy says; a live one is superseded.

    Raises:
        NotFound: the rollout is unknown.
        IllegalMove: the rollout has ended.
        IdReused: the attempt's id exists already, for something else.
    """
    before = await load_change(tx, rollout_id)
    same = await _made_before(tx, wanted)
    if same is not None:
        return Pair(before.rollout, same)
    started = attempts.start(before.rollout, before.attempt, wanted, tx.now())
    return await _begin(tx, before, started)


async def start_rollout(tx: Transaction, draft: Draft, wanted: Claim) -> Pair:
    """Make a rollout together with its first attempt.

    Raises:
        NotFound: the resources that it names are unknown.
        IdReused: one of the ids exists already, for something else.
    """
    same = await _made_before(tx, wanted)
    known = await existing(tx, draft)
    if known is not None:
        first = same or await _first_attempt(tx, known.rollout)
        if first.rollout_id != known.rollout.rollout_id or first.digest != wanted.digest:
            raise _reused(first)
        return Pair(known.rollout, first)
    if same is not None:
        if draft.repeatable:
            raise _reused(same)
        return Pair(await load_rollout(tx, same.rollout_id), same)
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
    return _pair(await save(tx, Change(*before), Change(*_reported(before, said, tx.now())))).attempt


async def finish(
    tx: Transaction,
    rollout_id: str,
    attempt_id: str,
    drafts: Sequence[SpanDraft],
    said: Report,
    wanted: ClaimRequest | None,
    mint: Callable[[], str],
) -> Finish:
    """Store an attempt's last spans, end it, and claim the next rollouts, all in this transaction.

    The spans of a stale attempt are kept; it is not ended, and nothing is claimed.

    Raises:
        NotFound: the rollout or the attempt is unknown.
        IdReused: the claim's ``request_id`` was used for another claim.
    """
    before = await load_pair(tx, rollout_id, attempt_id)
    sequence_ids, counter = await insert_spans(tx, before.attempt, drafts)
    pair = before
    if counter != before.attempt.span_sequence:
        pair = Pair(before.rollout, replace(before.attempt, span_sequence=counter))
    refused = None
    try:
        after = _reported(pair, said, tx.now())
    except StaleAttempt as error:
        after, refused = pair, error
    attempt = _pair(await save(tx, Change(*before), Change(*after))).attempt
    claimed = None
    if wanted is not None and refused is None:
        # A repeat gets the attempts of the first call only. If it found the queue empty, a duplicate that is delivered
        # late must not claim a rollout that nobody will receive.
        repeated = not before.attempt.live and before.attempt.status == said.status
        claimed = await (claimed_before(tx, wanted) if repeated else claim(tx, wanted, mint))
    return Finish(attempt, sequence_ids, claimed or [], refused)


async def release(tx: Transaction, rollout_id: str, attempt_id: str) -> AttemptRow:
    """Give back an attempt whose work has not begun.

    Raises:
        NotFound: the rollout or the attempt is unknown.
        StaleAttempt: the attempt has lost its rollout.
        IllegalMove: its work has begun.
    """
    before = await load_pair(tx, rollout_id, attempt_id)
    after = attempts.release(before, tx.now())
    return _pair(await save(tx, Change(*before), Change(*after))).attempt


async def abandon(tx: Transaction, request_id: str | None, attempt_ids: Sequence[str]) -> None:
    """Give back what was claimed, under this ``request_id`` or as these attempts, for a caller who left before it heard
    of that. What was heard of in the meantime stays, since somebody has it."""
    if request_id is not None:
        made = await tx.attempts_of_request(request_id)
    else:
        made = [each for each in [await tx.get(AttemptRow, attempt_id) for attempt_id in attempt_ids] if each]
    for attempt in made:
        before = Pair(await load_rollout(tx, attempt.rollout_id), attempt)
        await save(tx, Change(*before), Change(*attempts.abandon(before, tx.now())))


def _reported(before: Pair, said: Report, now: Moment) -> Pair:
    """The pair after a worker's report. Raises as ``report``."""
    edits = said.worker_id is not None or said.last_heartbeat_time is not None
    if said.status is not None:
        after = attempts.report(before, said.status, said.reason, now, said.retry)
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
    return Pair(after.rollout, attempt)


async def holder_of(tx: Transaction, worker_id: str | None) -> Holder:
    """What is known of the worker of attempts that end because nothing is heard of them."""
    worker = None if worker_id is None else await tx.get(WorkerRow, worker_id)
    if worker is None:
        return Holder()
    held = [await tx.get(AttemptRow, each) for each in await tx.live_attempts_of(worker.worker_id)]
    return Holder(workers.last_heard(worker, filter(None, held)))


async def lose_attempts(
    tx: Transaction, worker_id: str, reason: Reason, holder: Holder, *, but: Collection[str] = ()
) -> tuple[list[AttemptRow], bool]:
    """End live attempts of a worker that is gone, but those with these ids: (a slice, whether there are more)."""
    lost: list[AttemptRow] = []
    held = [each for each in await tx.live_attempts_of(worker_id) if each not in but]
    for attempt_id in held[:ATTEMPTS]:
        attempt = await tx.get(AttemptRow, attempt_id)
        rollout = attempt and await tx.get(RolloutRow, attempt.rollout_id)
        if attempt is not None and rollout is not None:
            before = Pair(rollout, attempt)
            after = attempts.lose(before, reason, holder, tx.now())
            lost.append(_pair(await save(tx, Change(*before), Change(*after))).attempt)
    return lost, len(held) > ATTEMPTS


async def _made_before(tx: Transaction, wanted: Claim) -> AttemptRow | None:
    """The attempt that an earlier, equal request made under this id.

    Raises:
        IdReused: it was made by another request.
    """
    same = await tx.get(AttemptRow, wanted.attempt_id) if wanted.digest else None
    if same is not None and same.digest != wanted.digest:
        raise _reused(same)
    return same


async def _first_attempt(tx: Transaction, rollout: RolloutRow) -> AttemptRow:
    """The attempt that was made together with its rollout."""
    of_rollout = Filter("rollout_id", "equals", rollout.rollout_id)
    page = await tx.page(PageQuery("attempts", (of_rollout,), sort_by="sequence_id", limit=1))
    return page.rows[0]


async def claimed_before(tx: Transaction, wanted: ClaimRequest) -> list[Pair] | None:
    """What an earlier claim under the same id still has; None if there was none."""
    if wanted.request_id is None:
        return None
    return await _held_by_request(tx, wanted.request_id, wanted.digest, wanted.confirm_seconds)


async def _held_by_request(
    tx: Transaction, request_id: str, digest: bytes, confirm_seconds: float
) -> list[Pair] | None:
    """What is left of the attempts that a claim got before; None if it is a new one."""
    made = await tx.attempts_of_request(request_id)
    if not made:
        return None
    if made[0].digest != digest:
        raise IdReused(
            f"request {request_id!r} claimed before, for worker {made[0].worker_id!r} or with another limit; "
            "a new claim needs a new request_id"
        )
    held: list[Pair] = []
    for attempt in made:
        before = Pair(await load_rollout(tx, attempt.rollout_id), attempt)
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
