"""Waiting for rollouts: told by events, in time, for nothing but the answer."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.backend import FileBackend, SqliteBackend
from agentlightning.types import AttemptedRollout, Rollout
from scenes import claimed, config, enqueued, finish, rollout_in, rollout_now, settled, started
from stores import ProcessStores, Stores

LONG = 60.0
"""Seconds. A wait that is so long and is not woken makes its test fail by time-out."""
MANY = 1000


async def _ids(waiting: Awaitable[Sequence[Rollout]]) -> list[str]:
    return [rollout.rollout_id for rollout in await waiting]


@pytest.mark.parametrize("timeout", [None, 0, 5.0])
async def test_what_has_ended_before_is_there_at_once(stores: Stores, timeout: float | None) -> None:
    async with stores.open() as (store, _):
        ids = [(await rollout_in(store, status)).rollout_id for status in ("succeeded", "failed", "cancelled")]
        waited = await store.wait_for_rollouts(rollout_ids=ids[::-1], timeout=timeout)
        assert waited == [await rollout_now(store, rollout_id) for rollout_id in ids[::-1]]
        assert isinstance(waited[1], AttemptedRollout)


@pytest.mark.parametrize("timeout", [0, -1, 0.05])
async def test_when_the_time_is_up_it_returns_what_has_ended(stores: Stores, timeout: float) -> None:
    async with stores.open() as (store, _):
        one, two, three = await enqueued(store, 1, 2, 3)
        await store.cancel_rollout(three)
        await store.cancel_rollout(one)
        before = time.monotonic()
        assert await _ids(store.wait_for_rollouts(rollout_ids=[three, two, one], timeout=timeout)) == [three, one]
        assert max(timeout, 0) <= time.monotonic() - before < 2


async def _succeed(store: LightningStore, claim: AttemptedRollout) -> None:
    await finish(store, claim)


async def _fail_for_good(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.update_rollout(claim.rollout_id, config=config(max_attempts=1))
    await finish(store, claim, "failed")


async def _set(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.update_rollout(claim.rollout_id, status="succeeded")


async def _cancel(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.cancel_rollout(claim.rollout_id)


async def _lose(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.update_rollout(claim.rollout_id, config=config(max_attempts=1))
    await store.report_worker_lost("worker", message="killed")


@pytest.mark.parametrize("end", [_succeed, _fail_for_good, _set, _cancel, _lose])
async def test_however_a_rollout_ends_those_who_wait_are_told(
    stores: Stores, end: Callable[[LightningStore, AttemptedRollout], Awaitable[None]]
) -> None:
    async with stores.open() as (store, _):
        claim = await started(store, "worker")
        waiting = [
            asyncio.create_task(store.wait_for_rollouts(rollout_ids=[claim.rollout_id], timeout=timeout))
            for timeout in (None, LONG)
        ]
        await settled()
        await end(store, claim)
        for task in waiting:
            assert await task == [await rollout_now(store, claim.rollout_id)]


async def test_it_waits_for_the_last_one_and_through_retries(stores: Stores) -> None:
    async with stores.open() as (store, _):
        ids = await enqueued(store, 1, 2, config=config())
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=ids, timeout=LONG))
        one, two = await store.dequeue_many_rollouts(limit=2)
        await finish(store, two)
        await finish(store, one, "failed")
        await settled()
        assert not waiting.done()
        await finish(store, await claimed(store))
        assert [rollout.status for rollout in await waiting] == ["succeeded", "succeeded"]


async def test_unknown_ids_are_passed_over(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [known] = await enqueued(store, 1)
        assert await store.wait_for_rollouts(rollout_ids=["ro-unknown", "???", ""]) == []
        assert await store.wait_for_rollouts(rollout_ids=[]) == []
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=["ro-unknown", known, known]))
        await settled()
        await store.cancel_rollout(known)
        assert await _ids(waiting) == [known]


async def test_a_wait_that_is_cancelled_leaves_others_alone(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, 1)
        first, second = (
            asyncio.create_task(store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=LONG)) for _ in range(2)
        )
        await settled()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await store.cancel_rollout(rollout_id)
        assert await _ids(second) == [rollout_id]


async def test_one_loop_waits_for_what_ends_in_another(stores: Stores) -> None:
    async with stores.open() as (store, _):
        ids = await enqueued(store, *range(20))

        async def cancel_all() -> None:
            await asyncio.gather(*(store.cancel_rollout(rollout_id) for rollout_id in ids))

        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=ids, timeout=LONG))
        await settled()
        ending = threading.Thread(target=lambda: asyncio.run(cancel_all()))
        ending.start()
        assert await _ids(waiting) == ids
        ending.join()


async def test_a_rollout_deleted_while_others_are_waited_for_has_ended_still(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        one, two = await enqueued(store, 1, 2)
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[one, two], timeout=LONG))
        await settled()
        await store.cancel_rollout(one)
        clock.advance(10)
        assert await store.delete_finished_rollouts(older_than_seconds=5) == 1
        await store.cancel_rollout(two)
        assert await _ids(waiting) == [one, two]


@pytest.mark.parametrize(
    ("rollout_ids", "timeout"),
    [("ro-1", 0), ([1], 0), (None, 0), (["\ud800"], 0), (["x"] * 10_001, 0), ([], float("nan")), ([], "1"), ([], True)],
    ids=lambda value: str(value)[:20],
)
async def test_bad_waits_are_refused(stores: Stores, rollout_ids: Any, timeout: Any) -> None:
    async with stores.open() as (store, _):
        with pytest.raises(InvalidValue):
            await store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout)


async def test_a_thousand_are_known_within_20_ms_of_the_last_end(stores: Stores) -> None:
    """The best of a few tries: what is measured is the store, not what else the machine does."""
    async with stores.open() as (store, _):
        delays: list[float] = []
        for _attempt in range(5):
            ids = await enqueued(store, *range(MANY))
            waiting = asyncio.create_task(_returned_at(store, ids))
            await settled()
            await asyncio.gather(*(store.cancel_rollout(rollout_id) for rollout_id in ids[1:]))
            assert not waiting.done()
            gc.collect()
            await store.cancel_rollout(ids[0])
            last_end = time.perf_counter()
            delays.append(await waiting - last_end)
            if delays[-1] < 0.02:
                break
        assert min(delays) < 0.02, delays


async def _returned_at(store: LightningStore, ids: list[str]) -> float:
    waited = await store.wait_for_rollouts(rollout_ids=ids, timeout=LONG)
    now = time.perf_counter()
    assert len(waited) == MANY
    return now


# --- What waiting costs: whatever runs is counted, so that the answer does not depend on the machine's speed -------

CALLERS = 20
OWN_CALLBACKS = 2
"""What the event loop runs for one ``asyncio.sleep`` of the test itself: the timer, and the test that it wakes."""
WINDOWS = 20


class Activity:
    """Counts what event loops run in this process, and what stores are asked to do, on whatever thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.callbacks = 0
        self.operations = 0
        self._replace = monkeypatch.setattr
        self._count(asyncio.Handle, "_run", "callbacks")
        for backend in (SqliteBackend, FileBackend):
            for method in ("write", "write_blocking", "read"):
                self._count(backend, method, "operations")

    def _count(self, owner: type, method: str, counter: str) -> None:
        original = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, counter, getattr(self, counter) + 1)
            return original(*args, **kwargs)

        self._replace(owner, method, counted)

    async def in_a_while(self) -> tuple[int, int]:
        """How many callbacks and operations ran while this test did nothing."""
        before = self.callbacks, self.operations
        await asyncio.sleep(0.5)
        return self.callbacks - before[0], self.operations - before[1]

    async def ceases(self) -> bool:
        """Whether there comes a time, after all calls have arrived, when nothing runs but this test."""
        for _ in range(WINDOWS):
            callbacks, operations = await self.in_a_while()
            if callbacks <= OWN_CALLBACKS and operations == 0:
                return True
        return False


