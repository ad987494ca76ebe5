"""What callers may change about a rollout directly."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from msgspec.structs import replace

from agentlightning.errors import IllegalMove
from agentlightning.lifecycle import attempts, reasons, rollouts
from agentlightning.lifecycle.deadlines import attempt_deadline
from agentlightning.lifecycle.records import Reason, RolloutPolicy
from agentlightning.lifecycle.rollouts import Change
from agentlightning.lifecycle.states import FINAL, LIVE, ROLLOUT_MOVES
from agentlightning.types import RolloutStatus
from rows import NOW, STANDS, changes, pair_of, policies, standing_rollout

WHY = Reason("wanted", "somebody wanted it")
ROLLOUT_STATES: tuple[RolloutStatus, ...] = get_args(RolloutStatus)
CODES = {"succeeded": reasons.COMPLETED, "failed": reasons.REPORTED, "cancelled": reasons.CANCELLED}


def change_of(rollout_status: str, attempt_status: str | None) -> Change:
    """A rollout as it stands."""
    if attempt_status is None:
        return Change(standing_rollout(rollout_status), None)
    return Change(*pair_of(rollout_status, attempt_status))


class TestSetStatus:
    @pytest.mark.parametrize("stands", STANDS)
    def test_the_status_that_it_has_is_a_repeat(self, stands: tuple[str, str | None]) -> None:
        before = change_of(*stands)
        assert rollouts.set_status(before, before.rollout.status, WHY, NOW) is before

    @pytest.mark.parametrize("stands", STANDS)
    @pytest.mark.parametrize("to", ROLLOUT_STATES)
    def test_other_moves_are_those_of_the_table_that_callers_can_make(
        self, stands: tuple[str, str | None], to: RolloutStatus
    ) -> None:
        before = change_of(*stands)
        status, held = before.rollout.status, stands[1] in LIVE
        possible = to in ROLLOUT_MOVES[status] and to != "preparing" and (held or to != "running")
        if possible or to == status:
            assert rollouts.set_status(before, to, WHY, NOW).rollout.status == to
        else:
            with pytest.raises(IllegalMove, match=f"rollout 'ro-1' is {status}"):
                rollouts.set_status(before, to, WHY, NOW)

    @pytest.mark.parametrize("stands", [stands for stands in STANDS if stands[0] not in FINAL])
    @pytest.mark.parametrize("to", sorted(FINAL))
    @pytest.mark.parametrize("reason", [WHY, None])
    def test_a_live_attempt_ends_with_its_rollout(
        self, stands: tuple[str, str | None], to: Any, reason: Reason | None
    ) -> None:
        before = change_of(*stands)
        after = rollouts.set_status(before, to, reason, NOW)
        code = CODES[to] if reason is None else "wanted"
        assert (after.rollout.end_time, after.rollout.reason_code) == (NOW.wall, code)
        assert after.rollout.reason_message
        if before.attempt is None or not before.attempt.live:
            assert after.attempt is before.attempt
        else:
            assert after.attempt is not None
            ended = "succeeded" if to == "succeeded" else "failed"
            assert (after.attempt.status, after.attempt.reason_code) == (ended, code)
            assert (after.attempt.end_time, after.attempt.deadline) == (NOW.wall, None)

    @pytest.mark.parametrize("status", sorted(LIVE))
    @pytest.mark.parametrize("reason", [WHY, None])
    def test_back_into_the_queue(self, status: Any, reason: Reason | None) -> None:
        before = change_of(status, status)
        after = rollouts.set_status(before, "requeuing", reason, NOW)
        assert after.rollout == replace(before.rollout, status="requeuing")
        assert after.attempt is not None
        code = reasons.REQUEUED if reason is None else "wanted"
        assert (after.attempt.status, after.attempt.reason_code) == ("failed", code)

    def test_running_starts_the_attempt(self) -> None:
        before = pair_of("preparing", "preparing", confirm_seconds=10.0)
        assert rollouts.set_status(Change(*before), "running", None, NOW) == attempts.run(before, NOW)

    @pytest.mark.parametrize(
        ("stands", "to", "text"),
        [
            (("queuing", None), "preparing", "by a claim or by start_attempt, not by update_rollout"),
            (("requeuing", "unresponsive"), "running", "nobody works on it; it becomes running through an attempt"),
            (("queuing", None), "requeuing", "from queuing it can become"),
            (("cancelled", "failed"), "succeeded", "nothing else: it has ended"),
        ],
    )
    def test_a_refusal_says_why(self, stands: tuple[str, str | None], to: Any, text: str) -> None:
        with pytest.raises(IllegalMove, match=text):
            rollouts.set_status(change_of(*stands), to, None, NOW)

    def test_a_held_rollout_without_its_attempt_is_refused(self) -> None:
        with pytest.raises(IllegalMove, match="nobody works on it"):
            rollouts.set_status(Change(standing_rollout("preparing"), None), "running", None, NOW)


class TestCancel:
    @pytest.mark.parametrize("stands", STANDS)
    def test_ends_what_has_not_ended(self, stands: tuple[str, str | None]) -> None:
        before = change_of(*stands)
        if before.rollout.status == "cancelled":
            assert rollouts.cancel(before, "not needed", NOW) is before
        elif before.rollout.final:
            with pytest.raises(IllegalMove):
                rollouts.cancel(before, "not needed", NOW)
        else:
            after = rollouts.cancel(before, "not needed", NOW)
            told = after.rollout.status, after.rollout.reason_code, after.rollout.reason_message
            assert told == ("cancelled", reasons.CANCELLED, "not needed")

    def test_a_live_attempt_fails_because_it_was_cancelled(self) -> None:
        attempt = rollouts.cancel(change_of("running", "running"), "not needed", NOW).attempt
        assert attempt is not None
        assert (attempt.status, attempt.reason_code) == ("failed", reasons.CANCELLED)


class TestPolicy:
    @given(changes(), policies())
    def test_another_one_rules_a_live_attempt_from_now_on(self, before: Change, policy: RolloutPolicy) -> None:
        after = rollouts.set_policy(before, policy)
        assert after.rollout == replace(before.rollout, policy=policy)
        if before.attempt is None or not before.attempt.live:
            assert after.attempt is before.attempt
        else:
            assert after.attempt == replace(before.attempt, deadline=attempt_deadline(policy, before.attempt))


class TestEditable:
    @pytest.mark.parametrize("status", ROLLOUT_STATES)
    def test_until_the_end(self, status: RolloutStatus) -> None:
        rollout = standing_rollout(status)
        if status not in FINAL:
            rollouts.check_editable(rollout, "input")
            return
        with pytest.raises(IllegalMove, match=f"is {status}; its input is what it ran with"):
            rollouts.check_editable(rollout, "input")
