"""A run that is stopped: the algorithm's side, with the model that it serves, stays for runners that finish."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.execution.base import ThreadingEvent
from algorithm_roles import algorithm_role


class Watched(agl.InMemoryLightningStore):
    """Tells when it is asked what still runs."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def query_rollouts(self, **arguments: Any) -> Any:
        if "running" in (arguments.get("status_in") or ()):
            self.asked.set()
        return await super().query_rollouts(**arguments)


class Endless(agl.Algorithm):
    """Notes, when it is cancelled, what has become of the rollouts."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.left: list[str] | None = None

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left = [each.status for each in await self.get_store().query_rollouts()]


@pytest.mark.parametrize("by", ["event", "cancel"])
async def test_the_algorithm_stays_until_nothing_runs(by: str) -> None:
    event, algorithm = ThreadingEvent(), Endless()
    async with Watched() as store:
        held = await store.start_rollout("a task")
        side = asyncio.create_task(algorithm_role(algorithm, linger_seconds=60.0)(store, event))
        await algorithm.begun.wait()
        if by == "event":
            event.set()
        else:
            side.cancel()
        await store.asked.wait()
        assert algorithm.left is None
        await store.update_attempt(held.rollout_id, held.attempt.attempt_id, status="succeeded")
        await asyncio.wait([side])
    assert algorithm.left == ["succeeded"]
    assert side.cancelled() == (by == "cancel")


async def test_it_does_not_stay_longer_than_it_may() -> None:
    event, algorithm = ThreadingEvent(), Endless()
    async with Watched() as store:
        await store.start_rollout("a task")
        event.set()
        await algorithm_role(algorithm)(store, event)
    assert algorithm.left == ["preparing"]


@pytest.mark.parametrize(
    ("strategy", "seconds"),
    [
        (agl.ClientServerExecutionStrategy(graceful_timeout=10.0), 8.0),
        (agl.ClientServerExecutionStrategy(role="algorithm", managed_store=False), 0.0),
        (agl.SharedMemoryExecutionStrategy(graceful_delay=5.0), 4.0),
    ],
    ids=["cs", "store of others", "shm"],
)
def test_the_strategy_says_how_long(strategy: agl.ExecutionStrategy, seconds: float) -> None:
    assert strategy.linger_seconds() == seconds
