"""All functions together: which moves they make, and what holds after any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, get_args

import pytest
from hypothesis import given, settings, strategies as st
from msgspec.structs import replace

from agentlightning.errors import IllegalMove, StaleAttempt
from agentlightning.lifecycle import attempts, rollouts
from agentlightning.lifecycle.attempts import MAX_REDELIVERIES, POISON_SUSPECTS, standing
from agentlightning.lifecycle.deadlines import attempt_deadline
from agentlightning.lifecycle.records import AttemptRow, Claim, Holder, Moment, Pair, Reason, RolloutPolicy, RolloutRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.lifecycle.states import ATTEMPT_MOVES, ENDED, ROLLOUT_MOVES
from agentlightning.types import AttemptStatus, RolloutStatus
from rows import NOW, STANDS, changes, moments, pair_of, standing_rollout

WHY = Reason("broken", "it broke")

Act = Callable[[Change, Moment], Change]
"""Something that happens to a rollout and its latest attempt."""


def start(before: Change, now: Moment) -> Change:
    started = attempts.start(before.rollout, before.attempt, Claim(f"at-{before.rollout.attempts + 1}"), now)
    return Change(started.rollout, started.attempt)


def claim(before: Change, now: Moment) -> Change:
    if not before.rollout.claimable:
        return before
    wanted = Claim(f"at-{before.rollout.attempts + 1}", "w-1", "request", 10.0)
    started = attempts.start(before.rollout, None, wanted, now)
    return Change(started.rollout, started.attempt)


def to_attempt(function: Callable[[Pair, Moment], Pair], stands: tuple[str, ...]) -> Act:
    """The function, for attempts that stand so; nothing happens to others."""

    def act(before: Change, now: Moment) -> Change:
        if before.attempt is None or standing(Pair(before.rollout, before.attempt)) not in stands:
            return before
        return Change(*function(Pair(before.rollout, before.attempt), now))

    return act


def sweep(pair: Pair, now: Moment) -> Pair:
    deadline = pair.attempt.deadline
    return pair if deadline is None or deadline > now.lease else attempts.expire(pair, Holder(), now)


def acts() -> Iterator[tuple[str, Act]]:
    """Everything that can happen, by name."""
    anyhow = ("live", "revivable", "stale")
    yield "start", start
    yield "claim", claim
    yield "beat", to_attempt(attempts.beat, anyhow)
    yield "run", to_attempt(attempts.run, anyhow)
    yield "expire", to_attempt(sweep, ("live",))
    yield "lose", to_attempt(lambda pair, now: attempts.lose(pair, WHY, Holder(died=True), now), ("live",))
    yield "release", to_attempt(attempts.release, anyhow)
    yield "reclaim", to_attempt(lambda pair, now: attempts.reclaim(pair, 10.0, now), ("revivable",))
    for status in get_args(AttemptStatus):
        yield (
            f"report {status}",
            to_attempt(lambda pair, now, status=status: attempts.report(pair, status, None, now), anyhow),
        )
    for to in get_args(RolloutStatus):
        yield f"set {to}", lambda before, now, to=to: rollouts.set_status(before, to, None, now)
    yield "cancel", lambda before, now: rollouts.cancel(before, "not needed", now)


ACTS = dict(acts())


def try_to(act: Act, before: Change, now: Moment) -> Change:
    """What comes of it; nothing, if it is refused."""
    try:
        return act(before, now)
    except (IllegalMove, StaleAttempt):
        return before


def assert_sound(change: Change) -> None:
    """What always holds of a rollout and its latest attempt."""
    rollout, attempt = change
    status = None if attempt is None else attempt.status
    assert (rollout.status, status) in STANDS
    assert rollout.final == (rollout.end_time is not None) == (rollout.reason_code is not None)
    assert 0 <= rollout.redeliveries <= MAX_REDELIVERIES
    assert len(rollout.suspects.split()) <= min(POISON_SUSPECTS, rollout.attempts)
    assert rollout.releases >= 0
    assert rollout.counted_attempts >= 0
    assert (attempt is None) == (rollout.latest_attempt_id is None) == (rollout.attempts == 0)
    if attempt is None:
        return
    assert (attempt.attempt_id, attempt.sequence_id) == (rollout.latest_attempt_id, rollout.attempts)
    assert attempt.live != (attempt.end_time is not None)
    assert attempt.live != (attempt.reason_code is not None)
    assert attempt.live or attempt.confirm_seconds is None
    due = attempt_deadline(rollout.policy, attempt) if attempt.live else None
    assert (attempt.deadline is None) == (due is None)
    assert attempt.deadline is None or due is None or attempt.deadline <= due


def moves_made() -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Every move that any act makes from any way to stand, at any time: (of rollouts, of attempts)."""
    retries: list[tuple[AttemptStatus, ...]] = [(), ("failed", "timeout", "unresponsive")]
    policies = [RolloutPolicy(150.0, 50.0, max_attempts, retried) for max_attempts, retried in product([1, 9], retries)]
    of_rollouts: set[tuple[str, str]] = set()
    of_attempts: set[tuple[str, str]] = set()
    for (rollout_status, attempt_status), policy in product(STANDS, policies):
        for act, confirm_seconds, lease in product(ACTS.values(), [None, 10.0], [901.0, 955.0, 1_055.0]):
            before = Change(standing_rollout(rollout_status, policy=policy), None)
            if attempt_status is not None:
                live = attempt_status not in ENDED
                fields: dict[str, Any] = {"confirm_seconds": confirm_seconds if live else None}
                if live and lease > 1_000.0:
                    fields["beaten_lease"] = 1_050.0
                before = Change(*pair_of(rollout_status, attempt_status, policy, **fields))
            after = try_to(act, before, Moment(NOW.wall, lease))
            if after.rollout is not before.rollout and after.rollout.status != before.rollout.status:
                of_rollouts.add((before.rollout.status, after.rollout.status))
            same = before.attempt and after.attempt and after.attempt.attempt_id == before.attempt.attempt_id
            if same and before.attempt and after.attempt and after.attempt.status != before.attempt.status:
                of_attempts.add((before.attempt.status, after.attempt.status))
            if before.attempt and not same:
                of_rollouts.add((before.rollout.status, after.rollout.status))
    return of_rollouts, of_attempts