@pytest.fixture
def activity(monkeypatch: pytest.MonkeyPatch) -> Activity:
    return Activity(monkeypatch)


async def test_while_callers_wait_nothing_runs(stores: Stores, activity: Activity) -> None:
    async with stores.open_in_real_time() as store:
        ids = await enqueued(store, *range(MANY), config=config(unresponsive_seconds=600, timeout_seconds=1000))
        await store.dequeue_many_rollouts(limit=MANY, worker_id="worker")
        await store.update_worker("worker", lease_seconds=300)
        waiting = [
            *(asyncio.create_task(store.wait_for_rollouts(rollout_ids=ids, timeout=LONG)) for _ in range(3)),
            *(asyncio.create_task(store.dequeue_rollout(f"w{n}", wait_seconds=LONG)) for n in range(CALLERS)),
        ]
        while (await store.query_workers(worker_id_contains="w", limit=1)).total < 1 + CALLERS:
            await asyncio.sleep(0.01)
        assert await activity.ceases()
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_wait_that_polls_would_be_noticed(stores: Stores, activity: Activity) -> None:
    async with stores.open_in_real_time() as store:
        [rollout_id] = await enqueued(store, 1)
        assert await activity.ceases()

        async def poll() -> None:
            while (await rollout_now(store, rollout_id)).status != "succeeded":
                await asyncio.sleep(0.01)

        polling = asyncio.create_task(poll())
        callbacks, operations = await activity.in_a_while()
        assert callbacks > OWN_CALLBACKS
        assert operations > 0 or isinstance(stores, ProcessStores)  # whose operations run elsewhere
        polling.cancel()
        await asyncio.wait([polling])
