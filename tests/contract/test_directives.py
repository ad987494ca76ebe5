"""Drain and stop: what a worker is told, and that it gets no work from then on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from agentlightning.errors import InvalidId, InvalidValue, NotFound, NotJson
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker
from scenes import claimed, enqueued, finish, rollout_now, settled, started
from store_state import unchanged
from stores import Stores

LONG = 60.0
"""Seconds. A claim that waits for so long and is not ended makes its test fail by time-out."""


async def _registered(store: LightningStore, *worker_ids: str) -> None:
    for worker_id in worker_ids:
        await store.update_worker(worker_id, registration={"host": "here", "pid": 1})


async def _directive(store: LightningStore, worker_id: str = "worker") -> str | None:
    worker = await store.get_worker_by_id(worker_id)
    assert worker is not None
    return worker.directive


# --- Registration ----------------------------------------------------------------------------------


async def test_a_worker_is_shown_as_it_registered(stores: Stores) -> None:
    async with stores.open() as (store, _):
        told: dict[str, Any] = {"host": "here", "pid": 7, "labels": {"gpu": False}, "versions": ["1", 2.5, None]}
        worker = await store.update_worker("worker", registration=told)
        assert worker.registration == told
        await store.update_worker("worker", {"load": 1})
        assert (await store.query_workers()).items[0].registration == told


@pytest.mark.parametrize("registration", [None, [], "text", {"a": float("nan")}, {"a": object()}, {1: 2}])
async def test_a_registration_is_a_json_object(stores: Stores, registration: Any) -> None:
    async with stores.open() as (store, _), unchanged(store):
        with pytest.raises((NotJson, InvalidValue)):
            await store.update_worker("worker", registration=registration)


async def test_one_that_begins_anew_is_free_of_what_was_asked(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await _registered(store, "worker")
        await store.direct_workers("drain")
        again = await store.update_worker("worker", registration={"pid": 1, "host": "here"})
        assert again.directive == "drain"  # a repeat, whatever the order of its keys
        assert (await store.update_worker("worker")).directive == "drain"
        anew = await store.update_worker("worker", registration={"host": "here", "pid": 2})
        assert anew.directive is None
        await enqueued(store, "work")
        assert (await claimed(store, "worker")).input == "work"


# --- What is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("directive", ["drain", "stop"])
async def test_heartbeats_say_what_is_asked(stores: Stores, directive: Any) -> None:
    async with stores.open() as (store, _):
        await _registered(store, "worker", "other")
        asked = await store.direct_workers(directive, worker_ids=["worker"])
        assert [(each.worker_id, each.directive) for each in asked] == [("worker", directive)]
        assert (await store.update_worker("worker", attempt_ids=[])).directive == directive
        assert await _directive(store, "other") is None
        assert [each.worker_id for each in await store.direct_workers(None, worker_ids=["worker"])] == ["worker"]
        assert (await store.update_worker("worker")).directive is None


async def test_without_names_all_are_asked(stores: Stores) -> None:
    async with stores.open() as (store, _):
        assert await store.direct_workers("stop") == []
        await _registered(store, "one", "two", "three")
        await store.report_worker_lost("two", message="gone")
        asked = await store.direct_workers("stop")
        assert [(each.worker_id, each.directive) for each in asked] == [(n, "stop") for n in ("one", "two", "three")]
        await _registered(store, "late")
        assert await _directive(store, "late") is None
        async with unchanged(store):
            assert len(await store.direct_workers("stop", worker_ids=["one", "one", "two"])) == 2


async def test_an_unknown_worker_leaves_all_unasked(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await _registered(store, "worker")
        async with unchanged(store):
            with pytest.raises(NotFound):
                await store.direct_workers("stop", worker_ids=["worker", "unknown"])
            with pytest.raises(InvalidId):
                await store.direct_workers("stop", worker_ids=["no id"])
            with pytest.raises(InvalidValue):
                await store.direct_workers("pause")  # type: ignore[arg-type]
            assert await store.direct_workers("stop", worker_ids=[]) == []


# --- Claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("directive", ["drain", "stop"])
@pytest.mark.parametrize("request_id", [None, "rq-1"])
async def test_it_gets_no_work_and_does_not_wait(stores: Stores, directive: Any, request_id: str | None) -> None:
    async with stores.open() as (store, clock):
        await enqueued(store, "work")
        await _registered(store, "worker")
        await store.direct_workers(directive)
        clock.advance(60)
        assert await store.dequeue_many_rollouts(worker_id="worker", request_id=request_id, wait_seconds=LONG) == []
        assert await store.dequeue_rollout("worker", request_id=request_id) is None
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert (worker.status, worker.last_idle_time) == ("idle", clock.wall())
        assert (await claimed(store, "other")).input == "work"


async def test_a_claim_that_waits_ends_empty(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await _registered(store, "worker")
        told = asyncio.create_task(store.dequeue_many_rollouts(worker_id="worker", wait_seconds=LONG))
        other = asyncio.create_task(store.dequeue_rollout("other", wait_seconds=LONG))
        await settled()
        await store.direct_workers("drain", worker_ids=["worker"])
        assert await told == []
        assert not other.done()
        await enqueued(store, "work")
        claim = await other
        assert claim is not None
        assert claim.input == "work"


async def test_one_that_was_called_and_may_not_take_it_passes_the_call_on(stores: Stores) -> None:
    """It is called for a rollout, and asked to drain before it can look."""
    async with stores.open() as (store, _):
        await _registered(store, "worker")
        told = asyncio.create_task(store.dequeue_rollout("worker", wait_seconds=LONG))
        await settled()
        other = asyncio.create_task(store.dequeue_rollout("other", wait_seconds=LONG))
        await settled()

        async def fill_and_direct() -> None:
            await enqueued(store, "work")
            await store.direct_workers("drain", worker_ids=["worker"])

        # This loop stands still meanwhile, so that the worker is called and cannot answer.
        filling = threading.Thread(target=lambda: asyncio.run(fill_and_direct()))
        filling.start()
        filling.join()
        claims = await asyncio.gather(told, other)
        assert [each and each.input for each in claims] == [None, "work"]


async def test_what_was_claimed_before_is_still_its_own(stores: Stores) -> None:
    """A drain lets it finish; and a claim whose reply was lost can still be repeated."""
    async with stores.open() as (store, _):
        await enqueued(store, "first", "second")
        first = await claimed(store, "worker", request_id="rq-1")
        await store.direct_workers("drain")
        assert (await claimed(store, "worker", request_id="rq-1")).attempt == first.attempt
        assert await store.dequeue_rollout("worker", request_id="rq-2") is None
        reply: Worker = await store.update_worker("worker", attempt_ids=[first.attempt.attempt_id])
        assert (reply.status, reply.directive, reply.stale_attempt_ids) == ("busy", "drain", [])
        await finish(store, first)
        assert (await rollout_now(store, first.rollout_id)).status == "succeeded"


# --- Why a worker was lost -------------------------------------------------------------------------


@pytest.mark.parametrize("code", [None, "worker_lost", "resource_exhausted"])
async def test_a_loss_says_why(stores: Stores, code: str | None) -> None:
    async with stores.open() as (store, _):
        running = await started(store, "worker", max_attempts=1)
        await store.update_attempt(running.rollout_id, running.attempt.attempt_id, "running")
        [lost] = await store.report_worker_lost("worker", message="no memory was left", reason_code=code)
        assert (lost.status, lost.reason_code) == ("unresponsive", code or "worker_lost")
        rollout = await rollout_now(store, running.rollout_id)
        assert (rollout.status, rollout.reason_code) == ("failed", code or "worker_lost")
        assert "no memory was left" in (rollout.reason_message or "")


@pytest.mark.parametrize("code", ["unconfirmed", "No Memory", ""])
async def test_a_loss_has_a_proper_reason(stores: Stores, code: str) -> None:
    async with stores.open() as (store, _):
        await started(store, "worker")
        async with unchanged(store):
            with pytest.raises(InvalidValue):
                await store.report_worker_lost("worker", message="gone", reason_code=code)
