"""What the store says after a run: whether anything was lost, and whether anything was counted twice."""

from __future__ import annotations

from dataclasses import dataclass

from agentlightning.lifecycle import reasons
from agentlightning.store.base import LightningStore, is_finished
from agentlightning.types import Attempt, AttemptedRollout

__all__ = ["Account", "Retried", "take_account"]


@dataclass(frozen=True)
class Retried:
    """A rollout that needed more than one attempt."""

    rollout_id: str
    status: str
    attempts: tuple[Attempt, ...]

    @property
    def lost_its_worker(self) -> bool:
        """Whether an attempt ended because its worker died, after it had begun or before."""
        return any(attempt.reason_code in (reasons.WORKER_LOST, reasons.UNCONFIRMED) for attempt in self.attempts)


@dataclass(frozen=True)
class Account:
    """Every rollout of a store, accounted for."""

    rollouts: int
    succeeded: int
    retried: tuple[Retried, ...]

    lost: int
    """Rollouts that never came to an end."""

    counted_twice: int
    """Rollouts with more than one attempt that succeeded."""

    violations: int
    """Records that break a rule of the store, as ``agl verify`` counts them."""

    @property
    def clean(self) -> bool:
        """Whether all is as promised."""
        return not (self.lost or self.counted_twice or self.violations)


async def take_account(store: LightningStore) -> Account:
    """Go through everything stored."""
    rollouts = await store.query_rollouts()
    retried: list[Retried] = []
    for rollout in rollouts:
        if isinstance(rollout, AttemptedRollout) and rollout.attempt.sequence_id > 1:
            attempts = await store.query_attempts(rollout.rollout_id)
            retried.append(Retried(rollout.rollout_id, rollout.status, tuple(attempts)))
    report = await store.verify()
    return Account(
        rollouts=len(rollouts),
        succeeded=sum(rollout.status == "succeeded" for rollout in rollouts),
        retried=tuple(retried),
        lost=sum(not is_finished(rollout) for rollout in rollouts),
        counted_twice=sum(sum(attempt.status == "succeeded" for attempt in each.attempts) > 1 for each in retried),
        violations=len(report.violations),
    )
