"""The store as an algorithm sees it: with a default rollout config, and with everything else passed through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import Any, Literal, cast

from agentlightning.algorithm.run import ProxyMove
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

_READS = ("get_rollout_by_id", "query_rollouts", "get_latest_attempt", "query_attempts", "statistics")
"""With which an algorithm can see how far its rollouts are without waiting for them; `query_spans` is one, too."""


def algorithm_store(
    store: LightningStore,
    config: RolloutConfig,
    observe: Callable[[str, float], None] | None = None,
    move: ProxyMove | None = None,
) -> LightningStore:
    """Return a store that passes everything on to ``store``, also what ``store`` offers beyond the contract.

    Args:
        store: where everything is kept.
        config: for every rollout that is created without one.
        observe: called as ``observe(rollout_id, reward)`` for each final reward read by `query_spans`. Progress shows
            the rewards that the algorithm sees, without a query of its own.
        move: of a run that may be resumed: is awaited before the algorithm's first request for rollouts.
    """
    return cast("LightningStore", _AlgorithmStore(store, config, observe, move))


class _AlgorithmStore:
    def __init__(
        self,
        store: LightningStore,
        config: RolloutConfig,
        observe: Callable[[str, float], None] | None,
        move: ProxyMove | None,
    ) -> None:
        self._store = store
        self._config = config
        self._observe = observe
        self._move = move
        self._questions: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pickle asks for special methods before there is a store to ask
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = getattr(self._store, name)
        if name == "answering_in_json":
            view = found()
            return lambda: None if view is None else self._around(view)
        if name in _READS and self._move is not None and not self._move.done:
            return self._watched(name, found)
        return found

    def _around(self, json_store: LightningStore | None) -> _AlgorithmStore | None:
        """Return the same around the store's view for servers, so that a server of this store keeps its fast path.

        Rewards are not observed there, because replies of that view are bytes.
        """
        if json_store is None:
            return None
        same = copy(self)
        same._store, same._observe = json_store, None
        return same

    def _watched(self, name: str, read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def watched(*args: Any, **more: Any) -> Any:
            await self._note_question(name, *args, more)
            return await read(*args, **more)

        return watched

    async def _note_question(self, *question: Any) -> None:
        """Let the store hand out rollouts if a question is asked twice: the algorithm polls for something to happen.

        The first time it may only look whether a rollout exists, before its models are served.
        """
        if self._move is None or self._move.done:
            return
        if repr(question) in self._questions:
            await self.wait_for_rollouts(rollout_ids=[], timeout=0)
        self._questions.add(repr(question))

    async def enqueue_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: JsonObject | None = None,
        **more: Any,
    ) -> Rollout:
        if self._move is not None:
            await self._move.ensure()
        return await self._store.enqueue_rollout(input, mode, resources_id, config or self._config, metadata, **more)

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        if self._move is not None:
            await self._move.ensure()
        return await self._store.enqueue_many_rollouts(
            [each if each.config is not None else each.model_copy(update={"config": self._config}) for each in rollouts]
        )

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

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        if self._move is not None:
            await self._move.ensure()
        return await self._store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout)

    async def query_spans(
        self, rollout_id: str, attempt_id: str | Literal["latest"] | None = None, **filters: Any
    ) -> PaginatedResult[Span]:
        await self._note_question("query_spans", rollout_id, attempt_id, filters)
        spans = await self._store.query_spans(rollout_id, attempt_id, **filters)
        reward = None if self._observe is None else find_final_reward(spans)
        if self._observe is not None and reward is not None:
            self._observe(rollout_id, reward)
        return spans


LightningStore.register(_AlgorithmStore)
