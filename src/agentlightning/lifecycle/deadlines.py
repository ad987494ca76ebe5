"""When an attempt or a worker expires. All times here are seconds on the lease clock."""

from __future__ import annotations

from typing import Literal, NamedTuple

from agentlightning.lifecycle.records import AttemptRow, RolloutPolicy, WorkerRow

_THROTTLES_PER_TERM = 10
_THROTTLE_WITHOUT_TERM = 60.0
"""Where nothing expires a stored sign of life is only shown, to those who read the file from another process."""


class Due(NamedTuple):
    """The first thing that will end an attempt if nothing else happens."""

    at: float
    cause: Literal["unconfirmed", "unresponsive", "timeout"]


def attempt_due(policy: RolloutPolicy, attempt: AttemptRow) -> Due | None:
    """What ends ``attempt`` first, and when; None if it may run for ever.

    While a claim is unconfirmed, silence is judged by its confirmation lease alone;
    from the first sign of life on, by ``unresponsive_seconds``. The time-out always runs.
    """
    dues: list[Due] = []
    if attempt.confirm_seconds is not None:
        dues.append(Due(attempt.beaten_lease + attempt.confirm_seconds, "unconfirmed"))
    elif policy.unresponsive_seconds is not None:
        dues.append(Due(attempt.beaten_lease + policy.unresponsive_seconds, "unresponsive"))
    if policy.timeout_seconds is not None:
        dues.append(Due(attempt.started_lease + policy.timeout_seconds, "timeout"))
    return min(dues, default=None)


def attempt_deadline(policy: RolloutPolicy, attempt: AttemptRow) -> float | None:
    """The moment of ``attempt_due``."""
    due = attempt_due(policy, attempt)
    return None if due is None else due.at


def worker_due(worker: WorkerRow) -> float | None:
    """When the worker's lease runs out; None if it has none."""
    return None if worker.lease_seconds is None else worker.beaten_lease + worker.lease_seconds


def attempt_throttle(policy: RolloutPolicy, attempt: AttemptRow) -> float:
    """How many seconds the stored sign of life of an attempt may be older than the newest one.

    A tenth of the shortest term that ends the attempt. Expiry is judged by the newest sign of life, so this does
    not delay it. It bounds what a crash forgets: the time-out of the attempt then starts over from the stored one.
    """
    terms = (attempt.confirm_seconds, policy.unresponsive_seconds, policy.timeout_seconds)
    known = [term for term in terms if term is not None]
    return min(known) / _THROTTLES_PER_TERM if known else _THROTTLE_WITHOUT_TERM


def worker_throttle(worker: WorkerRow) -> float:
    """As ``attempt_throttle``, for a worker."""
    return _THROTTLE_WITHOUT_TERM if worker.lease_seconds is None else worker.lease_seconds / _THROTTLES_PER_TERM
