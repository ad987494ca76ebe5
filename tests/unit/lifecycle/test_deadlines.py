"""When an attempt or a worker expires, and of what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from agentlightning.lifecycle.deadlines import (
    Due,
    attempt_deadline,
    attempt_due,
    attempt_throttle,
    worker_due,
    worker_throttle,
)
from agentlightning.lifecycle.records import RolloutPolicy
from rows import a_worker, an_attempt, policies


@pytest.mark.parametrize(
    ("policy", "confirm_seconds", "due"),
    [
        (RolloutPolicy(), None, None),
        (RolloutPolicy(), 10.0, Due(960.0, "unconfirmed")),
        (RolloutPolicy(unresponsive_seconds=20.0), None, Due(970.0, "unresponsive")),
        (RolloutPolicy(timeout_seconds=20.0), None, Due(920.0, "timeout")),
        # Until it is confirmed, its silence is judged by the confirmation lease alone, be it shorter or longer.
        (RolloutPolicy(unresponsive_seconds=20.0), 10.0, Due(960.0, "unconfirmed")),
        (RolloutPolicy(unresponsive_seconds=5.0), 10.0, Due(960.0, "unconfirmed")),
        # The time-out runs from the start, whatever is heard.
        (RolloutPolicy(timeout_seconds=55.0), 10.0, Due(955.0, "timeout")),
        (RolloutPolicy(timeout_seconds=65.0), 10.0, Due(960.0, "unconfirmed")),
        (RolloutPolicy(timeout_seconds=65.0, unresponsive_seconds=20.0), None, Due(965.0, "timeout")),
        (RolloutPolicy(timeout_seconds=75.0, unresponsive_seconds=20.0), None, Due(970.0, "unresponsive")),
    ],
)
def test_what_ends_an_attempt_first(policy: RolloutPolicy, confirm_seconds: float | None, due: Due | None) -> None:
    attempt = an_attempt(started_lease=900.0, beaten_lease=950.0, confirm_seconds=confirm_seconds)
    assert attempt_due(policy, attempt) == due
    assert attempt_deadline(policy, attempt) == (None if due is None else due.at)


@pytest.mark.parametrize("other", [{"confirm_seconds": 70.0}, {}])
def test_at_the_same_moment_the_time_out_counts(other: dict[str, Any]) -> None:
    policy = RolloutPolicy(timeout_seconds=70.0, unresponsive_seconds=70.0)
    attempt = an_attempt(started_lease=900.0, beaten_lease=900.0, **other)
    assert attempt_due(policy, attempt) == Due(970.0, "timeout")


@given(policies(), st.none() | st.just(10.0), st.integers(0, 100), st.integers(0, 100))
def test_a_sign_of_life_never_brings_the_end_nearer(
    policy: RolloutPolicy, confirm_seconds: float | None, beaten: int, later: int
) -> None:
    def due(heard: int) -> float:
        attempt = an_attempt(confirm_seconds=confirm_seconds, started_lease=900.0, beaten_lease=900.0 + heard)
        at = attempt_deadline(policy, attempt)
        return float("inf") if at is None else at

    assert due(beaten) <= due(beaten + later)


def test_a_worker_lives_as_long_as_its_lease() -> None:
    assert worker_due(a_worker(beaten_lease=950.0, lease_seconds=20.0)) == 970.0
    assert worker_due(a_worker(beaten_lease=950.0)) is None


@pytest.mark.parametrize(
    ("policy", "confirm_seconds", "throttle"),
    [
        (RolloutPolicy(), None, 60.0),
        (RolloutPolicy(), 10.0, 1.0),
        (RolloutPolicy(unresponsive_seconds=20.0), None, 2.0),
        (RolloutPolicy(unresponsive_seconds=20.0, timeout_seconds=5.0), 10.0, 0.5),
        (RolloutPolicy(timeout_seconds=3_600.0), None, 360.0),
    ],
)
def test_a_stored_sign_of_life_is_older_by_a_tenth_of_the_shortest_term_at_most(
    policy: RolloutPolicy, confirm_seconds: float | None, throttle: float
) -> None:
    assert attempt_throttle(policy, an_attempt(confirm_seconds=confirm_seconds)) == pytest.approx(throttle)


@pytest.mark.parametrize(("lease_seconds", "throttle"), [(None, 60.0), (20.0, 2.0), (3_600.0, 360.0)])
def test_and_that_of_a_worker_by_a_tenth_of_its_lease(lease_seconds: float | None, throttle: float) -> None:
    assert worker_throttle(a_worker(lease_seconds=lease_seconds)) == pytest.approx(throttle)
