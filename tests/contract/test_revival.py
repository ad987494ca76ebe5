"""An attempt that fell silent and speaks again: welcome while its rollout waits for a successor, never after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from agentlightning.errors import StaleAttempt
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, AttemptStatus
from scenes import (
    ANY_LEASE,
    attempts_of,
    claimed,
    config,
    enqueued,
    finish,
    requeued_silent,
    rollout_now,
    span_of,
    started,
    statuses,
)
from stores import Stores

Speak = Callable[[LightningStore, AttemptedRollout], Awaitable[object]]


async def _by_a_span(store: LightningStore, silent: AttemptedRollout) -> None:
    await store.add_span(span_of(silent))


async def _by_a_report(store: LightningStore, silent: AttemptedRollout) -> None:
    await finish(store, silent, "running")


async def _by_metadata(store: LightningStore, silent: AttemptedRollout) -> None:
    await store.update_attempt(silent.rollout_id, silent.attempt.attempt_id, metadata={"progress": 0.5})


async def _by_a_heartbeat(store: LightningStore, silent: AttemptedRollout) -> None:
    worker = await store.update_worker("silent", attempt_ids=[silent.attempt.attempt_id])
    assert worker.stale_attempt_ids == []


@pytest.mark.parametrize("speak", [_by_a_span, _by_a_report, _by_metadata, _by_a_heartbeat])
async def test_it_is_revived_while_its_rollout_waits(stores: Stores, speak: Speak) -> None:
    async with stores.open() as (store, clock):
        silent = await requeued_silent(store, clock)
        clock.advance(60)
        await speak(store, silent)
        [attempt] = await attempts_of(store, silent.rollout_id)
        assert (attempt.status, attempt.end_time, attempt.reason_code, attempt.reason_message) == (
            "running",
            None,
            None,
            None,
        )
        assert attempt.last_heartbeat_time == clock.wall()
        rollout = await rollout_now(store, silent.rollout_id)
        assert (rollout.status, rollout.end_time, rollout.reason_code) == ("running", None, None)
        worker = await store.get_worker_by_id("silent")
        assert worker is not None
        assert (worker.status, worker.current_attempt_id) == ("busy", attempt.attempt_id)
        assert await store.dequeue_rollout() is None
        await finish(store, silent)
        assert await statuses(store, silent.rollout_id) == ("succeeded", ["succeeded"])


async def test_the_revived_has_a_full_lease_and_may_fall_silent_again(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        silent = await requeued_silent(store, clock)
        clock.advance(60)
        await store.add_span(span_of(silent))
        clock.advance(4.5)
        assert await statuses(store, silent.rollout_id) == ("running", ["running"])
        clock.advance(0.5)
        assert await statuses(store, silent.rollout_id) == ("requeuing", ["unresponsive"])
        assert (await claimed(store)).attempt.sequence_id == 2


@pytest.mark.parametrize(
    ("status", "rollout_status"), [("succeeded", "succeeded"), ("failed", "requeuing"), ("timeout", "requeuing")]
)
async def test_it_may_report_its_end_at_once(stores: Stores, status: AttemptStatus, rollout_status: str) -> None:
    async with stores.open() as (store, clock):
        silent = await requeued_silent(store, clock)
        await finish(store, silent, status)
        assert await statuses(store, silent.rollout_id) == (rollout_status, [status])


async def test_it_may_agree_that_it_is_unresponsive(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        silent = await requeued_silent(store, clock)
        await finish(store, silent, "unresponsive")
        assert await statuses(store, silent.rollout_id) == ("requeuing", ["unresponsive"])


@pytest.mark.parametrize("start", ["claim", "by hand"])
async def test_it_is_stale_once_there_is_a_successor(stores: Stores, start: str) -> None:
    async with stores.open() as (store, clock):
        silent = await requeued_silent(store, clock)
        if start == "claim":
            successor = await claimed(store, "successor")
        else:
            successor = await store.start_attempt(silent.rollout_id, "successor")
        await store.add_span(span_of(silent))
        for status in ("running", "succeeded"):
            with pytest.raises(StaleAttempt, match=successor.attempt.attempt_id):
                await finish(store, silent, status)
        worker = await store.update_worker("silent", attempt_ids=[silent.attempt.attempt_id])
        assert worker.stale_attempt_ids == [silent.attempt.attempt_id]
        assert await statuses(store, silent.rollout_id) == ("preparing", ["unresponsive", "preparing"])
        # Also while the rollout waits again: the successor is the newest attempt.
        await finish(store, successor, "failed")
        with pytest.raises(StaleAttempt):
            await finish(store, silent, "running")
        assert await statuses(store, silent.rollout_id) == ("requeuing", ["unresponsive", "failed"])


async def test_it_is_stale_once_its_rollout_has_ended(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        silent = await started(store, "silent", unresponsive_seconds=5, max_attempts=1)
        clock.advance(5)
        await store.add_span(span_of(silent))
        with pytest.raises(StaleAttempt):
            await finish(store, silent, "succeeded")
        assert await statuses(store, silent.rollout_id) == ("failed", ["unresponsive"])


@pytest.mark.parametrize("status", ["failed", "timeout"])
async def test_only_silence_is_forgiven(stores: Stores, status: AttemptStatus) -> None:
    async with stores.open() as (store, _):
        ended = await started(store, "worker")
        await finish(store, ended, status)
        await store.add_span(span_of(ended))
        with pytest.raises(StaleAttempt):
            await finish(store, ended, "succeeded")
        assert await statuses(store, ended.rollout_id) == ("requeuing", [status])


async def test_a_revived_attempt_is_limited_by_its_time_out_still(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        silent = await started(store, unresponsive_seconds=5, timeout_seconds=20)
        clock.advance(5)
        await store.add_span(span_of(silent))
        for _ in range(4):
            clock.advance(3)
            await store.add_span(span_of(silent))
        assert await statuses(store, silent.rollout_id) == ("running", ["running"])
        clock.advance(3)
        assert await statuses(store, silent.rollout_id) == ("requeuing", ["timeout"])


async def test_an_unconfirmed_claim_that_speaks_late_counts_as_an_attempt_again(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input", config=config(max_attempts=1))
        claim = await claimed(store, "worker", request_id="rq-1")
        clock.advance(ANY_LEASE)
        assert await statuses(store, rollout_id) == ("requeuing", ["unresponsive"])
        await store.add_span(span_of(claim))
        assert await statuses(store, rollout_id) == ("running", ["running"])
        await finish(store, claim, "failed")
        assert await statuses(store, rollout_id) == ("failed", ["failed"])


async def test_an_attempt_of_a_lost_worker_is_revived_like_any_other(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store, "worker")
        await finish(store, claim, "running")
        await store.report_worker_lost("worker", message="no route to host")
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])
        await store.add_span(span_of(claim))
        assert await statuses(store, claim.rollout_id) == ("running", ["running"])
