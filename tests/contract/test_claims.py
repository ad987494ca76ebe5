"""Claims that carry a ``request_id`` (G3): repeatable, and handed out again if nobody ever confirms them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest

from agentlightning.errors import IdReused, StaleAttempt
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout
from scenes import ANY_LEASE, attempts_of, claimed, config, enqueued, finish, rollout_now, span_of, statuses
from store_state import unchanged
from stores import Stores

Confirm = Callable[[LightningStore, AttemptedRollout], Awaitable[object]]


async def _by_a_span(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.add_span(span_of(claim))


async def _by_a_status(store: LightningStore, claim: AttemptedRollout) -> None:
    await finish(store, claim, "running")


async def _by_an_empty_report(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.update_attempt(claim.rollout_id, claim.attempt.attempt_id)


async def _by_a_heartbeat(store: LightningStore, claim: AttemptedRollout) -> None:
    await store.update_worker("worker", attempt_ids=[claim.attempt.attempt_id])


CONFIRMATIONS = [_by_a_span, _by_a_status, _by_an_empty_report, _by_a_heartbeat]


async def test_the_same_request_gets_the_same_attempts(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, *range(5))
        first = await store.dequeue_many_rollouts(limit=3, worker_id="worker", request_id="rq-1")
        async with unchanged(store):
            assert await store.dequeue_many_rollouts(limit=3, worker_id="worker", request_id="rq-1") == first
        other = await store.dequeue_many_rollouts(limit=3, worker_id="worker", request_id="rq-2")
        assert [claim.input for claim in other] == [3, 4]


async def test_a_repeat_shows_the_attempts_as_they_are_now(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2)
        one, two = await store.dequeue_many_rollouts(limit=2, request_id="rq-1")
        await finish(store, one, "running")
        repeated = await store.dequeue_many_rollouts(limit=2, request_id="rq-1")
        assert [(claim.attempt.attempt_id, claim.attempt.status, claim.status) for claim in repeated] == [
            (one.attempt.attempt_id, "running", "running"),
            (two.attempt.attempt_id, "preparing", "preparing"),
        ]
        await finish(store, one)
        [repeated_again] = await store.dequeue_many_rollouts(limit=2, request_id="rq-1")
        assert repeated_again.attempt.attempt_id == two.attempt.attempt_id


async def test_an_empty_claim_is_not_kept(stores: Stores) -> None:
    async with stores.open() as (store, _):
        assert await store.dequeue_rollout("worker", request_id="rq-1") is None
        await enqueued(store, 1)
        assert (await claimed(store, "worker", request_id="rq-1")).input == 1


async def test_what_is_not_confirmed_is_handed_out_again(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        lost = await claimed(store, "lost", request_id="rq-1")
        clock.advance(1)
        assert await store.dequeue_rollout("other", request_id="rq-2") is None
        clock.advance(ANY_LEASE)
        rollout = await rollout_now(store, rollout_id)
        assert (rollout.status, rollout.end_time) == ("requeuing", None)
        again = await claimed(store, "other", request_id="rq-2")
        assert (again.rollout_id, again.attempt.sequence_id) == (rollout_id, 2)
        assert await statuses(store, rollout_id) == ("preparing", ["unresponsive", "preparing"])
        old = (await attempts_of(store, rollout_id))[0]
        assert (old.attempt_id, old.reason_code) == (lost.attempt.attempt_id, "unconfirmed")
        with pytest.raises(StaleAttempt):
            await finish(store, lost)


@pytest.mark.parametrize("confirm", CONFIRMATIONS)
async def test_any_sign_of_life_confirms(stores: Stores, confirm: Confirm) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        claim = await claimed(store, "worker", request_id="rq-1")
        clock.advance(1)
        await confirm(store, claim)
        clock.advance(1_000_000)
        rollout = await rollout_now(store, rollout_id)
        assert rollout.status in ("preparing", "running")
        assert (await claimed(store, "worker", request_id="rq-1")).attempt.attempt_id == claim.attempt.attempt_id


async def test_a_repeat_alone_confirms_nothing(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        await claimed(store, request_id="rq-1")
        clock.advance(1)
        await claimed(store, request_id="rq-1")
        clock.advance(ANY_LEASE)
        assert await statuses(store, rollout_id) == ("requeuing", ["unresponsive"])


async def test_a_claim_without_request_needs_no_confirmation(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        await claimed(store, "worker")
        clock.advance(1_000_000)
        assert await statuses(store, rollout_id) == ("preparing", ["preparing"])


async def test_redelivery_does_not_use_up_attempts(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        policy = config(max_attempts=2, retry_condition=["failed"])
        [rollout_id] = await enqueued(store, "input", config=policy)
        for number in (1, 2):
            await claimed(store, request_id=f"rq-{number}")
            clock.advance(ANY_LEASE)
        for number in (3, 4):
            claim = await claimed(store, request_id=f"rq-{number}")
            assert claim.attempt.sequence_id == number
            await finish(store, claim, "failed")
        assert await statuses(store, rollout_id) == ("failed", ["unresponsive", "unresponsive", "failed", "failed"])


async def test_until_it_is_confirmed_only_the_lease_counts_as_silence(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        policy = config(unresponsive_seconds=0.5, max_attempts=1, retry_condition=[])
        [rollout_id] = await enqueued(store, "input", config=policy)
        claim = await claimed(store, request_id="rq-1")
        clock.advance(1)
        assert await statuses(store, rollout_id) == ("preparing", ["preparing"])
        await finish(store, claim, "running")
        clock.advance(1)
        rollout = await rollout_now(store, rollout_id)
        assert (rollout.status, rollout.reason_code) == ("failed", "unresponsive")


async def test_the_time_out_runs_while_it_is_unconfirmed(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        policy = config(timeout_seconds=0.5, max_attempts=1)
        [rollout_id] = await enqueued(store, "input", config=policy)
        await claimed(store, request_id="rq-1")
        clock.advance(0.5)
        assert await statuses(store, rollout_id) == ("failed", ["timeout"])


async def test_an_unconfirmed_claim_of_a_lost_worker_is_handed_out_again(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, "input")
        await claimed(store, "worker", request_id="rq-1")
        [lost] = await store.report_worker_lost("worker", message="killed")
        assert (lost.status, lost.reason_code) == ("unresponsive", "unconfirmed")
        again = await claimed(store, "other", request_id="rq-2")
        assert (again.rollout_id, again.attempt.sequence_id) == (rollout_id, 2)


async def test_a_repeat_after_the_lease_gets_the_attempt_back_while_nobody_else_has_it(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        claim = await claimed(store, "worker", request_id="rq-1")
        clock.advance(ANY_LEASE)
        assert await statuses(store, rollout_id) == ("requeuing", ["unresponsive"])
        repeated = await claimed(store, "worker", request_id="rq-1")
        assert repeated.attempt.attempt_id == claim.attempt.attempt_id
        assert repeated.attempt.status in ("preparing", "running")
        assert await store.dequeue_rollout() is None
        # That reply may be lost like the first one: it has to be confirmed, too.
        clock.advance(ANY_LEASE)
        assert await statuses(store, rollout_id) == ("requeuing", ["unresponsive"])


async def test_a_repeat_after_the_successor_gets_nothing_and_takes_nothing(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "first")
        await claimed(store, "worker", request_id="rq-1")
        clock.advance(ANY_LEASE)
        successor = await claimed(store, "other", request_id="rq-2")
        [second] = await enqueued(store, "second")
        assert await store.dequeue_rollout("worker", request_id="rq-1") is None
        assert await store.get_latest_attempt(rollout_id) == successor.attempt
        assert await statuses(store, second) == ("queuing", [])


async def test_a_late_repeat_of_a_claim_that_is_done_takes_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, "first", "second")
        done = await claimed(store, "worker", request_id="rq-1")
        await store.update_attempt(done.rollout_id, done.attempt.attempt_id, "succeeded")
        assert await store.dequeue_rollout("worker", request_id="rq-1") is None


async def test_a_repeat_that_has_nothing_left_waits_for_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, "first")
        done = await claimed(store, "worker", request_id="rq-1")
        await store.cancel_rollout(done.rollout_id)
        before = time.monotonic()
        assert await store.dequeue_rollout("worker", request_id="rq-1", wait_seconds=3600) is None
        assert time.monotonic() - before < 60


@pytest.mark.parametrize(("worker_id", "limit"), [("other", 1), (None, 1), ("worker", 2)])
async def test_a_request_id_is_of_one_claim(stores: Stores, worker_id: str | None, limit: int) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, "first", "second")
        await claimed(store, "worker", request_id="rq-1")
        with pytest.raises(IdReused, match="rq-1"):
            await store.dequeue_many_rollouts(limit=limit, worker_id=worker_id, request_id="rq-1")


async def test_an_attempt_started_by_hand_needs_no_confirmation(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        await claimed(store, request_id="rq-1")
        await store.start_attempt(rollout_id, "worker")
        clock.advance(1_000_000)
        assert await statuses(store, rollout_id) == ("preparing", ["failed", "preparing"])
