"""What callers may change about a rollout directly."""

from __future__ import annotations

from typing import Literal, NamedTuple

from msgspec.structs import replace

from agentlightning.errors import IllegalMove
from agentlightning.lifecycle import attempts, reasons
from agentlightning.lifecycle.deadlines import attempt_deadline
from agentlightning.lifecycle.records import AttemptRow, Moment, Pair, Reason, RolloutPolicy, RolloutRow
from agentlightning.lifecycle.states import FINAL, check_rollout_move
from agentlightning.types import AttemptEnd, RolloutStatus


class Change(NamedTuple):
    """A rollout and its latest attempt, if it has one."""

    rollout: RolloutRow
    attempt: AttemptRow | None


def set_status(before: Change, to: RolloutStatus, reason: Reason | None, now: Moment) -> Change:
    """Move a rollout because a caller says so; a live attempt follows it.

    The status it already has is a repeat and changes nothing. ``queuing`` and ``preparing``
    cannot be asked for: the first is only the beginning, the second is made by a claim.

    Raises:
        IllegalMove: the table has no such move, or the move needs an attempt that is not there.
    """
    rollout, attempt = before
    if rollout.status == to:
        return before
    if to == "preparing":
        raise IllegalMove(
            f"rollout {rollout.rollout_id!r} is {rollout.status}; it becomes preparing by a claim or by "
            "start_attempt, not by update_rollout"
        )
    check_rollout_move(rollout.rollout_id, rollout.status, to)
    if to == "running":
        return Change(*attempts.run(_held(rollout, attempt), now))
    if to in FINAL:
        given = reason or Reason(reasons.BY_STATUS.get(to, reasons.REPORTED), f"set to {to} by a caller")
        ended_as = "succeeded" if to == "succeeded" else "failed"
        return Change(attempts.close(rollout, to, given, now), _release(attempt, ended_as, given, now))
    given = reason or Reason(reasons.REQUEUED, "its rollout was put back into the queue by a caller")
    return Change(replace(rollout, status=to), _release(attempt, "failed", given, now))


def cancel(before: Change, message: str, now: Moment) -> Change:
    """End a rollout that nobody wants any more. Cancelling a cancelled one is a repeat.

    Raises:
        IllegalMove: it ended otherwise before.
    """
    return set_status(before, "cancelled", Reason(reasons.CANCELLED, message), now)


def set_policy(before: Change, policy: RolloutPolicy) -> Change:
    """Give a rollout another policy; it rules a live attempt from now on, too."""
    rollout = replace(before.rollout, policy=policy)
    attempt = before.attempt
    if attempt is not None and attempt.live:
        attempt = replace(attempt, deadline=attempt_deadline(policy, attempt))
    return Change(rollout, attempt)


def check_editable(rollout: RolloutRow, what: Literal["input", "mode", "resources_id", "config"]) -> None:
    """Raise ``IllegalMove`` if the rollout has ended: then only its metadata may still change."""
    if rollout.final:
        raise IllegalMove(
            f"rollout {rollout.rollout_id!r} is {rollout.status}; its {what} is what it ran with "
            "and cannot change any more"
        )


def _held(rollout: RolloutRow, attempt: AttemptRow | None) -> Pair:
    if attempt is None or not attempt.live:
        raise IllegalMove(
            f"rollout {rollout.rollout_id!r} is {rollout.status} and nobody works on it; "
            "it becomes running through an attempt: claim it, or call start_attempt"
        )
    return Pair(rollout, attempt)


def _release(attempt: AttemptRow | None, ended_as: AttemptEnd, reason: Reason, now: Moment) -> AttemptRow | None:
    if attempt is None or not attempt.live:
        return attempt
    return attempts.ended(attempt, ended_as, reason, now)
