"""Rows of the state machine, to begin a test with; and all the ways in which a rollout and its attempt can stand."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from agentlightning.lifecycle.deadlines import attempt_deadline
from agentlightning.lifecycle.records import AttemptRow, Moment, Pair, RolloutPolicy, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.lifecycle.states import FINAL, LIVE
from agentlightning.types import AttemptStatus

__all__ = ["NOW", "STANDS", "a_worker", "an_attempt", "changes", "moments", "pair_of", "policies", "standing_rollout"]

NOW = Moment(wall=5_000.0, lease=1_000.0)
"""When things happen in a test, unless it says otherwise. Rows were made 100 seconds before."""

STANDS: tuple[tuple[str, str | None], ...] = (
    ("queuing", None),
    ("preparing", "preparing"),
    ("running", "running"),
    ("requeuing", "failed"),
    ("requeuing", "timeout"),
    ("requeuing", "unresponsive"),
    ("succeeded", None),
    ("succeeded", "succeeded"),
    ("succeeded", "failed"),
    ("succeeded", "timeout"),
    ("succeeded", "unresponsive"),
    ("failed", None),
    ("failed", "failed"),
    ("failed", "timeout"),
    ("failed", "unresponsive"),
    ("cancelled", None),
    ("cancelled", "failed"),
    ("cancelled", "timeout"),
    ("cancelled", "unresponsive"),
)
"""Each way in which a rollout and its latest attempt can stand: (rollout status, attempt status)."""


def standing_rollout(status: Any = "queuing", **fields: Any) -> RolloutRow:
    """A rollout in this state."""
    ended = status in FINAL
    row: dict[str, Any] = {
        "seq": 1,
        "version": 1,
        "rollout_id": "ro-1",
        "status": status,
        "priority": 0,
        "input": b'"task"',
        "mode": None,
        "resources_id": None,
        "resources_version": None,
        "policy": RolloutPolicy(),
        "metadata": None,
        "start_time": 4_900.0,
        "end_time": 4_950.0 if ended else None,
        "reason_code": "before" if ended else None,
        "reason_message": "it ended before" if ended else None,
        "attempts": 0,
        "redeliveries": 0,
        "latest_attempt_id": None,
        "digest": b"digest",
    }
    return RolloutRow(**(row | fields))


def an_attempt(status: Any = "running", **fields: Any) -> AttemptRow:
    """An attempt in this state, without a deadline."""
    ended = status not in LIVE
    row: dict[str, Any] = {
        "seq": 1,
        "version": 1,
        "rollout_id": "ro-1",
        "attempt_id": "at-1",
        "sequence_id": 1,
        "status": status,
        "start_time": 4_900.0,
        "end_time": 4_950.0 if ended else None,
        "worker_id": None,
        "last_heartbeat_time": None,
        "metadata": None,
        "reason_code": "before" if ended else None,
        "reason_message": "it ended before" if ended else None,
        "request_id": None,
        "confirm_seconds": None,
        "started_lease": 900.0,
        "beaten_lease": 900.0,
        "deadline": None,
        "span_sequence": 0,
        "digest": b"",
    }
    return AttemptRow(**(row | fields))


def a_worker(**fields: Any) -> WorkerRow:
    """A worker that was never heard of."""
    return WorkerRow(**({"seq": 1, "version": 1, "worker_id": "w-1"} | fields))


def pair_of(rollout_status: Any, attempt_status: Any, policy: RolloutPolicy | None = None, **of_attempt: Any) -> Pair:
    """A rollout whose first and latest attempt is given, with the deadline that it has by the rollout's policy."""
    policy = policy or RolloutPolicy()
    rollout = standing_rollout(rollout_status, policy=policy, attempts=1, latest_attempt_id="at-1")
    attempt = an_attempt(attempt_status, **of_attempt)
    if attempt.live and "deadline" not in of_attempt:
        attempt = an_attempt(attempt_status, **of_attempt, deadline=attempt_deadline(policy, attempt))
    return Pair(rollout, attempt)


# --- Strategies ------------------------------------------------------------------------------------

_seconds = st.none() | st.integers(1, 400).map(float)


@st.composite
def policies(draw: st.DrawFn) -> RolloutPolicy:
    """Any policy whose times are of the size of the times in the rows."""
    statuses: list[AttemptStatus] = ["failed", "timeout", "unresponsive", "succeeded", "running"]
    retried = draw(st.sets(st.sampled_from(statuses)))
    return RolloutPolicy(draw(_seconds), draw(_seconds), draw(st.integers(1, 4)), tuple(sorted(retried)))


def moments() -> st.SearchStrategy[Moment]:
    """Any time after the rows were made, on clocks that need not agree."""
    return st.builds(Moment, st.integers(1, 10_000).map(float), st.integers(1_000, 2_000).map(float))


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """A rollout and its latest attempt, if it has any, as they can stand together."""
    rollout_status, attempt_status = draw(st.sampled_from(STANDS))
    policy = draw(policies())
    if attempt_status is None:
        return Change(standing_rollout(rollout_status, policy=policy), None)
    attempts = draw(st.integers(1, 6))
    rollout = standing_rollout(
        rollout_status,
        policy=policy,
        attempts=attempts,
        redeliveries=draw(st.integers(0, min(attempts - 1, 3))),
        latest_attempt_id="at-1",
    )
    live = attempt_status in LIVE
    attempt = an_attempt(
        attempt_status,
        sequence_id=attempts,
        worker_id=draw(st.sampled_from([None, "w-1"])),
        confirm_seconds=draw(st.none() | st.just(10.0)) if live else None,
        beaten_lease=draw(st.integers(900, 1_000).map(float)),
    )
    due = attempt_deadline(policy, attempt) if live else None
    early = draw(st.integers(0, 50))
    return Change(rollout, an_attempt(**{**_fields(attempt), "deadline": None if due is None else due - early}))


def _fields(attempt: AttemptRow) -> dict[str, Any]:
    return {name: getattr(attempt, name) for name in attempt.__struct_fields__}
