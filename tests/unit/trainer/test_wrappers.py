"""What the trainer puts between algorithm and store, with a real store behind it."""

from __future__ import annotations

import pickle
from typing import Any, cast

import agentlightning as agl
from agentlightning.trainer.roles import DEFAULT_ROLLOUT_CONFIG, algorithm_store
from agentlightning.types import AttemptStatus, EnqueueRolloutRequest, RolloutConfig, RolloutStatus, Span

MINE = RolloutConfig(max_attempts=7, retry_condition=["failed"])


def reward_span(rollout: agl.AttemptedRollout, value: float) -> Span:
    return Span.from_attributes(
        name="agentlightning.annotation",
        rollout_id=rollout.rollout_id,
        attempt_id=rollout.attempt.attempt_id,
        attributes={"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": value},
    )


async def test_rollouts_without_a_config_get_the_default() -> None:
    async with agl.InMemoryLightningStore() as inner:
        store = algorithm_store(inner, DEFAULT_ROLLOUT_CONFIG)
        plain = await store.enqueue_rollout({"x": 1}, mode="train", rollout_id="ro-plain", priority=3)
        many = await store.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input=1), EnqueueRolloutRequest(input=2, config=MINE)]
        )
        started = await store.start_rollout({"x": 2}, attempt_id="at-1")
        assert plain.config == many[0].config == started.config == DEFAULT_ROLLOUT_CONFIG
        assert (plain.rollout_id, plain.priority, plain.mode) == ("ro-plain", 3, "train")
        assert many[1].config == MINE


async def test_a_config_of_ones_own_is_kept() -> None:
    async with agl.InMemoryLightningStore() as inner:
        store = algorithm_store(inner, DEFAULT_ROLLOUT_CONFIG)
        own = await store.enqueue_rollout(1, config=RolloutConfig())
        assert own.config == RolloutConfig()
        assert (await store.start_rollout(1, config=MINE)).config == MINE


async def test_the_default_retries_lost_workers_and_not_errors() -> None:
    async with agl.InMemoryLightningStore() as inner:
        store = algorithm_store(inner, DEFAULT_ROLLOUT_CONFIG)
        ends: list[tuple[AttemptStatus, RolloutStatus]] = [
            ("unresponsive", "requeuing"),
            ("timeout", "requeuing"),
            ("failed", "failed"),
        ]
        for status, then in ends:
            started = await store.start_rollout(1)
            await store.update_attempt(started.rollout_id, started.attempt.attempt_id, status=status)
            rollout = await store.get_rollout_by_id(started.rollout_id)
            assert rollout is not None
            assert rollout.status == then


async def test_everything_else_goes_through() -> None:
    async with agl.InMemoryLightningStore() as inner:
        seen: list[tuple[str, float]] = []
        store = algorithm_store(inner, MINE, lambda rollout_id, reward: seen.append((rollout_id, reward)))
        assert isinstance(store, agl.LightningStore)
        assert store.capabilities == inner.capabilities
        assert (await store.statistics())["total_rollouts"] == 0
        assert (await store.verify()).ok
        await store.enqueue_rollout("task")
        claimed = await store.dequeue_rollout(worker_id="w")
        assert claimed is not None
        assert claimed.config == MINE
        assert list(await store.query_spans(claimed.rollout_id)) == []
        assert seen == []
        await store.add_span(reward_span(claimed, 0.25))
        spans = await store.query_spans(claimed.rollout_id, "latest")
        assert len(spans) == 1
        assert seen == [(claimed.rollout_id, 0.25)]


def test_a_wrapper_of_something_picklable_is_picklable() -> None:
    store = pickle.loads(pickle.dumps(algorithm_store({"stands for": "a client"}, MINE)))  # type: ignore[arg-type]
    assert store.keys() == {"stands for"}


async def test_a_server_of_the_algorithms_store_keeps_its_fast_path_and_the_default_config() -> None:
    async with agl.InMemoryLightningStore() as inner:
        store = algorithm_store(inner, MINE, lambda *_: None)
        in_json = cast("Any", store).answering_in_json()
        made = await in_json.enqueue_rollout("task", rollout_id="ro-1")
        assert isinstance(made, bytes)
        kept = await inner.get_rollout_by_id("ro-1")
        assert kept is not None
        assert kept.config == MINE
