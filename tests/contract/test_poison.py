"""Rollouts that are handed out again and again because nobody confirms them: whether they are to blame
or their workers.

A worker that is not heard any more may have vanished before it was handed the rollout. One that is heard after that had
it, and one that is reported dead has died of it, perhaps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agentlightning.store.base import LightningStore
from scenes import ANY_LEASE, attempts_of, claimed, enqueued, finish, rollout_now, settled, span_of, started
from stores import StoreClock, Stores

MOST_CLAIMS = 21
LONG = 60.0

Fate = Callable[[LightningStore, str], Awaitable[object]]
"""What a worker does after it was handed a rollout."""


async def _beat(store: LightningStore, worker_id: str) -> None:
    await store.update_worker(worker_id, attempt_ids=[])


async def _ask_for_more(store: LightningStore, worker_id: str) -> None:
    assert await store.dequeue_rollout(worker_id) is None


async def _send_a_span_of_other_work(store: LightningStore, worker_id: str) -> None:
    await store.add_span(span_of(await started(store, worker_id)))


async def _finish_other_work(store: LightningStore, worker_id: str) -> None:
    await finish(store, await started(store, worker_id))


async def _die(store: LightningStore, worker_id: str) -> None:
    await store.report_worker_lost(worker_id, message="killed by SIGSEGV")


LIFE = [_beat, _ask_for_more, _send_a_span_of_other_work, _finish_other_work]


async def hand_out(
    store: LightningStore, clock: StoreClock, worker_id: str | None, number: int, fate: Fate | None = None
) -> None:
    """A worker gets the only rollout of the queue, does something else or vanishes, and never confirms it."""
    claim = await claimed(store, worker_id, request_id=f"rq-{number}")
    assert claim.attempt.sequence_id == number
    if fate is not None and worker_id is not None:
        clock.advance(1)
        await fate(store, worker_id)
    clock.advance(ANY_LEASE)


async def is_poison(store: LightningStore, rollout_id: str) -> bool:
    """Whether it has failed for that reason; it must wait in the queue otherwise."""
    rollout = await rollout_now(store, rollout_id)
    if rollout.status == "requeuing":
        return False
    assert (rollout.status, rollout.reason_code) == ("failed", "poison")
    return True


async def test_workers_that_vanish_prove_nothing(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        for number in range(1, 13):
            await _beat(store, f"gone-{number}")
            clock.advance(1)
            await hand_out(store, clock, f"gone-{number}", number)
            assert not await is_poison(store, rollout_id)
        claim = await claimed(store, "there", request_id="rq-there")
        await finish(store, claim)
        assert (await rollout_now(store, rollout_id)).status == "succeeded"


@pytest.mark.parametrize("fate", LIFE)
async def test_four_workers_that_lived_on_with_it_prove_it(stores: Stores, fate: Fate) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        for number in range(1, 5):
            assert number == 1 or not await is_poison(store, rollout_id)
            await hand_out(store, clock, f"worker-{number}", number, fate)
        assert await is_poison(store, rollout_id)
        message = (await rollout_now(store, rollout_id)).reason_message or ""
        assert message.startswith("handed out 4 times without being confirmed once")
        assert "worker-1, worker-2, worker-3, worker-4" in message
        assert [attempt.reason_code for attempt in await attempts_of(store, rollout_id)] == ["unconfirmed"] * 4


async def test_one_worker_alone_is_no_proof(stores: Stores) -> None:
    """Its claims may fail for a reason of its own; but nothing goes on for ever."""
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        for number in range(1, MOST_CLAIMS + 1):
            assert number == 1 or not await is_poison(store, rollout_id)
            await hand_out(store, clock, "worker", number, _beat)
        assert await is_poison(store, rollout_id)


async def test_nor_are_claims_without_a_worker(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        for number in range(1, MOST_CLAIMS + 1):
            assert number == 1 or not await is_poison(store, rollout_id)
            await hand_out(store, clock, None, number)
        assert await is_poison(store, rollout_id)
        assert await store.dequeue_rollout() is None


async def test_one_worker_that_dies_each_time_is(stores: Stores) -> None:
    """A supervisor reports each of its lives, which have the same name."""
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        for number in range(1, 5):
            assert number == 1 or not await is_poison(store, rollout_id)
            await hand_out(store, clock, "worker", number, _die)
        assert await is_poison(store, rollout_id)


async def test_a_worker_that_takes_it_up_after_all_is_no_proof(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input", config=None)
        for number in range(1, 4):
            await hand_out(store, clock, f"worker-{number}", number, _beat)
        late = (await attempts_of(store, rollout_id))[-1]
        await store.update_worker("worker-3", attempt_ids=[late.attempt_id])
        assert (await rollout_now(store, rollout_id)).status == "running"
        await store.update_rollout(rollout_id, status="requeuing")
        await hand_out(store, clock, "worker-4", 4, _beat)
        assert not await is_poison(store, rollout_id)
        await hand_out(store, clock, "worker-3", 5, _beat)
        assert await is_poison(store, rollout_id)


async def _enqueue(store: LightningStore) -> str:
    [rollout_id] = await enqueued(store, "other")
    return rollout_id


async def _put_back(store: LightningStore) -> str:
    held = await started(store)
    await store.update_rollout(held.rollout_id, status="requeuing")
    return held.rollout_id


@pytest.mark.parametrize("fill", [_enqueue, _put_back])
async def test_what_a_waiting_worker_is_handed_later_is_no_sign_of_life(
    stores: Stores, fill: Callable[[LightningStore], Awaitable[str]]
) -> None:
    """Two claims of each worker wait, and nobody is there to receive what they get."""
    async with stores.open() as (store, clock):
        waiting: list[asyncio.Task[object]] = []
        for number in range(1, 6):
            for claim in ("a", "b"):  # one gets the first rollout, one another
                asked = store.dequeue_rollout(f"gone-{number}", request_id=f"{claim}-{number}", wait_seconds=LONG)
                waiting.append(asyncio.create_task(asked))
                await _worker_waits(store, f"gone-{number}")
        [first] = await enqueued(store, "first")
        for number in range(1, 5):
            await _is_handed_out(store, first, number)
            clock.advance(1)
            other = await fill(store)
            await _is_handed_out(store, other)
            await store.cancel_rollout(other)
            clock.advance(ANY_LEASE)
        await _is_handed_out(store, first, 5)
        while sum(not each.done() for each in waiting) > 1:
            await asyncio.sleep(0.001)
        [last] = [each for each in waiting if not each.done()]
        last.cancel()


async def _is_handed_out(store: LightningStore, rollout_id: str, number: int | None = None) -> None:
    """Return when a waiting claim has got it, for the time with this number."""
    while (rollout := await rollout_now(store, rollout_id)).status != "preparing":
        assert not rollout.reason_code
        await asyncio.sleep(0.001)
    assert number in (None, (await attempts_of(store, rollout_id))[-1].sequence_id)


async def _worker_waits(store: LightningStore, worker_id: str) -> None:
    """Return when the worker's claim has found nothing, and waits."""
    while (worker := await store.get_worker_by_id(worker_id)) is None or worker.status != "idle":
        await asyncio.sleep(0)
    await settled()
