"""When an attempt or a worker expires. All times here are seconds on the lease clock."""

from __future__ import annotations

from typing import Literal, NamedTuple

from agentlightning.lifecycle.records import AttemptRow, Policy, WorkerRow


class Due(NamedTuple):
    """The first thing that will end an attempt if nothing else happens."""

    at: float
    cause: Literal["unconfirmed", "unresponsive", "timeout"]


def attempt_due(policy: Policy, attempt: AttemptRow) -> Due | None:
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


def attempt_deadline(policy: Policy, attempt: AttemptRow) -> float | None:
    """The moment of ``attempt_due``."""
    due = attempt_due(policy, attempt)
    return None if due is None else due.at


def worker_due(worker: WorkerRow) -> float | None:
    """When the worker's lease runs out; None if it has none."""
    return None if worker.lease_seconds is None else worker.beaten_lease + worker.lease_seconds
