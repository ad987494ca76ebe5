"""The queue: what is enqueued comes out once, the most urgent first, then in the order it went in."""

from __future__ import annotations

import pytest

from agentlightning.errors import IdReused, NotFound
from agentlightning.types import AttemptedRollout, EnqueueRolloutRequest, RolloutConfig
from scenes import claimed, config, enqueued, finish, prompt, requests, rollout_now, started, statuses
from store_state import unchanged
from stores import Stores


async def test_an_enqueued_rollout_says_what_was_asked_for(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.add_resources({"p": prompt("hi")}, resources_id="rs-mine")
        asked = RolloutConfig(timeout_seconds=60, unresponsive_seconds=5.5, max_attempts=2, retry_condition=["failed"])
        rollout = await store.enqueue_rollout(
            {"question": ["é", 1, 2.5, None, True]},
            "val",
            "rs-mine",
            asked,
            {"tag": {"a": [1]}},
            priority=-7,
            rollout_id="ro-mine",
        )
        assert rollout.model_dump() == {
            "rollout_id": "ro-mine",
            "input": {"question": ["é", 1, 2.5, None, True]},
            "start_time": clock.wall(),
            "end_time": None,
            "mode": "val",
            "resources_id": "rs-mine",
            "resources_version": 1,
            "priority": -7,
            "status": "queuing",
            "config": asked.model_dump(),
            "metadata": {"tag": {"a": [1]}},
            "reason_code": None,
            "reason_message": None,
        }
        assert await store.get_rollout_by_id("ro-mine") == rollout
        assert await store.get_latest_attempt("ro-mine") is None


async def test_defaults(stores: Stores) -> None:
    async with stores.open() as (store, _):
        rollout = await store.enqueue_rollout(None)
        assert rollout.rollout_id.startswith("ro-")
        assert (rollout.input, rollout.mode, rollout.metadata, rollout.priority) == (None, None, None, 0)
        assert (rollout.resources_id, rollout.resources_version) == (None, None)
        assert rollout.config == RolloutConfig()


async def test_many_are_enqueued_in_order_each_with_its_own_settings(stores: Stores) -> None:
    async with stores.open() as (store, _):
        rollouts = await store.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input=i, mode="test", priority=i, metadata={"i": i}) for i in range(3)]
        )
        assert [(each.input, each.mode, each.priority, each.metadata) for each in rollouts] == [
            (i, "test", i, {"i": i}) for i in range(3)
        ]
        assert list(await store.query_rollouts()) == rollouts
        assert await store.enqueue_many_rollouts([]) == []


@pytest.mark.parametrize(
    ("spoiler", "error"),
    [
        (EnqueueRolloutRequest(input=1, resources_id="rs-unknown"), NotFound),
        (EnqueueRolloutRequest(input="other", rollout_id="ro-taken"), IdReused),
    ],
)
async def test_many_are_enqueued_all_or_none(
    stores: Stores, spoiler: EnqueueRolloutRequest, error: type[Exception]
) -> None:
    async with stores.open() as (store, _):
        await store.enqueue_rollout(1, rollout_id="ro-taken")
        async with unchanged(store):
            with pytest.raises(error):
                await store.enqueue_many_rollouts([*requests(1, 2), spoiler, *requests(3)])


