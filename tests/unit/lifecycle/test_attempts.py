"""What happens to an attempt and, through it, to its rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from agentlightning.errors import IllegalMove, StaleAttempt
from agentlightning.lifecycle import attempts, reasons
from agentlightning.lifecycle.attempts import MAX_REDELIVERIES
from agentlightning.lifecycle.records import Claim, Holder, Pair, Reason, RolloutPolicy
from agentlightning.lifecycle.states import ENDED, FINAL, LIVE
from agentlightning.types import AttemptEnd, AttemptStatus
from rows import NOW, STANDS, an_attempt, pair_of, standing_rollout

WHY = Reason("broken", "it broke")
ENDS: tuple[AttemptEnd, ...] = get_args(AttemptEnd)
ATTEMPT_STATES: tuple[AttemptStatus, ...] = get_args(AttemptStatus)
WITH_ATTEMPT = [stands for stands in STANDS if stands[1] is not None]
STALE = [stands for stands in WITH_ATTEMPT if stands[1] in ENDED and stands != ("requeuing", "unresponsive")]
SILENT = RolloutPolicy(unresponsive_seconds=20.0, max_attempts=3, retry_condition=("unresponsive",))


def handed_out(redeliveries: int, *, worker_id: str | None = "w-1", suspects: str = "") -> Pair:
    """A rollout that nobody confirmed so often, and that is handed out once more."""
    policy = RolloutPolicy(max_attempts=1)
    rollout, attempt = pair_of("preparing", "preparing", policy, confirm_seconds=10.0, worker_id=worker_id)
    return Pair(replace(rollout, attempts=redeliveries + 1, redeliveries=redeliveries, suspects=suspects), attempt)


ENDS_UNCONFIRMED: list[Callable[[Pair, Holder], Pair]] = [
    lambda pair, holder: attempts.expire(pair, holder, NOW),
    lambda pair, holder: attempts.lose(pair, WHY, holder, NOW),
]
"""How an attempt that was not confirmed ends."""


def ended_rollout(pair: Pair) -> tuple[str, float | None, str | None]:
    """How a rollout ended, if it did."""
    return pair.rollout.status, pair.rollout.end_time, pair.rollout.reason_code


class TestStart:
    @pytest.mark.parametrize("status", ["queuing", "requeuing"])
    def test_from_the_queue(self, status: Any) -> None:
        rollout = standing_rollout(status, attempts=2, redeliveries=1, latest_attempt_id="at-2")
        started = attempts.start(rollout, None, Claim("at-3", "w-1", "request-1", 10.0, b"digest"), NOW)
        assert started.rollout == replace(rollout, status="preparing", attempts=3, latest_attempt_id="at-3")
        assert started.replaced is None
        assert started.attempt == an_attempt(
            "preparing",
            seq=0,
            attempt_id="at-3",
            sequence_id=3,
            start_time=NOW.wall,
            worker_id="w-1",
            request_id="request-1",
            confirm_seconds=10.0,
            started_lease=NOW.lease,
            beaten_lease=NOW.lease,
            deadline=NOW.lease + 10.0,
            digest=b"digest",
        )

    @pytest.mark.parametrize(
        ("policy", "confirm_seconds", "deadline"),
        [
            (RolloutPolicy(), None, None),
            (RolloutPolicy(unresponsive_seconds=20.0), None, 1_020.0),
            (RolloutPolicy(unresponsive_seconds=20.0), 10.0, 1_010.0),
            (RolloutPolicy(unresponsive_seconds=20.0, timeout_seconds=5.0), 10.0, 1_005.0),
        ],
    )
    def test_the_deadline_is_known_from_the_start(
        self, policy: RolloutPolicy, confirm_seconds: float | None, deadline: float | None
    ) -> None:
        claim = Claim("at-1", confirm_seconds=confirm_seconds)
        assert attempts.start(standing_rollout(policy=policy), None, claim, NOW).attempt.deadline == deadline

    @pytest.mark.parametrize("status", sorted(LIVE))
    def test_a_live_attempt_makes_way(self, status: Any) -> None:
        pair = pair_of(status, status, confirm_seconds=10.0)
        started = attempts.start(*pair, Claim("at-2"), NOW)
        assert (started.rollout.status, started.rollout.attempts) == ("preparing", 2)
        assert (started.attempt.status, started.attempt.sequence_id) == ("preparing", 2)
        replaced = started.replaced
        assert replaced is not None
        assert (replaced.status, replaced.reason_code, replaced.end_time) == ("failed", reasons.SUPERSEDED, NOW.wall)
        assert (replaced.deadline, replaced.confirm_seconds) == (None, None)
        assert "'at-2'" in str(replaced.reason_message)

    def test_an_attempt_that_has_ended_stays_as_it_is(self) -> None:
        assert attempts.start(*pair_of("requeuing", "unresponsive"), Claim("at-2"), NOW).replaced is None

    @pytest.mark.parametrize("status", sorted(FINAL))
    def test_not_after_the_end(self, status: Any) -> None:
        with pytest.raises(IllegalMove, match=f"'ro-1' is {status} and cannot become preparing"):
            attempts.start(standing_rollout(status), None, Claim("at-2"), NOW)


class TestStanding:
    @pytest.mark.parametrize(("rollout_status", "attempt_status"), WITH_ATTEMPT)
    def test_of_the_latest_attempt(self, rollout_status: str, attempt_status: str) -> None:
        expected = "stale"
        if attempt_status in LIVE:
            expected = "live"
        elif (rollout_status, attempt_status) == ("requeuing", "unresponsive"):
            expected = "revivable"
        assert attempts.standing(pair_of(rollout_status, attempt_status)) == expected

    @pytest.mark.parametrize("rollout_status", ["preparing", "running", "requeuing"])
    def test_an_attempt_with_a_successor_has_lost(self, rollout_status: str) -> None:
        rollout, attempt = pair_of(rollout_status, "unresponsive")
        rollout = replace(rollout, attempts=2, latest_attempt_id="at-2")
        assert attempts.standing(Pair(rollout, attempt)) == "stale"

    @pytest.mark.parametrize("attempt_status", sorted(ENDED))
    @pytest.mark.parametrize("successor", [None, "at-2"])
    def test_the_error_says_how_it_was_lost(self, attempt_status: str, successor: str | None) -> None:
        rollout, attempt = pair_of("running", attempt_status)
        error = attempts.stale(Pair(replace(rollout, latest_attempt_id=successor or "at-1"), attempt))
        assert isinstance(error, StaleAttempt)
        after = f"; attempt {successor!r} took over" if successor else ""
        assert error.message == (
            f"attempt 'at-1' of rollout 'ro-1' is {attempt_status} (before: it ended before){after}, "
            "and its rollout is running; stop working on it"
        )

    def test_the_error_does_without_a_reason(self) -> None:
        rollout, attempt = pair_of("cancelled", "failed", reason_code=None)
        assert "is failed, and its rollout is cancelled" in attempts.stale(Pair(rollout, attempt)).message


class TestSignsOfLife:
    def test_of_a_running_attempt_change_nothing_but_the_clock(self) -> None:
        pair = pair_of("running", "running", SILENT)
        assert attempts.steady(pair.attempt)
        after = attempts.beat(pair, NOW)
        assert after.rollout is pair.rollout
        assert after.attempt == replace(pair.attempt, last_heartbeat_time=NOW.wall, beaten_lease=NOW.lease)
        assert after.attempt == attempts.touch(pair.attempt, NOW)
        assert after.attempt.deadline == 920.0  # writing an index each time would be dear; it is looked at again then

    @pytest.mark.parametrize("status", sorted(LIVE))
    def test_confirm_a_claim(self, status: Any) -> None:
        pair = pair_of(status, status, SILENT, confirm_seconds=10.0)
        assert not attempts.steady(pair.attempt)
        after = attempts.beat(pair, NOW)
        assert after.rollout is pair.rollout
        assert (after.attempt.status, after.attempt.confirm_seconds) == (status, None)
        assert after.attempt.deadline == NOW.lease + 20.0

    def test_of_a_preparing_attempt_are_not_steady(self) -> None:
        assert not attempts.steady(an_attempt("preparing"))

    def test_need_not_be_durable_unless_something_else_came_with_them(self) -> None:
        before = an_attempt(span_sequence=3)
        for spans in (None, 7):
            after = attempts.touch(before, NOW, spans)
            assert after.span_sequence == (spans or 3)
            assert attempts.only_heard(before, after)
            assert not attempts.only_heard(before, attempts.replace(after, reason_code="x"))
        assert not attempts.only_heard(before, attempts.ended(before, "failed", WHY, NOW))

    def test_bring_back_an_attempt_that_fell_silent(self) -> None:
        pair = pair_of("requeuing", "unresponsive", SILENT)
        after = attempts.beat(pair, NOW)
        assert after.rollout == replace(pair.rollout, status="running")
        assert after.attempt == replace(
            pair.attempt,
            status="running",
            end_time=None,
            reason_code=None,
            reason_message=None,
            last_heartbeat_time=NOW.wall,
            beaten_lease=NOW.lease,
            deadline=NOW.lease + 20.0,
        )

    @pytest.mark.parametrize(("code", "redeliveries"), [(reasons.UNCONFIRMED, 1), (reasons.UNRESPONSIVE, 2)])
    def test_one_that_comes_back_was_confirmed_after_all(self, code: str, redeliveries: int) -> None:
        rollout, attempt = pair_of("requeuing", "unresponsive", reason_code=code)
        rollout = replace(rollout, attempts=3, redeliveries=2)
        assert attempts.beat(Pair(rollout, attempt), NOW).rollout.redeliveries == redeliveries

    @pytest.mark.parametrize(("rollout_status", "attempt_status"), STALE)
    @pytest.mark.parametrize("function", [attempts.beat, attempts.run])
    def test_of_a_stale_attempt_change_nothing(self, function: Any, rollout_status: str, attempt_status: str) -> None:
        pair = pair_of(rollout_status, attempt_status)
        after = function(pair, NOW)
        assert after.rollout is pair.rollout
        assert after.attempt is pair.attempt

    @pytest.mark.parametrize("confirm_seconds", [None, 10.0])
    def test_work_begins(self, confirm_seconds: float | None) -> None:
        after = attempts.run(pair_of("preparing", "preparing", confirm_seconds=confirm_seconds), NOW)
        assert (after.rollout.status, after.attempt.status) == ("running", "running")
        assert attempts.steady(after.attempt)

    def test_work_goes_on(self) -> None:
        pair = pair_of("running", "running")
        assert attempts.run(pair, NOW) == attempts.beat(pair, NOW)

    def test_work_goes_on_where_it_stopped(self) -> None:
        pair = pair_of("requeuing", "unresponsive")
        assert attempts.run(pair, NOW) == attempts.beat(pair, NOW)

    @pytest.mark.parametrize(
        ("policy", "deadline"),
        [(RolloutPolicy(), 1_010.0), (RolloutPolicy(timeout_seconds=105.0), 1_005.0), (SILENT, 1_010.0)],
    )
    def test_a_repeated_claim_brings_back_its_attempt_but_must_be_confirmed(
        self, policy: RolloutPolicy, deadline: float
    ) -> None:
        after = attempts.reclaim(pair_of("requeuing", "unresponsive", policy), 10.0, NOW)
        assert (after.rollout.status, after.attempt.status) == ("running", "running")
        assert (after.attempt.confirm_seconds, after.attempt.deadline) == (10.0, deadline)
        silent = attempts.expire(after, Holder(), NOW._replace(lease=1_010.0)).attempt
        assert silent.reason_code in (reasons.UNCONFIRMED, reasons.TIMEOUT)


class TestReport:
    @pytest.mark.parametrize("status", sorted(ENDED))
    @pytest.mark.parametrize("rollout_status", ["requeuing", "failed", "running"])
    def test_a_repeat_of_the_end_changes_nothing(self, rollout_status: str, status: Any) -> None:
        pair = pair_of(rollout_status, status)
        assert attempts.report(pair, status, WHY, NOW) is pair

    @pytest.mark.parametrize(("rollout_status", "attempt_status"), STALE)
    @pytest.mark.parametrize("status", ATTEMPT_STATES)
    def test_of_a_stale_attempt_is_refused(self, rollout_status: str, attempt_status: str, status: Any) -> None:
        if status != attempt_status:
            with pytest.raises(StaleAttempt):
                attempts.report(pair_of(rollout_status, attempt_status), status, WHY, NOW)

    @pytest.mark.parametrize(("before", "same"), [("preparing", "preparing"), ("running", "running")])
    def test_the_status_that_it_has_is_a_sign_of_life(self, before: Any, same: Any) -> None:
        pair = pair_of(before, before, confirm_seconds=10.0)
        assert attempts.report(pair, same, None, NOW) == attempts.beat(pair, NOW)

    @pytest.mark.parametrize("stands", [("running", "running"), ("requeuing", "unresponsive")])
    def test_it_never_prepares_again(self, stands: tuple[str, str]) -> None:
        with pytest.raises(IllegalMove, match="'at-1' is running and cannot become preparing"):
            attempts.report(pair_of(*stands), "preparing", None, NOW)

    @pytest.mark.parametrize("before", ["preparing", "unresponsive"])
    def test_running(self, before: Any) -> None:
        pair = pair_of("requeuing" if before == "unresponsive" else before, before)
        assert attempts.report(pair, "running", None, NOW) == attempts.run(pair, NOW)

    @pytest.mark.parametrize("before", ["preparing", "running"])
    @pytest.mark.parametrize("status", ENDS)
    def test_the_end(self, before: Any, status: AttemptEnd) -> None:
        pair = pair_of(before, before, confirm_seconds=10.0)
        after = attempts.report(pair, status, WHY, NOW)
        assert after == attempts.end(attempts.beat(pair, NOW), status, WHY, NOW)
        assert (after.attempt.status, after.attempt.last_heartbeat_time) == (status, NOW.wall)

    @pytest.mark.parametrize("status", sorted(set(ENDS) - {"unresponsive"}))
    def test_one_that_fell_silent_may_still_say_how_it_ended(self, status: AttemptEnd) -> None:
        after = attempts.report(pair_of("requeuing", "unresponsive", SILENT), status, WHY, NOW)
        assert after.attempt.status == status
        assert ended_rollout(after) == ("succeeded" if status == "succeeded" else "failed", NOW.wall, "broken")

    @pytest.mark.parametrize("status", ENDS)
    def test_a_reason_is_given_where_none_was(self, status: AttemptEnd) -> None:
        attempt = attempts.report(pair_of("running", "running"), status, None, NOW).attempt
        code = reasons.COMPLETED if status == "succeeded" else reasons.REPORTED
        assert attempt.reason_code == code
        assert status in str(attempt.reason_message)


class TestEnd:
    @pytest.mark.parametrize(("listed", "wish", "then"), [(True, False, "failed"), (False, True, "requeuing")])
    def test_a_wish_goes_before_the_policy_but_not_beyond_its_limit(self, listed: bool, wish: bool, then: str) -> None:
        policy = RolloutPolicy(max_attempts=2, retry_condition=("failed",) if listed else ())
        after = attempts.report(pair_of("running", "running", policy), "failed", WHY, NOW, wish)
        assert after.rollout.status == then
        last = pair_of("running", "running", replace(policy, max_attempts=1))
        assert attempts.end(last, "failed", WHY, NOW, retry=True).rollout.status == "failed"

    @pytest.mark.parametrize("status", sorted(LIVE))
    @pytest.mark.parametrize("end", ENDS)
    def test_the_attempt(self, status: Any, end: AttemptEnd) -> None:
        before = an_attempt(status, confirm_seconds=10.0, deadline=910.0, span_sequence=7)
        assert attempts.ended(before, end, WHY, NOW) == replace(
            before,
            status=end,
            end_time=NOW.wall,
            reason_code="broken",
            reason_message="it broke",
            confirm_seconds=None,
            deadline=None,
        )

    @pytest.mark.parametrize("status", sorted(ENDED))
    @pytest.mark.parametrize("end", ENDS)
    def test_an_attempt_ends_once(self, status: Any, end: AttemptEnd) -> None:
        with pytest.raises(IllegalMove):
            attempts.ended(an_attempt(status), end, WHY, NOW)

    @pytest.mark.parametrize("retried", [(), ("succeeded", "failed", "timeout", "unresponsive")])
    def test_success_ends_the_rollout_whatever_the_policy(self, retried: Any) -> None:
        pair = pair_of("running", "running", RolloutPolicy(max_attempts=9, retry_condition=retried))
        after = attempts.end(pair, "succeeded", WHY, NOW)
        assert ended_rollout(after) == ("succeeded", NOW.wall, "broken")
        assert after.rollout.reason_message == "it broke"

    @pytest.mark.parametrize("end", ["failed", "timeout", "unresponsive"])
    @pytest.mark.parametrize("listed", [True, False])
    @pytest.mark.parametrize(
        ("made", "redelivered", "released", "allowed"),
        [
            (1, 0, 0, 1),
            (1, 0, 0, 2),
            (2, 0, 0, 2),
            (2, 1, 0, 2),
            (2, 0, 1, 2),
            (3, 1, 0, 2),
            (3, 1, 1, 2),
            (4, 3, 0, 1),
            (4, 3, 0, 2),
            (9, 0, 8, 1),
            (9, 0, 8, 2),
            (5, 0, 0, 9),
        ],
    )
    def test_a_rollout_is_retried_by_its_policy(
        self, end: Any, listed: bool, made: int, redelivered: int, released: int, allowed: int
    ) -> None:
        retries: set[AttemptStatus] = {"failed", "timeout", "unresponsive"}
        policy = RolloutPolicy(
            max_attempts=allowed, retry_condition=tuple(sorted({end} if listed else retries - {end}))
        )
        rollout, attempt = pair_of("running", "running", policy)
        rollout = replace(rollout, attempts=made, redeliveries=redelivered, releases=released)
        counted = made - redelivered - released
        after = attempts.end(Pair(rollout, attempt), end, WHY, NOW)
        assert after.attempt.status == end
        if listed and counted < allowed:
            assert after.rollout == replace(rollout, status="requeuing")
        else:
            assert ended_rollout(after) == ("failed", NOW.wall, "broken")
            text = f"attempt {counted} of {allowed} ended {end}: it broke"
            assert after.rollout.reason_message == text

    @pytest.mark.parametrize("status", sorted(FINAL))
    @pytest.mark.parametrize("to", sorted(FINAL))
    def test_a_rollout_is_closed_once(self, status: Any, to: Any) -> None:
        with pytest.raises(IllegalMove, match="it has ended"):
            attempts.close(standing_rollout(status), to, WHY, NOW)

    def test_a_rollout_is_not_closed_into_a_state_that_goes_on(self) -> None:
        with pytest.raises(IllegalMove):
            attempts.close(standing_rollout("queuing"), "running", WHY, NOW)


class TestLoss:
    def test_of_a_worker_that_had_confirmed_follows_the_policy(self) -> None:
        pair = pair_of("running", "running", SILENT)
        after = attempts.lose(pair, WHY, Holder(), NOW)
        assert after == attempts.end(pair, "unresponsive", WHY, NOW)
        assert after.rollout.status == "requeuing"

    @pytest.mark.parametrize("redelivered", range(MAX_REDELIVERIES))
    def test_of_one_that_had_not_uses_up_no_attempt(self, redelivered: int) -> None:
        rollout, attempt = handed_out(redelivered)
        after = attempts.lose(Pair(rollout, attempt), WHY, Holder(), NOW)
        assert after.rollout == replace(rollout, status="requeuing", redeliveries=redelivered + 1)
        assert (after.attempt.status, after.attempt.reason_code) == ("unresponsive", reasons.UNCONFIRMED)
        assert after.attempt.reason_message == "it broke"

    @pytest.mark.parametrize("confirm_seconds", [None, 10.0])
    @pytest.mark.parametrize("status", ["preparing", "running"])
    def test_what_it_was_at_work_on_is_known(self, status: Any, confirm_seconds: float | None) -> None:
        """That follows the policy, confirmed or not; everything else has used up nothing."""
        pair = pair_of(status, status, SILENT, confirm_seconds=confirm_seconds)
        after = attempts.lose(pair, WHY, Holder(died=True, at_work={pair.attempt.attempt_id}), NOW)
        assert after == attempts.end(pair, "unresponsive", WHY, NOW)
        after = attempts.lose(pair, WHY, Holder(died=True, at_work={"at-other"}), NOW)
        assert after.rollout == replace(pair.rollout, status="requeuing", releases=1)
        assert (after.attempt.status, after.attempt.reason_code) == ("unresponsive", reasons.RELEASED)
        assert attempts.standing(after) == "stale"


class TestPoison:
    """What was handed out and never confirmed: whether the rollout or the worker is to blame."""

    @pytest.mark.parametrize("end", ENDS_UNCONFIRMED)
    @pytest.mark.parametrize(
        ("worker_id", "before", "holder", "suspects"),
        [
            ("w-4", "w-1 w-2", Holder(), "w-1 w-2"),
            ("w-4", "w-1 w-2", Holder(last_heard=900.0), "w-1 w-2"),  # by the claim itself
            ("w-4", "w-1 w-2", Holder(last_heard=900.1), "w-1 w-2 w-4"),
            ("w-1", "w-1 w-2", Holder(last_heard=950.0), "w-1 w-2"),
            ("w-1", "w-1 w-2", Holder(died=True), "w-1 w-2 w-1"),
            (None, "w-1 w-2", Holder(), "w-1 w-2"),
        ],
    )
    def test_a_worker_is_a_proof_once_if_it_lived_on_and_whenever_it_died(
        self, end: Any, worker_id: str | None, before: str, holder: Holder, suspects: str
    ) -> None:
        after = end(handed_out(2, worker_id=worker_id, suspects=before), holder)
        assert (after.rollout.status, after.rollout.suspects) == ("requeuing", suspects)

    @pytest.mark.parametrize("end", ENDS_UNCONFIRMED)
    @pytest.mark.parametrize(
        ("suspects", "holder"), [("w-1 w-2 w-3", Holder(last_heard=950.0)), ("w-4 w-4 w-4", Holder(died=True))]
    )
    def test_the_fourth_suspect_proves_it(self, end: Any, suspects: str, holder: Holder) -> None:
        after = end(handed_out(3, worker_id="w-4", suspects=suspects), holder)
        assert ended_rollout(after) == ("failed", NOW.wall, reasons.POISON)
        assert after.rollout.reason_message == (
            "handed out 4 times without being confirmed once; workers that were there and had it: "
            + ", ".join([*suspects.split(), "w-4"])
        )
        assert (after.attempt.status, after.attempt.reason_code) == ("unresponsive", reasons.UNCONFIRMED)

    @pytest.mark.parametrize("end", ENDS_UNCONFIRMED)
    def test_so_does_the_number_alone_in_the_end(self, end: Any) -> None:
        after = end(handed_out(MAX_REDELIVERIES), Holder())
        assert ended_rollout(after) == ("failed", NOW.wall, reasons.POISON)
        assert after.rollout.reason_message == "handed out 21 times without being confirmed once"

    def test_a_worker_that_takes_it_up_after_all_is_no_proof(self) -> None:
        lost = attempts.expire(handed_out(2, worker_id="w-1", suspects="w-1 w-2 w-1"), Holder(), NOW)
        assert lost.rollout.suspects == "w-1 w-2 w-1"
        assert attempts.beat(lost, NOW).rollout.suspects == "w-2"


class TestRelease:
    @pytest.mark.parametrize("confirm_seconds", [None, 10.0])
    def test_the_rollout_waits_again_and_nothing_is_used_up(self, confirm_seconds: float | None) -> None:
        pair = pair_of("preparing", "preparing", RolloutPolicy(), confirm_seconds=confirm_seconds)
        after = attempts.release(pair, NOW)
        assert after.rollout == replace(pair.rollout, status="requeuing", releases=1)
        assert after.rollout.counted_attempts == 0
        assert after.attempt == replace(
            pair.attempt,
            status="unresponsive",
            end_time=NOW.wall,
            reason_code=reasons.RELEASED,
            reason_message="given back by its worker before the work began",
            confirm_seconds=None,
            deadline=None,
        )

    @pytest.mark.parametrize("successor", [False, True])
    def test_a_repeat_changes_nothing(self, successor: bool) -> None:
        pair = attempts.release(pair_of("preparing", "preparing"), NOW)
        if successor:
            pair = Pair(attempts.start(pair.rollout, None, Claim("at-2"), NOW).rollout, pair.attempt)
        assert attempts.release(pair, NOW) is pair

    def test_not_after_the_work_has_begun(self) -> None:
        with pytest.raises(IllegalMove, match="'at-1' of rollout 'ro-1' is running: its work has begun"):
            attempts.release(pair_of("running", "running"), NOW)

    @pytest.mark.parametrize(("rollout_status", "attempt_status"), [*STALE, ("requeuing", "unresponsive")])
    def test_not_of_one_that_was_lost_otherwise(self, rollout_status: str, attempt_status: str) -> None:
        with pytest.raises(StaleAttempt, match=f"'at-1' of rollout 'ro-1' is {attempt_status}"):
            attempts.release(pair_of(rollout_status, attempt_status), NOW)

    def test_what_its_caller_never_heard_of_is_given_back(self) -> None:
        pair = pair_of("preparing", "preparing", confirm_seconds=10.0)
        assert attempts.abandon(pair, NOW) == attempts.release(pair, NOW)

    @pytest.mark.parametrize("heard", [{"status": "running"}, {"status": "preparing", "last_heartbeat_time": 4_990.0}])
    def test_not_what_somebody_has(self, heard: dict[str, Any]) -> None:
        status = heard["status"]
        pair = Pair(standing_rollout(status, attempts=1, latest_attempt_id="at-1"), an_attempt(**heard))
        assert attempts.abandon(pair, NOW) is pair

    def test_not_what_was_given_back_already(self) -> None:
        released = attempts.release(pair_of("preparing", "preparing"), NOW)
        assert attempts.abandon(released, NOW) is released

    def test_one_that_was_released_is_not_revived(self) -> None:
        released = attempts.release(pair_of("preparing", "preparing"), NOW)
        assert attempts.standing(released) == "stale"
        assert attempts.beat(released, NOW) is released


class TestExpire:
    POLICY = RolloutPolicy(
        timeout_seconds=150.0, unresponsive_seconds=50.0, max_attempts=2, retry_condition=("timeout",)
    )

    def test_an_attempt_that_was_heard_since_gets_its_true_deadline(self) -> None:
        pair = pair_of("running", "running", self.POLICY, beaten_lease=980.0, deadline=950.0)
        after = attempts.expire(pair, Holder(), NOW)
        assert after.rollout is pair.rollout
        assert after.attempt == replace(pair.attempt, deadline=1_030.0)

    def test_an_attempt_that_nothing_ends_any_more_has_no_deadline(self) -> None:
        pair = pair_of("running", "running", RolloutPolicy(), deadline=950.0)
        assert attempts.expire(pair, Holder(), NOW) == Pair(pair.rollout, replace(pair.attempt, deadline=None))

    def test_the_moment_itself_is_late_enough(self) -> None:
        pair = pair_of("running", "running", RolloutPolicy(unresponsive_seconds=100.0))
        assert attempts.expire(pair, Holder(), NOW).attempt.status == "unresponsive"
        assert attempts.expire(pair, Holder(), NOW._replace(lease=NOW.lease - 0.001)).attempt.status == "running"

    def test_silence(self) -> None:
        after = attempts.expire(pair_of("running", "running", self.POLICY), Holder(), NOW)
        assert (after.attempt.status, after.attempt.reason_code) == ("unresponsive", reasons.UNRESPONSIVE)
        assert after.attempt.reason_message == "no sign of life for 50 s"
        assert ended_rollout(after) == ("failed", NOW.wall, reasons.UNRESPONSIVE)

    def test_time_out(self) -> None:
        pair = pair_of("running", "running", self.POLICY, beaten_lease=1_049.0)
        after = attempts.expire(pair, Holder(), NOW._replace(lease=1_050.0))
        assert (after.attempt.status, after.attempt.reason_code) == ("timeout", reasons.TIMEOUT)
        assert after.attempt.reason_message == "not finished within 150 s"
        assert after.rollout.status == "requeuing"

    @pytest.mark.parametrize("status", sorted(LIVE))
    def test_a_claim_that_nobody_confirmed(self, status: Any) -> None:
        pair = pair_of(status, status, self.POLICY, confirm_seconds=10.0)
        after = attempts.expire(pair, Holder(), NOW)
        lost = attempts.lose(pair, WHY, Holder(), NOW)
        assert lost.rollout == after.rollout
        assert lost.attempt == replace(after.attempt, reason_message=WHY.message)
        assert after.rollout.status == "requeuing"
