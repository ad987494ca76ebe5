"""Time: attempts end when they should, exactly then, whoever asks or nobody, and no clock jump ends one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agentlightning.errors import StaleAttempt
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, RolloutConfig
from scenes import attempts_of, claimed, config, enqueued, finish, rollout_now, span_of, started, statuses
from stores import Stores

Beat = Callable[[LightningStore, AttemptedRollout], Awaitable[object]]


async def _by_a_span(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.add_span(span_of(claim))


async def _by_a_report(store: LightningStore, claim: AttemptedRollout) -> None:
    await finish(store, claim, "running")


async def _by_metadata(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.update_attempt(claim.rollout_id, claim.attempt.attempt_id, metadata={})


async def _by_a_heartbeat(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.update_worker("worker", attempt_ids=[claim.attempt.attempt_id])


BEATS = [_by_a_span, _by_a_report, _by_metadata, _by_a_heartbeat]


@pytest.mark.parametrize(
    ("limits", "status"), [({"timeout_seconds": 10}, "timeout"), ({"unresponsive_seconds": 10}, "unresponsive")]
)
async def test_an_attempt_ends_at_its_deadline_not_before(
    stores: Stores, limits: dict[str, float], status: str
) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker", **limits, max_attempts=1)
        clock.advance(9.75)
        assert await statuses(store, claim.rollout_id) == ("preparing", ["preparing"])
        clock.advance(0.25)
        assert await statuses(store, claim.rollout_id) == ("failed", [status])
        [attempt] = await attempts_of(store, claim.rollout_id)
        assert (attempt.end_time, attempt.reason_code) == (clock.wall(), status)
        rollout = await rollout_now(store, claim.rollout_id)
        assert (rollout.end_time, rollout.reason_code) == (clock.wall(), status)
        with pytest.raises(StaleAttempt):
            await finish(store, claim)


async def test_without_limits_an_attempt_may_take_for_ever(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await store.start_rollout("input")
        clock.advance(1e9)
        await finish(store, claim)
        assert await statuses(store, claim.rollout_id) == ("succeeded", ["succeeded"])


@pytest.mark.parametrize("beat", BEATS)
async def test_signs_of_life_prolong_silence_but_not_the_time_out(stores: Stores, beat: Beat) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker", unresponsive_seconds=10, timeout_seconds=30)
        for _ in range(3):
            clock.advance(9.5)
            await beat(store, claim)
        assert [attempt.last_heartbeat_time for attempt in await attempts_of(store, claim.rollout_id)] == [clock.wall()]
        assert (await rollout_now(store, claim.rollout_id)).status in ("preparing", "running")
        clock.advance(1.5)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["timeout"])


async def test_the_silence_is_counted_from_the_last_sign_of_life(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, unresponsive_seconds=10)
        clock.advance(7)
        await store.add_span(span_of(claim))
        clock.advance(9.75)
        assert await statuses(store, claim.rollout_id) == ("running", ["running"])
        clock.advance(0.25)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])


async def test_a_heartbeat_time_that_is_given_moves_no_lease(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, unresponsive_seconds=10)
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        await store.update_attempt(*ids, last_heartbeat_time=clock.wall() + 1e6)
        clock.advance(9)
        await store.update_attempt(*ids, last_heartbeat_time=0.0)
        clock.advance(9)
        assert (await rollout_now(store, claim.rollout_id)).status == "preparing"
        clock.advance(1)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])


async def test_a_worker_heartbeat_that_lists_no_attempts_is_none_of_theirs(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker", unresponsive_seconds=10)
        clock.advance(9)
        await store.update_worker("worker", {"load": 1})
        await store.update_worker("other", attempt_ids=[claim.attempt.attempt_id])
        clock.advance(1)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])


async def test_waiting_in_the_queue_takes_no_time_of_an_attempt(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await enqueued(store, "input", config=config(timeout_seconds=10, unresponsive_seconds=5))
        clock.advance(1000)
        claim = await claimed(store)
        clock.advance(4)
        assert (await rollout_now(store, claim.rollout_id)).status == "preparing"


@pytest.mark.parametrize("seconds", [1e7, -1e7])
async def test_a_clock_jump_ends_no_attempt_and_saves_none(stores: Stores, seconds: float) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker", unresponsive_seconds=10, timeout_seconds=15)
        await store.update_worker("worker", lease_seconds=12)
        clock.jump_wall(seconds)
        clock.advance(9)
        assert await statuses(store, claim.rollout_id) == ("preparing", ["preparing"])
        await store.add_span(span_of(claim))
        await store.update_worker("worker")
        clock.jump_wall(-3 * seconds)
        clock.advance(5.75)
        assert await statuses(store, claim.rollout_id) == ("running", ["running"])
        clock.advance(0.25)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["timeout"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (RolloutConfig(), RolloutConfig(timeout_seconds=10)),
        (RolloutConfig(), RolloutConfig(unresponsive_seconds=10)),
        (RolloutConfig(timeout_seconds=100), RolloutConfig(timeout_seconds=10)),
        (RolloutConfig(timeout_seconds=5), RolloutConfig(timeout_seconds=10)),
    ],
)
async def test_a_new_config_rules_the_live_attempt(stores: Stores, before: RolloutConfig, after: RolloutConfig) -> None:
    async with stores.open() as (store, clock):
        claim = await store.start_rollout("input", config=before)
        clock.advance(4)
        await store.update_rollout(claim.rollout_id, config=after)
        clock.advance(5.75)
        assert (await rollout_now(store, claim.rollout_id)).status == "preparing"
        clock.advance(0.25)
        assert (await rollout_now(store, claim.rollout_id)).status == "failed"


async def test_a_limit_may_be_lifted(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, timeout_seconds=10)
        await store.update_rollout(claim.rollout_id, config=RolloutConfig())
        clock.advance(1000)
        assert (await rollout_now(store, claim.rollout_id)).status == "preparing"


async def test_a_config_that_is_overdue_already_ends_the_attempt_at_once(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store)
        clock.advance(100)
        await store.update_rollout(claim.rollout_id, config=config(timeout_seconds=10))
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["timeout"])


async def test_no_read_shows_an_expired_attempt_as_running_however_many_there_are(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        ids = await enqueued(store, *range(1000), config=config(timeout_seconds=10, max_attempts=1))
        await store.dequeue_many_rollouts(limit=1000, worker_id="worker")
        clock.advance(10)
        assert (await rollout_now(store, ids[-1])).status == "failed"
        assert {rollout.status for rollout in await store.query_rollouts()} == {"failed"}
        statistics = await store.statistics()
        assert statistics["rollouts_by_status"]["failed"] == 1000
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert (worker.status, worker.current_attempt_id) == ("unknown", None)


async def test_no_write_takes_an_expired_attempt_for_a_live_one_however_many_there_are(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await enqueued(store, *range(500), config=config(timeout_seconds=10, max_attempts=1))
        await store.dequeue_many_rollouts(limit=499)
        clock.advance(0.5)
        last = await claimed(store)
        clock.advance(10)
        with pytest.raises(StaleAttempt):
            await finish(store, last)
        assert await statuses(store, last.rollout_id) == ("failed", ["timeout"])


async def test_each_read_looks_at_the_deadlines(stores: Stores) -> None:
    async def latest(store: LightningStore, rollout_id: str) -> str | None:
        attempt = await store.get_latest_attempt(rollout_id)
        return None if attempt is None else attempt.status

    async def counted(store: LightningStore, _rollout_id: str) -> str:
        [status] = [name for name, n in (await store.statistics())["rollouts_by_status"].items() if n]
        return {"failed": "timeout"}.get(status, status)

    async def queried(store: LightningStore, rollout_id: str) -> str:
        [rollout] = await store.query_rollouts(rollout_id_in=[rollout_id])
        assert isinstance(rollout, AttemptedRollout)
        return rollout.attempt.status

    async def filtered(store: LightningStore, _rollout_id: str) -> str:
        return "running" if list(await store.query_rollouts(status_in=["running"])) else "timeout"

    async def waited(store: LightningStore, rollout_id: str) -> str:
        [rollout] = await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=0)
        assert isinstance(rollout, AttemptedRollout)
        return rollout.attempt.status

    async def listed(store: LightningStore, rollout_id: str) -> str:
        return (await attempts_of(store, rollout_id))[0].status

    for read in (latest, counted, queried, filtered, waited, listed):
        async with stores.open() as (store, clock):
            claim = await started(store, timeout_seconds=10, max_attempts=1)
            await finish(store, claim, "running")
            clock.advance(10)
            assert await read(store, claim.rollout_id) == "timeout", read.__name__


async def test_an_expired_attempt_is_retried_when_a_claim_comes(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "silent", unresponsive_seconds=10)
        clock.advance(10)
        again = await claimed(store, "other")
        assert (again.rollout_id, again.attempt.sequence_id) == (claim.rollout_id, 2)


@pytest.mark.parametrize("limit", ["timeout_seconds", "unresponsive_seconds"])
async def test_an_expiry_is_noticed_without_anybody_asking(stores: Stores, limit: str) -> None:
    async with stores.open_in_real_time() as store:
        limits: dict[str, Any] = {limit: 0.2}
        claim = await started(store, **limits, max_attempts=1)
        before = time.monotonic()
        [rollout] = await store.wait_for_rollouts(rollout_ids=[claim.rollout_id], timeout=30)
        assert rollout.status == "failed"
        assert time.monotonic() - before < 1.2


async def test_a_lost_worker_is_noticed_without_anybody_asking(stores: Stores) -> None:
    async with stores.open_in_real_time() as store:
        claim = await started(store, "worker", max_attempts=1)
        await store.update_worker("worker", lease_seconds=0.2)
        before = time.monotonic()
        [rollout] = await store.wait_for_rollouts(rollout_ids=[claim.rollout_id], timeout=30)
        assert (rollout.status, rollout.reason_code) == ("failed", "worker_lost")
        assert time.monotonic() - before < 1.2


async def test_one_that_keeps_beating_is_never_declared_dead(stores: Stores) -> None:
    async with stores.open_in_real_time() as store:
        claim = await started(store, "worker", unresponsive_seconds=0.6, max_attempts=1)
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[claim.rollout_id], timeout=30))
        for _ in range(20):
            await store.update_worker("worker", attempt_ids=[claim.attempt.attempt_id])
            await asyncio.wait([waiting], timeout=0.05)
            assert not waiting.done()
        await finish(store, claim)
        assert [rollout.status for rollout in await waiting] == ["succeeded"]
