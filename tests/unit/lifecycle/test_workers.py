"""What the store knows about a worker, and how that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from agentlightning.lifecycle import reasons, workers
from agentlightning.lifecycle.deadlines import worker_due
from agentlightning.lifecycle.records import Reason, WorkerRow
from agentlightning.types import AttemptStatus, WorkerStatus
from rows import NOW, a_worker, an_attempt, moments

GONE = Reason(reasons.WORKER_LOST, "gone")
HOLDING: dict[str, Any] = {"status": "busy", "current_rollout_id": "ro-1", "current_attempt_id": "at-1"}


def changed(before: WorkerRow, after: WorkerRow) -> dict[str, Any]:
    """The fields that are not as they were."""
    return {
        name: getattr(after, name) for name in before.__struct_fields__ if getattr(after, name) != getattr(before, name)
    }


@pytest.mark.parametrize("status", get_args(WorkerStatus))
def test_one_that_got_an_attempt_is_busy_with_it(status: WorkerStatus) -> None:
    before = a_worker(status=status, last_busy_time=1.0, last_dequeue_time=1.0)
    busy = {**HOLDING, "last_busy_time": NOW.wall}
    expected = {name: value for name, value in busy.items() if getattr(before, name) != value}
    assert changed(before, workers.holds(before, an_attempt(), NOW)) == expected
    taken = {**expected, "last_dequeue_time": NOW.wall}
    assert changed(before, workers.took(before, an_attempt(), NOW, waited=True)) == taken
    taken["heard_lease"] = NOW.lease
    assert changed(before, workers.took(before, an_attempt(), NOW, waited=False)) == taken


def test_one_that_got_nothing_is_idle_unless_it_still_holds_something() -> None:
    idle = {"status": "idle", "last_idle_time": NOW.wall}
    assert changed(a_worker(), workers.came_empty(a_worker(), NOW, waited=True)) == idle
    idle["heard_lease"] = NOW.lease
    assert changed(a_worker(), workers.came_empty(a_worker(), NOW, waited=False)) == idle
    holding = a_worker(**HOLDING)
    assert workers.came_empty(holding, NOW, waited=True) is holding
    assert changed(holding, workers.came_empty(holding, NOW, waited=False)) == {"heard_lease": NOW.lease}


@pytest.mark.parametrize(("since", "is_noted"), [(None, True), (0.0, False), (59.9, False), (60.0, True), (-1.0, True)])
def test_one_that_waits_for_work_is_noted_once_a_minute(since: float | None, is_noted: bool) -> None:
    """Also after the machine's clock was set back."""
    idle = a_worker(status="idle", last_idle_time=None if since is None else NOW.wall - since)
    after = workers.came_empty(idle, NOW, waited=True)
    assert changed(idle, after) == ({"last_idle_time": NOW.wall} if is_noted else {})


@pytest.mark.parametrize("waited", [False, True])
def test_a_claim_renews_the_lease(waited: bool) -> None:
    """Whatever it gets; the deadline is a lower bound still, and is moved only where there is none."""
    leased = a_worker(lease_seconds=20.0, beaten_lease=940.0, deadline=960.0)
    lost = workers.lose(leased, GONE)
    for after in (
        workers.took(leased, an_attempt(), NOW, waited=waited),
        workers.came_empty(leased, NOW, waited=waited),
    ):
        assert (after.beaten_lease, after.deadline) == (NOW.lease, 960.0)
    for after in (workers.took(lost, an_attempt(), NOW, waited=waited), workers.came_empty(lost, NOW, waited=waited)):
        assert (after.beaten_lease, after.deadline) == (NOW.lease, NOW.lease + 20.0)


@pytest.mark.parametrize("ended", get_args(AttemptStatus))
def test_one_whose_last_attempt_ended_is_idle_or_has_not_been_heard_of(ended: AttemptStatus) -> None:
    holding = a_worker(**HOLDING)
    released: dict[str, Any] = {"current_rollout_id": None, "current_attempt_id": None}
    if ended in ("timeout", "unresponsive"):
        released |= {"status": "unknown"}
    else:
        released |= {"status": "idle", "last_idle_time": NOW.wall}
    assert changed(holding, workers.released(holding, an_attempt(ended), None, NOW)) == released


def test_one_that_released_its_last_attempt_is_idle() -> None:
    holding = a_worker(**HOLDING)
    given_back = an_attempt("unresponsive", reason_code=reasons.RELEASED)
    after = workers.released(holding, given_back, None, NOW)
    assert (after.status, after.last_idle_time, after.current_attempt_id) == ("idle", NOW.wall, None)


