"""When a worker may claim ahead, and for how long it holds what it has claimed; all times are the test's."""

from __future__ import annotations

from agentlightning.runner.worker_loop import PREFETCH_HOLD_SECONDS, SHORT_RUNS, SHORT_SECONDS, Prefetch
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import AttemptedRollout
from scenes import claimed, enqueued


async def claims(number: int) -> list[AttemptedRollout]:
    async with InMemoryLightningStore() as store:
        await enqueued(store, *range(number))
        return [await claimed(store) for _ in range(number)]


def ready() -> Prefetch:
    """One that has seen enough short agents."""
    prefetch = Prefetch(allowed=True)
    for _ in range(SHORT_RUNS):
        prefetch.note_run(SHORT_SECONDS)
    return prefetch


def test_only_after_short_agents() -> None:
    prefetch = Prefetch(allowed=True)
    seen: list[int] = []
    for _ in range(SHORT_RUNS):
        seen.append(prefetch.extra)
        prefetch.note_run(SHORT_SECONDS)
    assert (set(seen), prefetch.extra) == ({0}, 1)
    prefetch.note_run(SHORT_SECONDS * 1.01)
    assert prefetch.extra == 0


def test_never_for_a_store_that_cannot_take_a_claim_back() -> None:
    prefetch = Prefetch(allowed=False)
    for _ in range(100):
        prefetch.note_run(0.0)
    assert prefetch.extra == 0


async def test_held_in_the_order_of_the_claims() -> None:
    prefetch, (first, second) = ready(), await claims(2)
    prefetch.add(first, now=10.0)
    prefetch.add(second, now=10.1)
    assert (len(prefetch), prefetch.take(), len(prefetch)) == (2, first, 1)
    assert prefetch.clear() == [second]
    assert not prefetch


async def test_held_for_a_short_time() -> None:
    prefetch, (first, second) = ready(), await claims(2)
    prefetch.add(first, now=10.0)
    prefetch.add(second, now=10.1)
    assert prefetch.overdue(10.0 + PREFETCH_HOLD_SECONDS * 0.99) == []
    assert prefetch.extra == 1
    assert prefetch.overdue(10.0 + PREFETCH_HOLD_SECONDS * 1.01) == [first]
    assert prefetch.extra == 0, "an agent turned out slow"
    assert prefetch.overdue(10.1 + PREFETCH_HOLD_SECONDS * 1.01) == [second]
