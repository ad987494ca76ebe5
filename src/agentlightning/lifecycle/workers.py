"""What the store knows about a worker, and how that changes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from msgspec.structs import replace

from agentlightning.lifecycle import reasons
from agentlightning.lifecycle.deadlines import worker_due
from agentlightning.lifecycle.records import AttemptRow, Moment, Reason, WorkerRow
from agentlightning.types import WorkerDirective

_IDLE_NOTED_SECONDS = 60.0
"""An empty claim within this time of the last one writes nothing, so a fleet that waits causes no writes."""


def took(worker: WorkerRow, attempt: AttemptRow, now: Moment, *, waited: bool) -> WorkerRow:
    """It got this attempt from the queue; ``waited``: it had asked earlier, and is not heard now."""
    heard_lease = worker.heard_lease if waited else now.lease
    return replace(_renewed(holds(worker, attempt, now), now), last_dequeue_time=now.wall, heard_lease=heard_lease)


def holds(worker: WorkerRow, attempt: AttemptRow, now: Moment) -> WorkerRow:
    """It works on this attempt. If it counted as lost, it has its lease again: nobody else would notice its death."""
    if worker.deadline is None:
        worker = _renewed(worker, now)
    return replace(
        worker,
        status="busy",
        reason_code=None,
        reason_message=None,
        last_busy_time=now.wall,
        current_rollout_id=attempt.rollout_id,
        current_attempt_id=attempt.attempt_id,
    )


def came_empty(worker: WorkerRow, now: Moment, *, waited: bool) -> WorkerRow:
    """It asked for work and there was none. One that still holds an attempt stays busy. ``waited``: as for ``took``."""
    worker = _renewed(worker, now)
    if not waited:
        worker = replace(worker, heard_lease=now.lease)
    if worker.current_attempt_id is not None or (worker.status == "idle" and _noted_lately(worker, now)):
        return worker
    return _idle(worker, now)


def released(worker: WorkerRow, ended: AttemptRow, other: AttemptRow | None, now: Moment) -> WorkerRow:
    """One of its attempts has ended; ``other`` is an attempt that it still holds, if any."""
    worker = replace(worker, heard_lease=max(worker.heard_lease, _last_word(ended)))
    if other is not None:
        return replace(worker, status="busy", current_rollout_id=other.rollout_id, current_attempt_id=other.attempt_id)
    worker = replace(worker, current_rollout_id=None, current_attempt_id=None)
    silent = ended.status in ("timeout", "unresponsive") and ended.reason_code != reasons.RELEASED
    if silent:
        return replace(worker, status="unknown")
    return _idle(worker, now)


def beat(worker: WorkerRow, lease_seconds: float | None, stats: bytes | None, now: Moment) -> WorkerRow:
    """It says that it lives, and for how long it may be silent from now on (None: as before)."""
    worker = replace(
        worker,
        last_heartbeat_time=now.wall,
        beaten_lease=now.lease,
        heard_lease=now.lease,
        lease_seconds=worker.lease_seconds if lease_seconds is None else lease_seconds,
        heartbeat_stats=worker.heartbeat_stats if stats is None else stats,
    )
    if worker.deadline is None or lease_seconds is not None:
        worker = replace(worker, deadline=worker_due(worker))
    if worker.status != "unknown":
        return worker
    worker = replace(worker, reason_code=None, reason_message=None)
    return _idle(worker, now) if worker.current_attempt_id is None else replace(worker, status="busy")


def only_heard(before: WorkerRow, after: WorkerRow) -> bool:
    """Whether a worker gave a sign of life, took an attempt or ended one, and nothing else about it changed.

    Such a change need not be durable: the lease gets a full new term when the store is opened, and what the worker
    holds is known from its attempts. Only the times that are shown may be older after a crash.
    """
    if before.status != after.status and "unknown" in (before.status, after.status):
        return False
    return after == replace(
        before,
        status=after.status,
        last_heartbeat_time=after.last_heartbeat_time,
        last_dequeue_time=after.last_dequeue_time,
        last_busy_time=after.last_busy_time,
        last_idle_time=after.last_idle_time,
        current_rollout_id=after.current_rollout_id,
        current_attempt_id=after.current_attempt_id,
        beaten_lease=after.beaten_lease,
        heard_lease=after.heard_lease,
    )


def register(worker: WorkerRow, registration: bytes) -> WorkerRow:
    """It says what it is. One that says something new has begun anew, and is free of what was asked of it before."""
    if worker.registration == registration:
        return worker
    return replace(worker, registration=registration, directive=None)


def direct(worker: WorkerRow, directive: WorkerDirective | None) -> WorkerRow:
    """Somebody asks it to do this, or (None) takes that back."""
    return worker if worker.directive == directive else replace(worker, directive=directive)


def expire(worker: WorkerRow, now: Moment) -> tuple[WorkerRow, bool]:
    """Look at a worker whose ``deadline`` has passed: (the worker, whether it is lost)."""
    due = worker_due(worker)
    if due is None or due > now.lease:
        return replace(worker, deadline=due), False
    return lose(worker, silence(worker)), True


def silence(worker: WorkerRow) -> Reason:
    """Why a worker whose lease has run out is lost."""
    return Reason(reasons.WORKER_LOST, f"worker {worker.worker_id!r} sent no heartbeat for {worker.lease_seconds:g} s")


def lose(worker: WorkerRow, reason: Reason) -> WorkerRow:
    """It is gone, until it beats again. Of several reasons the first stays: whoever only misses it knows less."""
    gone = replace(worker, status="unknown", current_rollout_id=None, current_attempt_id=None, deadline=None)
    if worker.status == "unknown" and worker.reason_code is not None:
        return gone
    return replace(gone, reason_code=reason.code, reason_message=reason.message)


def may_be_deleted(worker: WorkerRow) -> bool:
    """Whether nobody can miss it: it holds nothing, and is gone, or has no lease that could tell whether it is."""
    return worker.current_attempt_id is None and (worker.status == "unknown" or worker.lease_seconds is None)


def last_heard(worker: WorkerRow, held: Iterable[AttemptRow]) -> float:
    """When it gave its last sign of life, on the lease clock; ``held``: its live attempts."""
    return max([worker.heard_lease, *map(_last_word, held)])


def _last_word(attempt: AttemptRow) -> float:
    """When an attempt was heard of; before all time, if it never was."""
    return attempt.beaten_lease if attempt.last_heartbeat_time is not None else -math.inf


def _idle(worker: WorkerRow, now: Moment) -> WorkerRow:
    return replace(worker, status="idle", last_idle_time=now.wall, reason_code=None, reason_message=None)


def _noted_lately(worker: WorkerRow, now: Moment) -> bool:
    return worker.last_idle_time is not None and 0 <= now.wall - worker.last_idle_time < _IDLE_NOTED_SECONDS


def _renewed(worker: WorkerRow, now: Moment) -> WorkerRow:
    """A claim renews the worker's lease, too."""
    if worker.lease_seconds is None:
        return worker
    worker = replace(worker, beaten_lease=now.lease)
    return worker if worker.deadline is not None else replace(worker, deadline=worker_due(worker))
