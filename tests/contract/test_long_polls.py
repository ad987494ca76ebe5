"""Claims that wait: woken by whatever fills the queue, never sleeping through it, and never for nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from agentlightning.errors import StoreClosed
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout
from scenes import claimed, enqueued, finish, settled, span_of, started, statuses
from stores import Stores

LONG = 60.0
"""Seconds. A claim that waits for so long and is not woken makes its test fail by time-out."""


async def _enqueue(store: LightningStore, _held: AttemptedRollout) -> None:
    await store.enqueue_rollout("new")


async def _fail_to_be_retried(store: LightningStore, held: AttemptedRollout) -> None:
    await finish(store, held, "failed")


async def _put_back(store: LightningStore, held: AttemptedRollout) -> None:
    await store.update_rollout(held.rollout_id, status="requeuing")


async def _lose_the_worker(store: LightningStore, _held: AttemptedRollout) -> None:
    await store.report_worker_lost("holder", message="it was killed")


@pytest.mark.parametrize("fill", [_enqueue, _fail_to_be_retried, _put_back, _lose_the_worker])
async def test_whatever_fills_the_queue_wakes_a_waiting_claim(
    stores: Stores, fill: Callable[[LightningStore, AttemptedRollout], Awaitable[None]]
) -> None:
    async with stores.open() as (store, _):
        held = await started(store, "holder")
        waiting = asyncio.create_task(store.dequeue_rollout("waiter", wait_seconds=LONG))
        await settled()
        await fill(store, held)
        claim = await waiting
        assert claim is not None
        assert (claim.status, claim.attempt.status, claim.attempt.worker_id) == ("preparing", "preparing", "waiter")


async def test_an_expiry_that_nobody_asks_about_wakes_a_waiting_claim(stores: Stores) -> None:
    async with stores.open_in_real_time() as store:
        before = time.monotonic()
        silent = await started(store, unresponsive_seconds=0.2)
        again = await claimed(store, wait_seconds=LONG)
        assert again.rollout_id == silent.rollout_id
        assert again.attempt.sequence_id == 2
        assert 0.2 <= time.monotonic() - before < LONG


async def test_it_takes_at_once_what_is_there(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2, 3)
        claims = await store.dequeue_many_rollouts(limit=5, wait_seconds=LONG)
        assert [claim.input for claim in claims] == [1, 2, 3]


@pytest.mark.parametrize("request_id", [None, "rq-1"])
async def test_it_gives_up_when_its_time_is_up(stores: Stores, request_id: str | None) -> None:
    async with stores.open() as (store, _):
        before = time.monotonic()
        assert await store.dequeue_rollout("worker", request_id=request_id, wait_seconds=0.1) is None
        assert 0.1 <= time.monotonic() - before < 1
        assert await store.dequeue_many_rollouts(limit=3, request_id=request_id, wait_seconds=0.01) == []
        assert await store.dequeue_rollout(request_id=request_id, wait_seconds=-1) is None


async def test_each_rollout_wakes_one_of_many(stores: Stores) -> None:
    async with stores.open() as (store, _):
        waiting = {asyncio.create_task(store.dequeue_rollout(wait_seconds=LONG)) for _ in range(5)}
        await settled()
        await enqueued(store, 1, 2)
        done, waiting = await _first(2, waiting)
        await enqueued(store, 3, 4, 5)
        more, waiting = await _first(3, waiting)
        assert sorted(found.input for task in done | more if (found := task.result())) == [1, 2, 3, 4, 5]
        assert not waiting


@pytest.mark.parametrize("own_ids", [False, True])
async def test_a_waiter_that_is_cancelled_passes_its_call_on(stores: Stores, own_ids: bool) -> None:
    """Also if the claim was made for it already, without waiting for the end of a lease."""
    async with stores.open() as (store, _):
        first = asyncio.create_task(store.dequeue_rollout(request_id="rq-1" if own_ids else None, wait_seconds=LONG))
        await settled()
        second = asyncio.create_task(store.dequeue_rollout(request_id="rq-2" if own_ids else None, wait_seconds=LONG))
        await settled()
        # This loop stands still meanwhile, so that the first waiter is called and cannot answer.
        filling = threading.Thread(target=lambda: asyncio.run(enqueued(store, "work")))
        filling.start()
        filling.join()
        first.cancel()
        claim = await second
        assert claim is not None
        assert claim.input == "work"
        assert first.cancelled()


@pytest.mark.parametrize("request_id", [None, "rq-1"])
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 8, 30])
async def test_a_claim_that_is_cancelled_loses_nothing(stores: Stores, turns: int, request_id: str | None) -> None:
    """However far it has come."""
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, "work")
        claiming = asyncio.create_task(store.dequeue_rollout("worker", request_id=request_id, wait_seconds=LONG))
        for _ in range(turns):
            await asyncio.sleep(0)
        claiming.cancel()
        await asyncio.wait([claiming])
        if not claiming.cancelled():
            return
        claim = await store.dequeue_rollout("worker", request_id=request_id, wait_seconds=LONG)
        claim = claim or await claimed(store, "worker", wait_seconds=LONG)  # what was given back is not the request's
        assert claim.rollout_id == rollout_id


async def test_a_waiter_that_is_cancelled_before_takes_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        waiting = asyncio.create_task(store.dequeue_rollout(wait_seconds=LONG))
        await settled()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await enqueued(store, "work")
        assert (await claimed(store)).input == "work"


async def test_a_second_claim_with_the_same_request_replaces_the_first(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = asyncio.create_task(store.dequeue_rollout("worker", request_id="rq-1", wait_seconds=LONG))
        other = asyncio.create_task(store.dequeue_rollout("worker", request_id="rq-2", wait_seconds=LONG))
        await _worker_waits(store)
        second = asyncio.create_task(store.dequeue_rollout("worker", request_id="rq-1", wait_seconds=LONG))
        assert await first is None
        assert not second.done()
        await enqueued(store, "a", "b")
        claims = [await other, await second]
        assert sorted(claim.input for claim in claims if claim) == ["a", "b"]


async def test_while_it_waits_its_worker_is_idle(stores: Stores) -> None:
    async with stores.open() as (store, _):
        waiting = asyncio.create_task(store.dequeue_rollout("worker", wait_seconds=LONG))
        await _worker_waits(store)
        [rollout_id] = await enqueued(store, "work")
        await waiting
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert (worker.status, worker.current_rollout_id) == ("busy", rollout_id)


async def test_one_that_waited_is_confirmed_like_any_other(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        waiting = asyncio.create_task(store.dequeue_rollout(request_id="rq-1", wait_seconds=LONG))
        await settled()
        [rollout_id] = await enqueued(store, "work")
        claim = await waiting
        assert claim is not None
        assert (await claimed(store, request_id="rq-1")).attempt == claim.attempt
        await store.add_span(span_of(claim))
        clock.advance(3600)
        assert await statuses(store, rollout_id) == ("running", ["running"])


async def test_a_store_that_closes_says_so_to_those_who_wait(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, "work")
        await claimed(store)
        waiting = [
            asyncio.create_task(store.dequeue_rollout(wait_seconds=LONG)),
            asyncio.create_task(store.wait_for_rollouts(rollout_ids=[rollout_id])),
        ]
        await settled()
    for task in waiting:
        with pytest.raises(StoreClosed):
            await task


async def _first(
    number: int, tasks: set[asyncio.Task[AttemptedRollout | None]]
) -> tuple[set[asyncio.Task[AttemptedRollout | None]], set[asyncio.Task[AttemptedRollout | None]]]:
    """Wait until exactly so many are done."""
    done: set[asyncio.Task[AttemptedRollout | None]] = set()
    while len(done) < number:
        newly, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done |= newly
    await settled()
    assert len(done) == number
    assert not any(task.done() for task in tasks)
    return done, tasks


async def _worker_waits(store: LightningStore) -> None:
    """Return when the worker's claim has found nothing, and waits."""
    while (worker := await store.get_worker_by_id("worker")) is None or worker.status != "idle":
        await asyncio.sleep(0)
    await settled()
