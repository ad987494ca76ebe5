"""Hear from workers, and learn that one is gone."""

from __future__ import annotations

from collections.abc import Sequence

from agentlightning.errors import NotFound
from agentlightning.lifecycle import attempts, workers
from agentlightning.lifecycle.attempts import standing
from agentlightning.lifecycle.records import AttemptRow, Pair, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Transaction
from agentlightning.store.operations.attempts import lose_attempts
from agentlightning.store.operations.saving import save, save_worker, worker_of

__all__ = ["beat", "lose"]


async def beat(
    tx: Transaction, worker_id: str, stats: bytes | None, attempt_ids: Sequence[str], lease_seconds: float | None
) -> tuple[WorkerRow, list[str]]:
    """A heartbeat of a worker and of the attempts that it lists: (worker, attempts that it has lost)."""
    stale = [each for each in attempt_ids if not await _beat_attempt(tx, worker_id, each)]
    worker = await worker_of(tx, worker_id)
    return await save_worker(tx, worker, workers.beat(worker, lease_seconds, stats, tx.now())), stale


async def lose(tx: Transaction, worker_id: str, message: str) -> list[AttemptRow]:
    """End the live attempts of a worker that is known to be dead.

    Raises:
        NotFound: the worker is unknown.
    """
    if await tx.get(WorkerRow, worker_id) is None:
        raise NotFound(f"there is no worker {worker_id!r} in this store")
    lost = await lose_attempts(tx, worker_id, message)
    worker = await worker_of(tx, worker_id)
    await save_worker(tx, worker, workers.lose(worker))
    return lost


async def _beat_attempt(tx: Transaction, worker_id: str, attempt_id: str) -> bool:
    attempt = await tx.get(AttemptRow, attempt_id)
    if attempt is None or attempt.worker_id not in (None, worker_id):
        return False
    rollout = await tx.get(RolloutRow, attempt.rollout_id)
    if rollout is None or standing(Pair(rollout, attempt)) == "stale":
        return False
    before = Pair(rollout, attempt)
    await save(tx, Change(*before), Change(*attempts.beat(before, tx.now())))
    return True
