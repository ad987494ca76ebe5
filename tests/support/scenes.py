"""Short ways to bring a store into the state that a test is about."""

from __future__ import annotations

import asyncio
from typing import Any

from agentlightning.store.base import LightningStore
from agentlightning.types import (
    LLM,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EnqueueRolloutRequest,
    PromptTemplate,
    Rollout,
    RolloutConfig,
    RolloutStatus,
    Span,
)

__all__ = [
    "ANY_LEASE",
    "attempts_of",
    "claimed",
    "config",
    "deep",
    "enqueued",
    "finish",
    "llm",
    "prompt",
    "requests",
    "requeued_silent",
    "rollout_in",
    "rollout_now",
    "settled",
    "span_of",
    "started",
    "statuses",
]

ANY_LEASE = 120.0
"""Seconds: longer than any confirmation lease."""


def config(**fields: Any) -> RolloutConfig:
    """A config that retries everything that may be retried, three attempts in all, unless told otherwise."""
    everything = {"max_attempts": 3, "retry_condition": ["failed", "timeout", "unresponsive"]}
    return RolloutConfig(**(everything | fields))


def requests(*inputs: Any, **fields: Any) -> list[EnqueueRolloutRequest]:
    """One request for each input."""
    return [EnqueueRolloutRequest(input=each, **fields) for each in inputs]


def prompt(template: str) -> PromptTemplate:
    return PromptTemplate(template=template, engine="f-string")


def llm(**sampling_parameters: Any) -> LLM:
    return LLM(endpoint="http://localhost:8000/v1", model="m", sampling_parameters=sampling_parameters)


def span_of(attempted: AttemptedRollout, **fields: Any) -> Span:
    """A span of the attempt, with a new span id and no sequence id unless given."""
    ids: dict[str, Any] = {"rollout_id": attempted.rollout_id, "attempt_id": attempted.attempt.attempt_id}
    return Span.from_attributes(**({"attributes": {"k": "v"}, **ids} | fields))


def deep(levels: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


async def settled() -> None:
    """Let every task of this loop get as far as it can without outside help."""
    for _ in range(50):
        await asyncio.sleep(0)


# --- Making ----------------------------------------------------------------------------------------


async def enqueued(store: LightningStore, *inputs: Any, **fields: Any) -> list[str]:
    """The ids of new rollouts in the queue, one for each input."""
    return [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests(*inputs, **fields))]


async def started(store: LightningStore, worker_id: str | None = None, **config_fields: Any) -> AttemptedRollout:
    """A new rollout whose first attempt is ``preparing``."""
    return await store.start_rollout("input", config=config(**config_fields), worker_id=worker_id)


async def claimed(store: LightningStore, worker_id: str | None = None, **arguments: Any) -> AttemptedRollout:
    """The next rollout of the queue, which must not be empty."""
    claim = await store.dequeue_rollout(worker_id, **arguments)
    assert claim is not None
    return claim


async def finish(store: LightningStore, attempted: AttemptedRollout, status: AttemptStatus = "succeeded") -> Attempt:
    return await store.update_attempt(attempted.rollout_id, attempted.attempt.attempt_id, status)


async def requeued_silent(store: LightningStore, clock: Any, worker_id: str | None = "silent") -> AttemptedRollout:
    """A running attempt fell silent, and its rollout waits to be retried."""
    silent = await started(store, worker_id, unresponsive_seconds=5)
    await store.add_span(span_of(silent))
    clock.advance(5)
    assert await statuses(store, silent.rollout_id) == ("requeuing", ["unresponsive"])
    return silent


async def rollout_in(store: LightningStore, status: RolloutStatus) -> Rollout:
    """A rollout that stands there, the only one in the store. It has attempts, unless it is ``queuing``."""
    rollout_id = (await store.enqueue_rollout("input", config=config())).rollout_id
    if status == "queuing":
        return await rollout_now(store, rollout_id)
    attempted = await claimed(store)
    match status:
        case "preparing":
            pass
        case "running":
            await finish(store, attempted, "running")
        case "requeuing":
            await finish(store, attempted, "failed")
        case "succeeded":
            await finish(store, attempted)
        case "failed":
            await store.update_rollout(rollout_id, status="failed")
        case "cancelled":
            await store.cancel_rollout(rollout_id)
    rollout = await rollout_now(store, rollout_id)
    assert rollout.status == status
    return rollout


# --- Looking ---------------------------------------------------------------------------------------


async def rollout_now(store: LightningStore, rollout_id: str) -> Rollout:
    rollout = await store.get_rollout_by_id(rollout_id)
    assert rollout is not None
    return rollout


async def attempts_of(store: LightningStore, rollout_id: str) -> list[Attempt]:
    return list(await store.query_attempts(rollout_id))


async def statuses(store: LightningStore, rollout_id: str) -> tuple[RolloutStatus, list[AttemptStatus]]:
    """The status of a rollout, and of all its attempts in order."""
    attempts: list[AttemptStatus] = [attempt.status for attempt in await attempts_of(store, rollout_id)]
    return (await rollout_now(store, rollout_id)).status, attempts
