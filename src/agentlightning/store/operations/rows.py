"""Finding the rows that an operation is about."""

from __future__ import annotations

from typing import Literal

from agentlightning.errors import NotFound
from agentlightning.lifecycle import attempts, workers
from agentlightning.lifecycle.attempts import Started
from agentlightning.lifecycle.deadlines import attempt_throttle, worker_throttle
from agentlightning.lifecycle.records import AttemptRow, Pair, RolloutPolicy, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.lifecycle.states import CLAIMABLE, FINAL
from agentlightning.store.backend import Deadline, Ended, Finished, ReadTransaction, Transaction, Waiting


async def load_rollout(tx: ReadTransaction, rollout_id: str) -> RolloutRow:
    """The rollout.

    Raises:
        NotFound: it is unknown.
    """
    rollout = await tx.get(RolloutRow, rollout_id)
    if rollout is None:
        raise NotFound(f"there is no rollout {rollout_id!r} in this store")
    return rollout


async def load_change(tx: ReadTransaction, rollout_id: str) -> Change:
    """The rollout and its latest attempt. Raises as ``load_rollout``."""
    rollout = await load_rollout(tx, rollout_id)
    if rollout.latest_attempt_id is None:
        return Change(rollout, None)
    return Change(rollout, await tx.get(AttemptRow, rollout.latest_attempt_id))


async def attempt_of(tx: ReadTransaction, rollout_id: str, attempt_id: str) -> AttemptRow:
    """The attempt, provided that it is one of this rollout's.

    Raises:
        NotFound: it is not.
    """
    attempt = await tx.get(AttemptRow, attempt_id)
    if attempt is None or attempt.rollout_id != rollout_id:
        raise NotFound(f"rollout {rollout_id!r} has no attempt {attempt_id!r} in this store")
    return attempt


async def load_pair(tx: ReadTransaction, rollout_id: str, attempt_id: str | Literal["latest"]) -> Pair:
    """A rollout and one of its attempts.

    Raises:
        NotFound: one of them is unknown.
    """
    if attempt_id != "latest":
        return Pair(await load_rollout(tx, rollout_id), await attempt_of(tx, rollout_id, attempt_id))
    rollout, attempt = await load_change(tx, rollout_id)
    if attempt is None:
        raise NotFound(f"rollout {rollout_id!r} has no attempt yet")
    return Pair(rollout, attempt)


# --- Writing what ``lifecycle`` decided, with everything that follows from it: counters, events ---


async def save(tx: Transaction, before: Change, after: Change) -> Change:
    """Write a rollout and its attempt where they differ from what was stored."""
    attempt = after.attempt
    if attempt is not None and before.attempt is not None and attempt is not before.attempt:
        attempt = await _save_attempt(tx, before.attempt, attempt, before.rollout.policy)
    rollout = after.rollout
    if rollout is not before.rollout:
        rollout = await _save_rollout(tx, before.rollout, rollout)
    return Change(rollout, attempt)


async def save_started(tx: Transaction, before: Change, started: Started) -> Change:
    """Write a new attempt, its rollout, and the attempt that it replaced."""
    if started.replaced is not None and before.attempt is not None:
        await _save_attempt(tx, before.attempt, started.replaced, before.rollout.policy)
    attempt = await tx.insert(started.attempt)
    tx.count({"attempts": 1})
    if attempt.deadline is not None:
        tx.publish(Deadline(attempt.deadline))
    return Change(await _save_rollout(tx, before.rollout, started.rollout), attempt)


async def insert_rollout(tx: Transaction, rollout: RolloutRow) -> RolloutRow:
    """Store a new rollout."""
    rollout = await tx.insert(rollout)
    tx.count({f"rollouts.{rollout.status}": 1})
    if rollout.status in CLAIMABLE:
        tx.publish(Waiting(1))
    return rollout


async def worker_of(tx: Transaction, worker_id: str) -> WorkerRow:
    """The worker; a new one is registered."""
    worker = await tx.get(WorkerRow, worker_id)
    if worker is None:
        worker = await tx.insert(WorkerRow(seq=0, version=1, worker_id=worker_id))
        tx.count({"workers": 1})
    return worker


async def save_worker(tx: Transaction, before: WorkerRow, after: WorkerRow) -> WorkerRow:
    """Write a worker, if it has changed."""
    if after is before:
        return before
    if workers.only_heard(before, after):
        return await tx.touch(before, after, worker_throttle(after))
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
        newest = await tx.newest_live_attempt_of(worker.worker_id)
        other = None if newest is None else await tx.get(AttemptRow, newest)
        await save_worker(tx, worker, workers.released(worker, attempt, other, tx.now()))


async def _save_attempt(tx: Transaction, before: AttemptRow, after: AttemptRow, policy: RolloutPolicy) -> AttemptRow:
    if attempts.only_heard(before, after):
        return await tx.touch(before, after, attempt_throttle(policy, after))
    saved = await tx.put(before, after)
    if after.deadline is not None and after.deadline != before.deadline:
        tx.publish(Deadline(after.deadline))
    moved = before.worker_id != after.worker_id
    if before.live and (moved or not after.live):
        await _release(tx, before.worker_id, saved)
    if before.live and not after.live:
        tx.publish(Ended(after.status, max(0.0, (after.end_time or after.start_time) - after.start_time)))
    if after.live and (moved or not before.live):
        await hold(tx, saved)
    return saved


async def _save_rollout(tx: Transaction, before: RolloutRow, after: RolloutRow) -> RolloutRow:
    saved = await tx.put(before, after)
    if saved.status != before.status:
        tx.count({f"rollouts.{before.status}": -1, f"rollouts.{saved.status}": 1})
        if saved.status in FINAL:
            tx.publish(Finished(saved.rollout_id, saved.status))
        elif saved.status in CLAIMABLE and before.status not in CLAIMABLE:
            tx.publish(Waiting(1))
    return saved
