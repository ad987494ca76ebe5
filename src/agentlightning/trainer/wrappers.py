"""What the trainer puts between an algorithm and its store: a default rollout config, and an eye on rewards.

Both wrap any store and hand through whatever they do not change, also what a store offers beyond the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from agentlightning.store.base import JsonObject, LightningStore
from agentlightning.types import (
    AttemptedRollout,
    EnqueueRolloutRequest,
    PaginatedResult,
    Rollout,
    RolloutConfig,
    RolloutMode,
    Span,
    TaskInput,
)
from agentlightning.types.rewards import find_final_reward

DEFAULT_ROLLOUT_CONFIG = RolloutConfig(max_attempts=3, retry_condition=["unresponsive", "timeout"])
"""Lost workers and timeouts are retried, up to 3 attempts in all; errors of the agent are not."""


def with_rollout_config(store: LightningStore, config: RolloutConfig) -> LightningStore:
    """The same store, with ``config`` for every rollout that is created without one of its own."""
    return cast("LightningStore", _Configured(store, config))


def with_reward_observer(store: LightningStore, observe: Callable[[str, float], None]) -> LightningStore:
    """The same store; ``observe(rollout_id, reward)`` is called for each final reward read through ``query_spans``.

    The reward that the algorithm sees is the one that is shown: watching costs the store no query.
    """
    return cast("LightningStore", _Observed(store, observe))


class Forwarding:
    """Hands everything through to the wrapped store."""

    def __init__(self, store: LightningStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled, before there is a store to ask
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._store, name)


LightningStore.register(Forwarding)


class _Configured(Forwarding):
    def __init__(self, store: LightningStore, config: RolloutConfig) -> None:
        super().__init__(store)
        self._config = config

    async def enqueue_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: JsonObject | None = None,
        **more: Any,
    ) -> Rollout:
        return await self._store.enqueue_rollout(input, mode, resources_id, config or self._config, metadata, **more)

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        filled = [
            each if each.config is not None else each.model_copy(update={"config": self._config}) for each in rollouts
        ]
        return await self._store.enqueue_many_rollouts(filled)

    async def start_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: JsonObject | None = None,
        worker_id: str | None = None,
        **more: Any,
    ) -> AttemptedRollout:
        return await self._store.start_rollout(
            input, mode, resources_id, config or self._config, metadata, worker_id, **more
        )


class _Observed(Forwarding):
    def __init__(self, store: LightningStore, observe: Callable[[str, float], None]) -> None:
        super().__init__(store)
        self._observe = observe

    async def query_spans(
        self, rollout_id: str, attempt_id: str | Literal["latest"] | None = None, **filters: Any
    ) -> PaginatedResult[Span]:
        spans = await self._store.query_spans(rollout_id, attempt_id, **filters)
        reward = find_final_reward(spans)
        if reward is not None:
            self._observe(rollout_id, reward)
        return spans