@pytest.mark.parametrize("ended", get_args(AttemptStatus))
def test_one_that_holds_another_attempt_stays_busy_with_that(ended: AttemptStatus) -> None:
    other = an_attempt(rollout_id="ro-2", attempt_id="at-2")
    holding = a_worker(**HOLDING)
    after = workers.released(holding, an_attempt(ended), other, NOW)
    assert changed(holding, after) == {"current_rollout_id": "ro-2", "current_attempt_id": "at-2"}


class TestBeat:
    def test_the_first_one_makes_it_idle_without_a_lease(self) -> None:
        after = workers.beat(a_worker(), None, None, NOW)
        assert changed(a_worker(), after) == {
            "status": "idle",
            "last_idle_time": NOW.wall,
            "last_heartbeat_time": NOW.wall,
            "beaten_lease": NOW.lease,
            "heard_lease": NOW.lease,
        }

    def test_one_that_holds_an_attempt_and_was_given_up_is_busy_again(self) -> None:
        after = workers.beat(a_worker(**HOLDING | {"status": "unknown"}), None, None, NOW)
        assert (after.status, after.last_idle_time) == ("busy", None)

    @pytest.mark.parametrize("status", ["idle", "busy"])
    def test_otherwise_its_status_stays(self, status: WorkerStatus) -> None:
        after = workers.beat(a_worker(status=status, last_idle_time=1.0), None, None, NOW)
        assert (after.status, after.last_idle_time) == (status, 1.0)

    def test_statistics_and_lease_stay_unless_given(self) -> None:
        before = a_worker(heartbeat_stats=b"{}", lease_seconds=20.0, deadline=950.0)
        after = workers.beat(before, None, None, NOW)
        assert (after.heartbeat_stats, after.lease_seconds) == (b"{}", 20.0)
        after = workers.beat(before, 5.0, b'{"load":1}', NOW)
        assert (after.heartbeat_stats, after.lease_seconds) == (b'{"load":1}', 5.0)

    def test_a_deadline_is_moved_only_where_it_must_be(self) -> None:
        leased = a_worker(lease_seconds=20.0, deadline=950.0)
        assert workers.beat(leased, None, None, NOW).deadline == 950.0  # a lower bound still: looked at again then
        assert workers.beat(leased, 5.0, None, NOW).deadline == NOW.lease + 5.0
        lost = a_worker(lease_seconds=20.0, deadline=None)
        assert workers.beat(lost, None, None, NOW).deadline == NOW.lease + 20.0

    @given(st.none() | st.integers(1, 50).map(float), st.none() | st.integers(1, 50).map(float), moments())
    def test_the_deadline_is_never_after_the_end_of_the_lease(
        self, lease: float | None, new_lease: float | None, now: Any
    ) -> None:
        before = workers.beat(a_worker(), lease, None, NOW)
        later = now._replace(lease=max(now.lease, NOW.lease))
        after = workers.beat(before, new_lease, None, later)
        due = worker_due(after)
        assert (after.deadline is None) == (due is None)
        assert due is None or (
            after.deadline is not None and after.deadline <= due == later.lease + (new_lease or lease or 0)
        )


class TestLastHeard:
    NEVER = an_attempt("preparing", beaten_lease=999.0)
    LATELY = an_attempt("running", beaten_lease=990.0, last_heartbeat_time=4_990.0)

    def test_by_itself_or_by_what_it_holds(self) -> None:
        worker = a_worker(heard_lease=980.0)
        assert workers.last_heard(worker, []) == 980.0
        assert workers.last_heard(worker, [self.NEVER]) == 980.0
        assert workers.last_heard(worker, [self.NEVER, self.LATELY]) == 990.0
        assert workers.last_heard(a_worker(heard_lease=995.0), [self.LATELY]) == 995.0

    @pytest.mark.parametrize("ended", ["succeeded", "unresponsive"])
    def test_what_it_held_is_remembered(self, ended: Any) -> None:
        """However it ended: when it was heard of last is known."""
        worker = a_worker(heard_lease=980.0)
        for attempt, heard in ((self.NEVER, 980.0), (self.LATELY, 990.0)):
            fields = {"beaten_lease": attempt.beaten_lease, "last_heartbeat_time": attempt.last_heartbeat_time}
            for other in (None, an_attempt()):
                after = workers.released(worker, an_attempt(ended, **fields), other, NOW)
                assert workers.last_heard(after, []) == heard


class TestExpire:
    def test_one_that_was_heard_since_gets_its_true_deadline(self) -> None:
        worker = a_worker(status="busy", lease_seconds=20.0, beaten_lease=990.0, deadline=NOW.lease)
        after, lost = workers.expire(worker, NOW)
        assert not lost
        assert changed(worker, after) == {"deadline": 1_010.0}

    def test_one_without_a_lease_never_expires(self) -> None:
        worker = a_worker(status="busy", deadline=NOW.lease)
        after, lost = workers.expire(worker, NOW)
        assert not lost
        assert changed(worker, after) == {"deadline": None}

    @pytest.mark.parametrize("beaten", [980.0, 900.0])
    def test_one_that_was_silent_for_its_lease_is_lost(self, beaten: float) -> None:
        worker = a_worker(**HOLDING, lease_seconds=20.0, beaten_lease=beaten, deadline=beaten + 20.0)
        after, lost = workers.expire(worker, NOW)
        assert lost
        assert after == workers.lose(worker, workers.silence(worker))
        assert (after.status, after.current_rollout_id, after.current_attempt_id) == ("unknown", None, None)
        assert (after.deadline, after.lease_seconds) == (None, 20.0)