def test_the_functions_make_the_moves_of_the_tables_and_no_others() -> None:
    of_rollouts, of_attempts = moves_made()
    assert of_rollouts == {(status, to) for status, ways in ROLLOUT_MOVES.items() for to in ways}
    # An attempt that fell silent and reports how it ended is running in between: two moves in one call.
    returned = {("unresponsive", to) for to in ("succeeded", "failed", "timeout")}
    assert of_attempts - returned == {(status, to) for status, ways in ATTEMPT_MOVES.items() for to in ways}
    assert of_attempts > returned


@given(changes(), st.sampled_from(sorted(ACTS)), moments())
def test_whatever_happens_leaves_a_sound_pair(before: Change, name: str, now: Moment) -> None:
    assert_sound(before)
    assert_sound(try_to(ACTS[name], before, now))


@given(changes(), st.sampled_from(sorted(ACTS)), moments())
def test_a_rollout_that_has_ended_never_changes(before: Change, name: str, now: Moment) -> None:
    after = try_to(ACTS[name], before, now)
    if before.rollout.final:
        assert after.rollout is before.rollout
        assert after.attempt is before.attempt


def _waits(row: object) -> bool:
    return isinstance(row, RolloutRow) and row.status == "requeuing"


@given(changes(), st.sampled_from(sorted(ACTS)), moments())
def test_what_need_not_be_written_is_the_same_object(before: Change, name: str, now: Moment) -> None:
    after = try_to(ACTS[name], before, now)
    for old, new in zip(before, after, strict=True):
        # Clocks alone may make a new, equal row: a sign of life is written even if no time has passed. A rollout waits
        # as before if its silent attempt is heard only to end.
        assert old is new or old != new or (isinstance(new, AttemptRow) and new.live) or _waits(new)


