"""Writing what ``lifecycle`` decided, with everything that follows from it: counters, events, workers."""

from __future__ import annotations

from msgspec.structs import replace

from agentlightning.lifecycle import workers
from agentlightning.lifecycle.attempts import Started
from agentlightning.lifecycle.records import AttemptRow, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import AttemptsBy, Deadline, Finished, Transaction, Waiting

__all__ = ["hold", "insert_rollout", "save", "save_started", "save_worker", "worker_of"]


async def save(tx: Transaction, before: Change, after: Change) -> Change:
    """Write a rollout and its attempt where they differ from what was stored."""
    attempt = after.attempt
    if attempt is not None and before.attempt is not None and attempt is not before.attempt:
        attempt = await _save_attempt(tx, before.attempt, attempt)
    rollout = after.rollout
    if rollout is not before.rollout:
        rollout = await _save_rollout(tx, before.rollout, rollout, attempt)
    return Change(rollout, attempt)


async def save_started(tx: Transaction, before: Change, started: Started) -> Change:
    """Write a new attempt, its rollout, and the attempt that it replaced."""
    if started.replaced is not None and before.attempt is not None:
        await _save_attempt(tx, before.attempt, started.replaced)
    attempt = replace(started.attempt, seq=await tx.insert(started.attempt))
    tx.count({"attempts": 1})
    if attempt.deadline is not None:
        tx.publish(Deadline(attempt.deadline))
    return Change(await _save_rollout(tx, before.rollout, started.rollout, attempt), attempt)


async def insert_rollout(tx: Transaction, rollout: RolloutRow) -> RolloutRow:
    """Store a new rollout."""
    rollout = replace(rollout, seq=await tx.insert(rollout))
    tx.count({f"rollouts.{rollout.status}": 1})
    if rollout.claimable:
        tx.publish(Waiting(1))
    return rollout


async def worker_of(tx: Transaction, worker_id: str) -> WorkerRow:
    """The worker; a new one is registered."""
    worker = await tx.get(WorkerRow, worker_id)
    if worker is None:
        worker = WorkerRow(seq=0, version=1, worker_id=worker_id)
        worker = replace(worker, seq=await tx.insert(worker))
        tx.count({"workers": 1})
    return worker


async def save_worker(tx: Transaction, before: WorkerRow, after: WorkerRow) -> WorkerRow:
    """Write a worker, if it has changed."""
    if after is before:
        return before
    if after.deadline is not None and after.deadline != before.deadline:
        tx.publish(Deadline(after.deadline))
    return await tx.put(before, after)


async def hold(tx: Transaction, attempt: AttemptRow) -> None:
    """Note that an attempt's worker, if it has one, works on it."""
    if attempt.worker_id is not None:
        worker = await worker_of(tx, attempt.worker_id)
        await save_worker(tx, worker, workers.holds(worker, attempt, tx.now()))


async def _release(tx: Transaction, worker_id: str | None, attempt: AttemptRow) -> None:
    """Note that a worker does not work on an attempt any more."""
    worker = None if worker_id is None else await tx.get(WorkerRow, worker_id)
    if worker is not None:
        held = await tx.attempts_by(AttemptsBy("worker_id", worker.worker_id, live_only=True, limit=1))
        other = held[0] if held else None
        await save_worker(tx, worker, workers.released(worker, attempt.status, other, tx.now()))


async def _save_attempt(tx: Transaction, before: AttemptRow, after: AttemptRow) -> AttemptRow:
    saved = await tx.put(before, after)
    if after.deadline is not None and after.deadline != before.deadline:
        tx.publish(Deadline(after.deadline))
    moved = before.worker_id != after.worker_id
    if before.live and (moved or not after.live):
        await _release(tx, before.worker_id, saved)
    if after.live and (moved or not before.live):
        await hold(tx, saved)
    return saved


async def _save_rollout(
    tx: Transaction, before: RolloutRow, after: RolloutRow, attempt: AttemptRow | None
) -> RolloutRow:
    saved = await tx.put(before, after)
    if saved.status != before.status:
        tx.count({f"rollouts.{before.status}": -1, f"rollouts.{saved.status}": 1})
        if saved.final:
            tx.publish(Finished(saved, attempt))
        elif saved.claimable and not before.claimable:
            tx.publish(Waiting(1))
    return saved