def test_one_that_was_lost_is_known_again_when_it_beats() -> None:
    lost = workers.lose(a_worker(**HOLDING, lease_seconds=20.0, deadline=950.0), GONE)
    after = workers.beat(lost, None, None, NOW)
    assert (lost.reason_code, lost.reason_message) == GONE
    assert (after.status, after.deadline, after.reason_code) == ("idle", NOW.lease + 20.0, None)


class TestReasons:
    LEFT = Reason(reasons.WORKER_LEFT, "its runner has ended")

    def test_the_first_reason_stays(self) -> None:
        left = workers.lose(a_worker(status="idle"), self.LEFT)
        assert workers.lose(left, GONE) == left
        assert workers.lose(a_worker(status="unknown"), GONE).reason_code == GONE.code, "it had none"

    @pytest.mark.parametrize(
        "sign_of_life",
        [
            lambda left: workers.beat(left, None, None, NOW),
            lambda left: workers.came_empty(left, NOW, waited=True),
            lambda left: workers.holds(left, an_attempt(), NOW),
            lambda left: workers.beat(replace(left, **{**HOLDING, "status": "unknown"}), None, None, NOW),
        ],
    )
    def test_one_that_is_back_has_none(self, sign_of_life: Callable[[WorkerRow], WorkerRow]) -> None:
        after = sign_of_life(workers.lose(a_worker(status="idle"), self.LEFT))
        assert (after.reason_code, after.reason_message) == (None, None)

    @pytest.mark.parametrize(
        ("worker", "may"),
        [
            (a_worker(status="unknown", lease_seconds=20.0), True),
            (a_worker(status="idle"), True),
            (a_worker(status="idle", lease_seconds=20.0), False),
            (a_worker(**HOLDING), False),
        ],
    )
    def test_only_one_that_nobody_misses_may_be_deleted(self, worker: WorkerRow, may: bool) -> None:
        assert workers.may_be_deleted(worker) == may


class TestRegistration:
    def test_one_that_begins_anew_is_free_of_what_was_asked_of_it(self) -> None:
        before = a_worker(registration=b'{"pid":1}', directive="drain")
        after = workers.register(before, b'{"pid":2}')
        assert changed(before, after) == {"registration": b'{"pid":2}', "directive": None}

    def test_one_that_says_again_what_it_is_changes_nothing(self) -> None:
        before = a_worker(registration=b'{"pid":1}', directive="drain")
        assert workers.register(before, b'{"pid":1}') is before


class TestDirectives:
    @pytest.mark.parametrize("directive", ["drain", "stop", None])
    def test_what_is_asked_last_holds(self, directive: Any) -> None:
        for before in (a_worker(directive="drain"), a_worker(directive="stop"), a_worker()):
            after = workers.direct(before, directive)
            assert after.directive == directive
            assert (after is before) == (before.directive == directive)

    def test_neither_a_heartbeat_nor_a_loss_takes_it_back(self) -> None:
        asked = a_worker(directive="stop", lease_seconds=20.0, deadline=950.0)
        assert workers.beat(workers.lose(asked, GONE), 5.0, b"{}", NOW).directive == "stop"


class TestOnlyHeard:
    """What need not be durable: all that a store knows again when it is opened."""

    @pytest.mark.parametrize(
        "after",
        [
            workers.beat(a_worker(status="idle"), None, None, NOW),
            workers.took(a_worker(status="idle"), an_attempt(), NOW, waited=False),
            workers.came_empty(a_worker(status="idle"), NOW, waited=False),
        ],
    )
    def test_a_beat_a_claim_and_an_empty_claim(self, after: WorkerRow) -> None:
        assert workers.only_heard(a_worker(status="idle"), after)

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (a_worker(status="unknown"), a_worker(status="idle")),
            (a_worker(status="busy"), a_worker(status="unknown")),
            (a_worker(status="idle"), a_worker(status="idle", heartbeat_stats=b"{}")),
            (a_worker(status="idle"), a_worker(status="idle", lease_seconds=20.0)),
            (a_worker(status="idle"), a_worker(status="busy", directive="drain")),
        ],
    )
    def test_not_what_else_is_said_of_it(self, before: WorkerRow, after: WorkerRow) -> None:
        assert not workers.only_heard(before, after)
