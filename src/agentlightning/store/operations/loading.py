"""Finding the rows that an operation is about."""

from __future__ import annotations

from typing import Literal

from agentlightning.errors import NotFound
from agentlightning.lifecycle.records import AttemptRow, Pair, RolloutRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import ReadTransaction

__all__ = ["attempt_of", "load_change", "load_pair", "load_rollout"]


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
