"""Rewards of rollouts, read from their spans."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from agentlightning.store.base import LightningStore
from agentlightning.types import Rollout
from agentlightning.types.rewards import find_final_reward

_AT_ONCE = 16
_LAST_SPANS = 100
"""Read first: the reward is among the last spans, and an agent may have left thousands."""


async def rewards_of(store: LightningStore, rollouts: Iterable[Rollout]) -> dict[str, float]:
    """The final rewards of those that succeeded and have one, by id."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def read(rollout_id: str) -> float | None:
        async with slots:
            page = await store.query_spans(rollout_id, "latest", sort_order="desc", limit=_LAST_SPANS)
            reward = find_final_reward(page.items[::-1])
            if reward is None and page.total > len(page.items):
                reward = find_final_reward(await store.query_spans(rollout_id, "latest"))
            return reward

    ids = [each.rollout_id for each in rollouts if each.status == "succeeded"]
    found = await asyncio.gather(*map(read, ids))
    return {rollout_id: reward for rollout_id, reward in zip(ids, found, strict=True) if reward is not None}


def mean(values: Sequence[float]) -> float | None:
    """Their mean; None of none."""
    return sum(values) / len(values) if values else None


def trend(values: Sequence[float]) -> str:
    """How rewards, the oldest first, went: the means of their first and of their last quarter."""
    quarter = max(1, len(values) // 4)
    first, last = mean(values[:quarter]), mean(values[-quarter:])
    return "" if first is None or last is None or len(values) < 2 else f"{first:.4g} → {last:.4g}"