@given(changes(), st.sampled_from(["beat", "run", "report running", "report failed", "expire", "lose"]), moments())
def test_a_stale_attempt_changes_nothing(before: Change, name: str, now: Moment) -> None:
    """Not its rollout, not its successor, not itself."""
    if before.attempt is None or before.attempt.live:
        return
    successor = replace(before.rollout, attempts=before.rollout.attempts + 1, latest_attempt_id="at-next")
    left = Change(successor, before.attempt)
    after = try_to(ACTS[name], left, now)
    assert after.rollout is successor
    assert after.attempt is before.attempt


@given(changes(), moments())
def test_an_attempt_never_expires_early_and_never_late(before: Change, now: Moment) -> None:
    rollout, attempt = before
    if attempt is None or not attempt.live:
        return
    due = attempt_deadline(rollout.policy, attempt)
    after = attempts.expire(Pair(rollout, attempt), Holder(), now)
    assert after.attempt.live == (due is None or due > now.lease)
    if after.attempt.live:
        assert after.attempt.deadline == due


happening = st.tuples(st.sampled_from(sorted(ACTS)), st.sampled_from([0.0, 1.0, 10.0, 60.0]))


@settings(max_examples=300)
@given(
    st.sampled_from(
        [
            RolloutPolicy(),
            RolloutPolicy(unresponsive_seconds=20.0, max_attempts=3, retry_condition=("unresponsive", "failed")),
            RolloutPolicy(
                timeout_seconds=50.0, unresponsive_seconds=20.0, max_attempts=2, retry_condition=("timeout",)
            ),
        ]
    ),
    st.lists(happening, max_size=40),
)
def test_every_history_ends_once_and_numbers_its_attempts(
    policy: RolloutPolicy, history: list[tuple[str, float]]
) -> None:
    now = NOW
    change = Change(standing_rollout(policy=policy), None)
    ends: list[RolloutRow] = []
    for name, seconds in history:
        now = Moment(now.wall + seconds, now.lease + seconds)
        before, change = change, try_to(ACTS[name], change, now)
        assert_sound(change)
        assert change.rollout.attempts - before.rollout.attempts in (0, 1)
        if change.rollout.final and not before.rollout.final:
            ends.append(change.rollout)
    assert len(ends) <= 1
    assert not ends or change.rollout is ends[0]


@given(st.integers(1, 4), st.lists(st.sampled_from(["failed", "timeout", "unresponsive"]), min_size=12, max_size=12))
def test_a_rollout_that_always_fails_gets_as_many_attempts_as_it_may(max_attempts: int, ends: list[Any]) -> None:
    policy = RolloutPolicy(max_attempts=max_attempts, retry_condition=("failed", "timeout", "unresponsive"))
    change = Change(standing_rollout(policy=policy), None)
    confirmed = 0
    while not change.rollout.final:
        change = claim(change, NOW)
        confirmed += 1
        change = ACTS[f"report {ends.pop()}"](change, NOW)
    assert confirmed == max_attempts
    assert change.rollout.status == "failed"


@pytest.mark.parametrize(
    ("name", "times"), [("expire", MAX_REDELIVERIES + 1), ("lose", POISON_SUSPECTS)], ids=["vanishing", "dying"]
)
def test_a_rollout_that_nobody_confirms_is_handed_out_a_limited_number_of_times(name: str, times: int) -> None:
    """To one worker that vanishes each time, or is reported dead."""
    change = Change(standing_rollout(policy=RolloutPolicy(max_attempts=1)), None)
    claims = 0
    now = NOW
    while not change.rollout.final:
        change = claim(change, now)
        claims += 1
        now = now._replace(lease=now.lease + 10.0)
        change = ACTS[name](change, now)
    assert claims == times
    assert (change.rollout.status, change.rollout.reason_code) == ("failed", "poison")