async def test_a_claim_is_a_new_attempt_in_preparation(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input")
        clock.advance(2)
        claim = await claimed(store, "worker")
        assert isinstance(claim, AttemptedRollout)
        assert (claim.rollout_id, claim.input, claim.status) == (rollout_id, "input", "preparing")
        assert claim.attempt.attempt_id.startswith("at-")
        assert claim.attempt.model_dump(exclude={"attempt_id"}) == {
            "rollout_id": rollout_id,
            "sequence_id": 1,
            "start_time": clock.wall(),
            "end_time": None,
            "status": "preparing",
            "worker_id": "worker",
            "last_heartbeat_time": claim.attempt.last_heartbeat_time,
            "metadata": None,
            "reason_code": None,
            "reason_message": None,
        }
        # A client confirms at once what was claimed without a request id.
        assert claim.attempt.last_heartbeat_time in (None, clock.wall())
        assert await store.get_rollout_by_id(rollout_id) == claim
        assert await store.get_latest_attempt(rollout_id) == claim.attempt
        assert await store.dequeue_rollout() is None


async def test_a_claim_needs_no_worker(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1)
        assert (await claimed(store)).attempt.worker_id is None
        assert list(await store.query_workers()) == []


async def test_higher_priority_first_then_first_come(stores: Stores) -> None:
    async with stores.open() as (store, _):
        for number, priority in enumerate([0, 5, -1, 5, 0, 2**31 - 1, -(2**31)]):
            await store.enqueue_rollout(number, priority=priority)
        assert [(await claimed(store)).input for _ in range(7)] == [5, 1, 3, 0, 4, 2, 6]


async def test_first_come_is_by_arrival_not_by_id(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.enqueue_rollout(1, rollout_id="zzz")
        clock.jump_wall(-3600)
        await store.enqueue_rollout(2, rollout_id="aaa")
        assert (await claimed(store)).rollout_id == "zzz"


async def test_a_requeued_rollout_keeps_its_place(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, "first", config=config())
        await store.enqueue_rollout("urgent", priority=1)
        await enqueued(store, "second")
        urgent, first = await store.dequeue_many_rollouts(limit=2)
        assert urgent.input == "urgent"
        await finish(store, first, "failed")
        again = await claimed(store)
        assert (again.input, again.attempt.sequence_id) == ("first", 2)
        assert (await claimed(store)).input == "second"


async def test_many_are_claimed_up_to_the_limit(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, *range(1005))
        first = await store.dequeue_many_rollouts(limit=3)
        assert [claim.input for claim in first] == [0, 1, 2]
        assert len({claim.attempt.attempt_id for claim in first}) == 3
        assert [claim.input for claim in await store.dequeue_many_rollouts(limit=1000)] == [*range(3, 1003)]
        assert [claim.input for claim in await store.dequeue_many_rollouts()] == [1003]
        assert [claim.input for claim in await store.dequeue_many_rollouts(limit=5)] == [1004]
        assert await store.dequeue_many_rollouts(limit=5) == []


async def test_what_has_ended_is_never_claimed(stores: Stores) -> None:
    async with stores.open() as (store, _):
        for how in ("succeeded", "failed", "cancelled"):
            [rollout_id] = await enqueued(store, how)
            await store.update_rollout(rollout_id, status=how)
        assert await store.dequeue_rollout() is None


async def test_a_rollout_can_be_started_past_the_queue(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await enqueued(store, "waits")
        rollout = await store.start_rollout(
            {"a": 1},
            "train",
            None,
            config(timeout_seconds=9),
            {"m": 1},
            "worker",
            priority=3,
            rollout_id="ro-mine",
            attempt_id="at-mine",
        )
        assert isinstance(rollout, AttemptedRollout)
        assert (rollout.rollout_id, rollout.status, rollout.input, rollout.mode) == (
            "ro-mine",
            "preparing",
            {"a": 1},
            "train",
        )
        assert (rollout.metadata, rollout.priority, rollout.config.timeout_seconds) == ({"m": 1}, 3, 9)
        assert rollout.start_time == rollout.attempt.start_time == clock.wall()
        attempt = rollout.attempt
        assert (attempt.attempt_id, attempt.sequence_id, attempt.status, attempt.worker_id) == (
            "at-mine",
            1,
            "preparing",
            "worker",
        )
        assert await store.get_rollout_by_id("ro-mine") == rollout
        assert (await claimed(store)).input == "waits"
        assert await store.dequeue_rollout() is None


async def test_a_started_rollout_is_retried_through_the_queue(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store)
        await finish(store, first, "failed")
        again = await claimed(store)
        assert again.rollout_id == first.rollout_id
        assert await statuses(store, first.rollout_id) == ("preparing", ["failed", "preparing"])


async def test_starting_with_unknown_resources_starts_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _), unchanged(store):
        with pytest.raises(NotFound):
            await store.start_rollout(1, resources_id="rs-unknown", worker_id="worker")


async def test_reads_of_unknown_rollouts(stores: Stores) -> None:
    async with stores.open() as (store, _):
        assert await store.get_rollout_by_id("ro-unknown") is None
        assert await store.get_latest_attempt("ro-unknown") is None
        assert list(await store.query_attempts("ro-unknown")) == []
        assert list(await store.query_spans("ro-unknown")) == []
        assert list(await store.query_spans("ro-unknown", "latest")) == []


async def test_a_rollout_read_has_its_newest_attempt(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store)
        await finish(store, first, "failed")
        second = await claimed(store)
        for seen in (await rollout_now(store, first.rollout_id), (await store.query_rollouts())[0]):
            assert isinstance(seen, AttemptedRollout)
            assert seen.attempt == second.attempt
