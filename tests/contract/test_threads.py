"""Any thread and any event loop may call, many at once, also those that stop in the middle."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout
from scenes import claimed, enqueued, finish, rollout_now, span_of
from stores import Stores

T = TypeVar("T")
THREADS = 6
ROLLOUTS = 25


async def _in_threads(number: int, work: Callable[[int], Coroutine[Any, Any, T]]) -> list[T]:
    """Run ``work`` in so many threads, each with an event loop of its own, all starting at the same moment."""
    start = threading.Barrier(number)

    def run(index: int) -> T:
        start.wait()
        return asyncio.run(work(index))

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(number) as pool:
        return await asyncio.gather(*(loop.run_in_executor(pool, run, index) for index in range(number)))


async def _work_off(store: LightningStore, worker_id: str) -> list[str]:
    """Claim, trace and finish until the queue is empty; returns what was claimed."""
    done: list[str] = []
    while (claim := await store.dequeue_rollout(worker_id)) is not None:
        await asyncio.gather(*(store.add_span(span_of(claim)) for _ in range(2)))
        await finish(store, claim)
        done.append(claim.rollout_id)
    return done


async def test_each_rollout_is_claimed_once_by_many_loops(stores: Stores) -> None:
    async with stores.open() as (store, _):
        ids = await enqueued(store, *range(THREADS * ROLLOUTS))
        done = await _in_threads(THREADS, lambda index: _work_off(store, f"w{index}"))
        assert sorted(rollout_id for each in done for rollout_id in each) == sorted(ids)
        statistics = await store.statistics()
        assert statistics["rollouts_by_status"]["succeeded"] == len(ids)
        assert statistics["total_spans"] == 2 * len(ids)
        assert statistics["total_workers"] == THREADS


async def test_all_operations_at_once_from_many_loops(stores: Stores) -> None:
    async def everything(store: LightningStore, index: int) -> None:
        for number in range(10):
            await store.update_resources("rs-shared", {})
            claim = await store.start_rollout(number, worker_id=f"w{index}")
            await asyncio.gather(
                store.add_many_spans([span_of(shared), span_of(claim)]),
                store.update_worker(f"w{index}", {"n": number}, attempt_ids=[claim.attempt.attempt_id]),
                store.query_rollouts(limit=5, sort_by="start_time"),
                store.query_spans(shared.rollout_id, "latest"),
                store.enqueue_rollout(number, priority=number),
                store.get_next_span_sequence_id(shared.rollout_id, shared.attempt.attempt_id),
                store.statistics(),
            )
            await store.cancel_rollout(claim.rollout_id)
            assert [each.status for each in await store.wait_for_rollouts(rollout_ids=[claim.rollout_id])] == [
                "cancelled"
            ]

    async with stores.open() as (store, _):
        shared = await store.start_rollout("shared")
        await _in_threads(THREADS, lambda index: everything(store, index))
        latest = await store.get_latest_resources()
        assert latest is not None
        assert latest.version == THREADS * 10
        spans = await store.query_spans(shared.rollout_id)
        issued = [span.sequence_id for span in spans]
        assert len(issued) == len(set(issued)) == THREADS * 10
        next_id = await store.get_next_span_sequence_id(shared.rollout_id, shared.attempt.attempt_id)
        assert next_id == 2 * THREADS * 10 + 1


async def test_more_calls_at_once_than_any_batch_holds(stores: Stores) -> None:
    async with stores.open() as (store, _):
        rollouts = await asyncio.gather(*(store.enqueue_rollout(n) for n in range(3000)))
        assert len({rollout.rollout_id for rollout in rollouts}) == 3000
        assert (await store.query_rollouts(limit=1)).total == 3000


async def test_long_polls_of_many_loops_share_what_comes(stores: Stores) -> None:
    async with stores.open() as (store, _):
        polling = asyncio.create_task(
            _in_threads(THREADS, lambda index: claimed(store, f"w{index}", wait_seconds=60.0)),
        )
        while (await store.statistics())["total_workers"] < THREADS:
            await asyncio.sleep(0)
        ids = await enqueued(store, *range(THREADS))
        assert sorted(claim.rollout_id for claim in await polling) == sorted(ids)


async def test_a_loop_that_stands_still_holds_up_no_other(stores: Stores) -> None:
    async with stores.open() as (store, _):
        mine = asyncio.create_task(store.enqueue_rollout("mine"))
        await asyncio.sleep(0)
        # This loop stands still, with an operation in the queue, while another one works.
        results: list[Any] = []
        other = threading.Thread(target=lambda: results.append(asyncio.run(enqueued(store, *range(3)))))
        other.start()
        other.join(30)
        assert len(results) == 1
        assert (await mine).input == "mine"
        assert (await store.query_rollouts()).total == 4


async def _abandon_loop(store: LightningStore, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Begin ``work`` on a loop of its own, and close that loop before it can hear of the outcome."""

    def run() -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _loop, _context: None)  # of the task that is lost with the loop

        async def begin() -> None:
            loop.create_task(work())  # noqa: RUF006 - to be lost is what it is for
            await asyncio.sleep(0)

        loop.run_until_complete(begin())
        loop.close()

    await asyncio.to_thread(run)


async def test_a_loop_that_is_closed_leaves_the_store_in_order(stores: Stores) -> None:
    async with stores.open() as (store, _):
        for number in range(5):
            await _abandon_loop(store, lambda n=number: store.enqueue_rollout(n, rollout_id=f"ro-{n}"))
        [later] = await enqueued(store, "later")
        assert [each.rollout_id for each in await store.query_rollouts()] == [*(f"ro-{n}" for n in range(5)), later]


async def test_waiting_on_a_loop_that_is_closed_harms_nobody(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, 1)
        await claimed(store)
        for wait in (
            lambda: store.wait_for_rollouts(rollout_ids=[rollout_id]),
            lambda: store.dequeue_rollout(wait_seconds=60),
        ):
            await _abandon_loop(store, wait)
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=30))
        await asyncio.sleep(0)
        await store.cancel_rollout(rollout_id)
        assert len(await waiting) == 1
        await enqueued(store, 2)
        assert isinstance(await store.dequeue_rollout(wait_seconds=30), AttemptedRollout)


async def test_the_operation_of_a_cancelled_caller_still_commits(stores: Stores) -> None:
    async with stores.open() as (store, _):
        calling = asyncio.create_task(store.enqueue_rollout("input", rollout_id="ro-1"))
        await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await enqueued(store, "next")
        assert (await rollout_now(store, "ro-1")).input == "input"


def test_one_loop_after_another(stores: Stores) -> None:
    loops = asyncio.Runner()
    context = stores.open()
    store, _ = loops.run(context.__aenter__())
    for number in range(3):
        asyncio.run(enqueued(store, number))
    assert [asyncio.run(claimed(store)).input for _ in range(3)] == [0, 1, 2]
    loops.run(context.__aexit__(None, None, None))
    loops.close()
