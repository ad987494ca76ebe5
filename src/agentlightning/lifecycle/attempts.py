"""What happens to an attempt and, through it, to its rollout.

Every function takes the records as they are and returns them as they shall be. A record
that need not be written comes back as the very same object.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

from msgspec.structs import replace

from agentlightning.errors import IllegalMove, StaleAttempt
from agentlightning.lifecycle import reasons
from agentlightning.lifecycle.deadlines import attempt_deadline, attempt_due
from agentlightning.lifecycle.records import AttemptRow, Claim, Holder, Moment, Pair, Reason, RolloutRow
from agentlightning.lifecycle.states import (
    ENDED,
    check_attempt_move,
    check_rollout_move,
)
from agentlightning.types import AttemptEnd, AttemptStatus, RolloutStatus

POISON_SUSPECTS = 4
"""So many different workers that had a rollout, and never confirmed it, are no accident: it is poison. One that has
vanished is no proof against the rollout, because it may have vanished before the rollout was handed to it."""
MAX_REDELIVERIES = 20
"""How often a rollout is handed out again at most because it was not confirmed, whatever is known of the workers."""


class Started(NamedTuple):
    """What starting an attempt writes."""

    rollout: RolloutRow
    attempt: AttemptRow
    replaced: AttemptRow | None
    """The live attempt that had to make way, as it ended."""


def start(rollout: RolloutRow, holder: AttemptRow | None, claim: Claim, now: Moment) -> Started:
    """Make the next attempt of a rollout; a live ``holder`` (its latest attempt) is superseded.

    Raises:
        IllegalMove: the rollout has ended.
    """
    check_rollout_move(rollout.rollout_id, rollout.status, "preparing")
    replaced = None
    if holder is not None and holder.live:
        message = f"replaced by attempt {claim.attempt_id!r}, which was started explicitly"
        replaced = ended(holder, "failed", Reason(reasons.SUPERSEDED, message), now)
    attempt = AttemptRow(
        seq=0,
        version=1,
        rollout_id=rollout.rollout_id,
        attempt_id=claim.attempt_id,
        sequence_id=rollout.attempts + 1,
        status="preparing",
        start_time=now.wall,
        end_time=None,
        worker_id=claim.worker_id,
        last_heartbeat_time=None,
        metadata=None,
        reason_code=None,
        reason_message=None,
        request_id=claim.request_id,
        confirm_seconds=claim.confirm_seconds,
        started_lease=now.lease,
        beaten_lease=now.lease,
        deadline=None,
        span_sequence=0,
        digest=claim.digest,
    )
    deadline = attempt_deadline(rollout.policy, attempt)
    if deadline is not None:
        attempt = replace(attempt, deadline=deadline)
    taken = replace(rollout, status="preparing", attempts=attempt.sequence_id, latest_attempt_id=attempt.attempt_id)
    return Started(taken, attempt, replaced)


def standing(pair: Pair) -> Literal["live", "revivable", "stale"]:
    """Whether an attempt holds its rollout, may take it up again, or has lost it for good.

    An attempt that fell silent is revivable only while its rollout waits in the queue and
    no newer attempt was made. One that ran out of time is not: it would expire again at once. One that was
    released is not: its worker has given it up, and a heartbeat that was sent earlier must not take it back.
    """
    rollout, attempt = pair
    if attempt.live:
        return "live"
    waiting = rollout.status == "requeuing" and rollout.latest_attempt_id == attempt.attempt_id
    silent = attempt.status == "unresponsive" and attempt.reason_code != reasons.RELEASED
    return "revivable" if waiting and silent else "stale"


def stale(pair: Pair) -> StaleAttempt:
    """The error for an attempt that has lost its rollout; says how it was lost."""
    rollout, attempt = pair
    why = f" ({attempt.reason_code}: {attempt.reason_message})" if attempt.reason_code else ""
    newer = rollout.latest_attempt_id
    successor = f"; attempt {newer!r} took over" if newer != attempt.attempt_id else ""
    return StaleAttempt(
        f"attempt {attempt.attempt_id!r} of rollout {rollout.rollout_id!r} is {attempt.status}{why}{successor}, "
        f"and its rollout is {rollout.status}; stop working on it"
    )


def steady(attempt: AttemptRow) -> bool:
    """Whether a sign of life changes nothing but the clock: no need to look at the rollout."""
    return attempt.status == "running" and attempt.confirm_seconds is None


def touch(attempt: AttemptRow, now: Moment, span_sequence: int | None = None) -> AttemptRow:
    """A sign of life of an attempt that is ``steady``; with the last sequence id, if it came with spans."""
    if span_sequence is None:
        span_sequence = attempt.span_sequence
    return replace(attempt, last_heartbeat_time=now.wall, beaten_lease=now.lease, span_sequence=span_sequence)


def only_heard(before: AttemptRow, after: AttemptRow) -> bool:
    """Whether a live attempt gave a sign of life, and nothing else about it changed.

    Such a change need not be durable: every lease gets a full new term when the store is opened, and the last
    sequence id is recovered from the spans then.
    """
    return after.live and after == replace(
        before,
        last_heartbeat_time=after.last_heartbeat_time,
        beaten_lease=after.beaten_lease,
        span_sequence=after.span_sequence,
    )


def beat(pair: Pair, now: Moment) -> Pair:
    """A sign of life: renews the lease, confirms the claim, revives. A stale attempt stays as it is."""
    match standing(pair):
        case "live":
            return _confirmed(pair, touch(pair.attempt, now))
        case "revivable":
            return _revived(pair, now)
        case _:  # stale
            return pair


def reclaim(pair: Pair, confirm_seconds: float, now: Moment) -> Pair:
    """Give a revivable attempt to the repeat of its claim. That reply may be lost, too, so it must be confirmed."""
    rollout, attempt = _revived(pair, now)
    attempt = replace(attempt, confirm_seconds=confirm_seconds)
    return Pair(rollout, replace(attempt, deadline=attempt_deadline(rollout.policy, attempt)))


def run(pair: Pair, now: Moment) -> Pair:
    """A sign that the work has begun (a span): a beat, and ``preparing`` becomes ``running``."""
    rollout, attempt = beat(pair, now)
    if attempt.status != "preparing":
        return Pair(rollout, attempt)
    check_rollout_move(rollout.rollout_id, rollout.status, "running")
    return Pair(replace(rollout, status="running"), replace(attempt, status="running"))


def report(pair: Pair, status: AttemptStatus, reason: Reason | None, now: Moment, retry: bool | None = None) -> Pair:
    """A worker says where its attempt stands, and whether to retry what failed; see ``end``.

    A repeat of the status that an ended attempt already has changes nothing.

    Raises:
        StaleAttempt: the attempt has lost its rollout.
        IllegalMove: a running attempt cannot be ``preparing`` again.
    """
    if not pair.attempt.live and pair.attempt.status == status:
        return pair
    if standing(pair) == "stale":
        raise stale(pair)
    if status == "running":
        return run(pair, now)
    pair = beat(pair, now)
    if status in ENDED:
        return end(pair, cast(AttemptEnd, status), reason or _reported(status), now, retry)
    if pair.attempt.status != status:
        check_attempt_move(pair.attempt.attempt_id, pair.attempt.status, status)
    return pair


def end(pair: Pair, status: AttemptEnd, reason: Reason, now: Moment, retry: bool | None = None) -> Pair:
    """End a live attempt; its rollout succeeds, goes back to the queue if its policy says so, or fails.

    Args:
        pair, status, reason, now: what has ended, how, why, and when.
        retry: goes before the states that the policy retries; the policy's number of attempts stays the limit.
    """
    rollout = pair.rollout
    attempt = ended(pair.attempt, status, reason, now)
    policy = rollout.policy
    if status == "succeeded":
        return Pair(close(rollout, "succeeded", reason, now), attempt)
    counted = rollout.counted_attempts
    wanted = status in policy.retry_condition if retry is None else retry
    if wanted and counted < policy.max_attempts:
        return Pair(_requeued(rollout), attempt)
    last = f"attempt {counted} of {policy.max_attempts} ended {status}: {reason.message}"
    return Pair(close(rollout, "failed", Reason(reason.code, last), now), attempt)


def lose(pair: Pair, reason: Reason, holder: Holder, now: Moment) -> Pair:
    """End a live attempt whose worker is gone.

    Where it is known what that was at work on, it has given back all else, which does not count. Where it is not, one
    that was never confirmed is handed out again, which has a limit of its own.
    """
    if holder.at_work is not None and pair.attempt.attempt_id not in holder.at_work:
        return _given_back(pair, "its worker died while it was not at work on this", now)
    if holder.at_work is None and pair.attempt.confirm_seconds is not None:
        return _redelivered(pair, holder, now, reason.message)
    return end(pair, "unresponsive", reason, now)


def release(pair: Pair, now: Moment) -> Pair:
    """Give back a claim whose work has not begun: the rollout waits again, and the attempt does not count.

    A repeat changes nothing.

    Raises:
        StaleAttempt: the attempt has lost its rollout otherwise.
        IllegalMove: its work has begun.
    """
    rollout, attempt = pair
    if attempt.reason_code == reasons.RELEASED:
        return pair
    if not attempt.live:
        raise stale(pair)
    if attempt.status != "preparing":
        raise IllegalMove(
            f"attempt {attempt.attempt_id!r} of rollout {rollout.rollout_id!r} is {attempt.status}: its work has "
            "begun and it cannot be released; report how it ended instead"
        )
    return _given_back(pair, "given back by its worker before the work began", now)


def abandon(pair: Pair, now: Moment) -> Pair:
    """Give back a claim whose caller left before it heard of it. One that has been heard of stays as it is."""
    unheard = pair.attempt.status == "preparing" and pair.attempt.last_heartbeat_time is None
    return release(pair, now) if unheard else pair


def expire(pair: Pair, holder: Holder, now: Moment) -> Pair:
    """Look at a live attempt whose ``deadline`` has passed: end it, or set the true deadline.

    ``holder`` decides only whether one that was never confirmed is a proof against its rollout.
    """
    rollout, attempt = pair
    due = attempt_due(rollout.policy, attempt)
    if due is None or due.at > now.lease:
        return Pair(rollout, replace(attempt, deadline=None if due is None else due.at))
    match due.cause:
        case "unconfirmed":
            return _redelivered(pair, holder, now, "its worker never confirmed that it had received it")
        case "unresponsive":
            message = f"no sign of life for {rollout.policy.unresponsive_seconds:g} s"
            return end(pair, "unresponsive", Reason(reasons.UNRESPONSIVE, message), now)
        case _:  # timeout
            message = f"not finished within {rollout.policy.timeout_seconds:g} s"
            return end(pair, "timeout", Reason(reasons.TIMEOUT, message), now)


def close(rollout: RolloutRow, status: RolloutStatus, reason: Reason, now: Moment) -> RolloutRow:
    """Bring a rollout to a terminal state.

    Raises:
        IllegalMove: it has reached one already.
    """
    check_rollout_move(rollout.rollout_id, rollout.status, status)
    return replace(rollout, status=status, end_time=now.wall, reason_code=reason.code, reason_message=reason.message)


def _reported(status: AttemptStatus) -> Reason:
    if status == "succeeded":
        return Reason(reasons.COMPLETED, "reported as succeeded")
    return Reason(reasons.REPORTED, f"reported as {status}, without a reason")


def ended(attempt: AttemptRow, status: AttemptEnd, reason: Reason, now: Moment) -> AttemptRow:
    """The attempt with its end, without the leases that it had.

    Raises:
        IllegalMove: the table has no such move.
    """
    check_attempt_move(attempt.attempt_id, attempt.status, status)
    return replace(
        attempt,
        status=status,
        end_time=now.wall,
        reason_code=reason.code,
        reason_message=reason.message,
        confirm_seconds=None,
        deadline=None,
    )


def _requeued(rollout: RolloutRow) -> RolloutRow:
    check_rollout_move(rollout.rollout_id, rollout.status, "requeuing")
    return replace(rollout, status="requeuing")


def _given_back(pair: Pair, message: str, now: Moment) -> Pair:
    rollout, attempt = pair
    attempt = ended(attempt, "unresponsive", Reason(reasons.RELEASED, message), now)
    return Pair(replace(_requeued(rollout), releases=rollout.releases + 1), attempt)


def _redelivered(pair: Pair, holder: Holder, now: Moment, message: str) -> Pair:
    suspects = _suspects(pair, holder)
    rollout = replace(pair.rollout, suspects=" ".join(suspects))
    attempt = ended(pair.attempt, "unresponsive", Reason(reasons.UNCONFIRMED, message), now)
    if len(suspects) < POISON_SUSPECTS and rollout.redeliveries < MAX_REDELIVERIES:
        return Pair(replace(_requeued(rollout), redeliveries=rollout.redeliveries + 1), attempt)
    message = f"handed out {rollout.redeliveries + 1} times without being confirmed once"
    if suspects:
        message += f"; workers that were there and had it: {', '.join(suspects)}"
    return Pair(close(rollout, "failed", Reason(reasons.POISON, message), now), attempt)


def _suspects(pair: Pair, holder: Holder) -> list[str]:
    """The workers that are a proof against the rollout, now that this attempt ends unconfirmed."""
    rollout, attempt = pair
    known, worker_id = rollout.suspects.split(), attempt.worker_id
    had_it = holder.last_heard > attempt.beaten_lease and worker_id not in known
    return [*known, worker_id] if worker_id is not None and (holder.died or had_it) else known


def _confirmed(pair: Pair, attempt: AttemptRow) -> Pair:
    if attempt.confirm_seconds is None:
        return Pair(pair.rollout, attempt)
    attempt = replace(attempt, confirm_seconds=None)
    return Pair(pair.rollout, replace(attempt, deadline=attempt_deadline(pair.rollout.policy, attempt)))


def _revived(pair: Pair, now: Moment) -> Pair:
    rollout, attempt = pair
    check_attempt_move(attempt.attempt_id, attempt.status, "running")
    check_rollout_move(rollout.rollout_id, rollout.status, "running")
    redeliveries = rollout.redeliveries - (attempt.reason_code == reasons.UNCONFIRMED)
    suspects = " ".join(each for each in rollout.suspects.split() if each != attempt.worker_id)
    attempt = replace(touch(attempt, now), status="running", end_time=None, reason_code=None, reason_message=None)
    attempt = replace(attempt, deadline=attempt_deadline(rollout.policy, attempt))
    return Pair(replace(rollout, status="running", redeliveries=redeliveries, suspects=suspects), attempt)
