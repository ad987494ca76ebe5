"""Calls about very many rows: others go between, and nothing else is different."""

from __future__ import annotations

from typing import Any

import pytest

from agentlightning.errors import IdReused, NotFound
from agentlightning.types import EnqueueRolloutRequest, Span
from scenes import prompt, requests, started
from store_state import unchanged
from stores import Stores

MANY = 1_100


def _requests(count: int, **fields: Any) -> list[EnqueueRolloutRequest]:
    return [EnqueueRolloutRequest(input=n, rollout_id=f"ro-{n}", **fields) for n in range(count)]


def _spans(of: tuple[str, str], count: int, **fields: Any) -> list[Span]:
    return [
        Span.from_attributes(
            rollout_id=of[0], attempt_id=of[1], span_id=f"{n:016x}", attributes={"n": n, **fields}, start_time=1.0
        )
        for n in range(count)
    ]


async def test_many_rollouts_at_once_are_one_call(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.add_resources({"p": prompt("one")}, resources_id="rs-1")
        asked = _requests(MANY)
        made = await store.enqueue_many_rollouts(asked)
        assert [(each.rollout_id, each.input, each.status) for each in made] == [
            (f"ro-{n}", n, "queuing") for n in range(MANY)
        ]
        assert {(each.resources_id, each.resources_version) for each in made} == {("rs-1", 1)}
        async with unchanged(store):
            assert list(await store.enqueue_many_rollouts(asked)) == list(made)
        assert [each.rollout_id for each in await store.dequeue_many_rollouts(limit=3)] == ["ro-0", "ro-1", "ro-2"]


async def test_many_rollouts_of_which_one_is_refused_are_none(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.enqueue_rollout("other", rollout_id="ro-known")
        for last, error in (
            (EnqueueRolloutRequest(input=1, resources_id="rs-unknown"), NotFound),
            (EnqueueRolloutRequest(input="not the same", rollout_id="ro-known"), IdReused),
            (EnqueueRolloutRequest(input="not the same", rollout_id="ro-0"), IdReused),
        ):
            async with unchanged(store):
                with pytest.raises(error):
                    await store.enqueue_many_rollouts([*_requests(MANY), last])


async def test_many_spans_at_once_are_one_call(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        of = claim.rollout_id, claim.attempt.attempt_id
        spans = _spans(of, MANY)
        assert [each.sequence_id for each in await store.add_many_spans(spans)] == [*range(1, MANY + 1)]
        async with unchanged(store):
            assert list(await store.add_many_spans(spans)) == []
        assert [each.span_id for each in await store.query_spans(of[0])] == [each.span_id for each in spans]


async def test_many_spans_of_which_one_is_refused_are_none(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        of = claim.rollout_id, claim.attempt.attempt_id
        [known] = _spans(of, 1, known=True)
        await store.add_span(known)
        new = _spans(of, MANY)[1:]
        last = [
            (_spans((of[0], "at-unknown"), 1), NotFound),
            (_spans(of, 1, other=1), IdReused),
            (_spans(of, 2, other=1)[1:], IdReused),
        ]
        for refused, error in last:
            async with unchanged(store):
                with pytest.raises(error):
                    await store.add_many_spans([*new, *refused])


async def test_an_attempt_may_end_with_many_spans(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        of = claim.rollout_id, claim.attempt.attempt_id
        await store.enqueue_many_rollouts(_requests(300))
        told: dict[str, Any] = {"status": "succeeded", "spans": _spans(of, MANY), "claim_limit": 200}
        told |= {"worker_id": "w-1", "request_id": "rq-1"}
        done = await store.finish_attempt(*of, **told)
        assert list(done.sequence_ids) == [*range(1, MANY + 1)]
        assert done.attempt.status == "succeeded"
        claimed = [each.rollout_id for each in done.claimed]
        assert 0 < len(claimed) <= 200
        assert claimed == [f"ro-{n}" for n in range(len(claimed))]
        async with unchanged(store):
            again = await store.finish_attempt(*of, **told)
        assert [each.rollout_id for each in again.claimed] == claimed
        assert not any(again.sequence_ids)


async def test_a_claim_of_many_gets_all_that_there_are_and_a_repeat_the_same(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.enqueue_many_rollouts(_requests(700))
        claim: dict[str, Any] = {"limit": 600, "worker_id": "w-1", "request_id": "rq-1"}
        first = await store.dequeue_many_rollouts(**claim)
        assert [each.rollout_id for each in first] == [f"ro-{n}" for n in range(600)]
        again = await store.dequeue_many_rollouts(**claim)
        assert [each.attempt.attempt_id for each in again] == [each.attempt.attempt_id for each in first]
        rest = await store.dequeue_many_rollouts(limit=1000, worker_id="w-1")
        assert [each.rollout_id for each in rest] == [f"ro-{n}" for n in range(600, 700)]
        lost = await store.report_worker_lost("w-1", message="gone")
        assert len(lost) == 700
        assert {each.status for each in lost} == {"unresponsive"}
        worker = await store.get_worker_by_id("w-1")
        assert worker is not None
        assert worker.status == "unknown"


async def test_a_claim_gets_fewer_of_large_rollouts(stores: Stores) -> None:
    async with stores.open() as (store, _):
        for n in range(4):
            await store.enqueue_rollout("x" * 3_000_000, rollout_id=f"ro-{n}")
        claim: dict[str, Any] = {"limit": 4, "worker_id": "w-1", "request_id": "rq-1"}
        assert [each.rollout_id for each in await store.dequeue_many_rollouts(**claim)] == ["ro-0", "ro-1"]
        assert [each.rollout_id for each in await store.dequeue_many_rollouts(**claim)] == ["ro-0", "ro-1"]
        assert [each.rollout_id for each in await store.dequeue_many_rollouts(limit=4)] == ["ro-2", "ro-3"]
        assert list(await store.dequeue_many_rollouts(limit=4)) == []


async def test_a_heartbeat_may_list_many_attempts(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.enqueue_many_rollouts(requests(*range(600)))
        claimed = await store.dequeue_many_rollouts(limit=600, worker_id="w-1")
        held = [each.attempt.attempt_id for each in claimed]
        clock.advance(5)
        listed = [*held[:300], "at-none-1", *held[300:], "at-none-2"]
        worker = await store.update_worker("w-1", {"n": 1}, attempt_ids=listed)
        assert (worker.heartbeat_stats, worker.stale_attempt_ids) == ({"n": 1}, ["at-none-1", "at-none-2"])
        for each in claimed[:: 599 // 5]:
            attempt = await store.get_latest_attempt(each.rollout_id)
            assert attempt is not None
            assert attempt.last_heartbeat_time == clock.wall()


async def test_many_sequence_ids_and_workers(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        of = claim.rollout_id, claim.attempt.attempt_id
        assert list(await store.get_many_span_sequence_ids([of] * 600)) == [*range(1, 601)]
        names = [f"w-{n:03}" for n in range(300)]
        for name in names:
            await store.update_worker(name)
        directed = await store.direct_workers("drain")
        assert [each.worker_id for each in directed if each.worker_id in names] == names
        assert {each.directive for each in await store.query_workers()} == {"drain"}
        async with unchanged(store):
            with pytest.raises(NotFound):
                await store.direct_workers(None, worker_ids=[*names, "w-unknown"])
        assert [each.directive for each in await store.direct_workers(None, worker_ids=names)] == [None] * 300
