"""Counts, retention, the consistency check, and that what a store hands out is a copy."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import pytest
from pydantic import BaseModel

from agentlightning.store.base import LightningStore
from scenes import (
    attempts_of,
    claimed,
    config,
    enqueued,
    finish,
    llm,
    prompt,
    rollout_in,
    rollout_now,
    span_of,
    started,
)
from store_state import unchanged
from stores import Stores

NO_ROLLOUTS = dict.fromkeys(
    ("queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"),
    0,
)


# --- Counts ----------------------------------------------------------------------------------------


async def _counts(store: LightningStore) -> dict[str, Any]:
    counts = dict(await store.statistics())
    del counts["name"], counts["uptime"], counts["host"]
    return counts


async def test_statistics_of_an_empty_store(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        statistics = await store.statistics()
        assert statistics["name"]
        assert 0 <= statistics["uptime"] < 60
        assert statistics["host"]["version"] == version("agentlightning")
        assert statistics["host"]["time"] == clock.wall()
        assert await _counts(store) == {
            "total_rollouts": 0,
            "total_attempts": 0,
            "total_spans": 0,
            "total_resources": 0,
            "total_workers": 0,
            "rollouts_by_status": NO_ROLLOUTS,
            "total_span_bytes": 0,
        }


async def test_statistics_count_everything(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.update_resources("rs-1", {"p": prompt("1")})
        await store.update_resources("rs-1", {"p": prompt("2")})
        await store.add_resources({})
        await enqueued(store, *range(6), config=config())
        claims = await store.dequeue_many_rollouts(limit=5, worker_id="w1")
        await finish(store, claims[0])
        await finish(store, claims[1], "failed")
        await store.cancel_rollout(claims[2].rollout_id)
        span = span_of(claims[3])
        for _ in range(2):
            await store.add_many_spans([span, span_of(claims[3])])
        await store.update_worker("w2")
        counts = await _counts(store)
        assert counts.pop("total_span_bytes") > 3 * 100
        assert counts == {
            "total_rollouts": 6,
            "total_attempts": 5,
            "total_spans": 3,
            "total_resources": 2,
            "total_workers": 2,
            "rollouts_by_status": NO_ROLLOUTS
            | {"succeeded": 1, "requeuing": 1, "cancelled": 1, "running": 1, "preparing": 1, "queuing": 1},
        }
        clock.advance(1)
        assert await store.delete_finished_rollouts(older_than_seconds=0) == 2
        assert (await _counts(store))["total_rollouts"] == 4


async def test_uptime_is_real_time(stores: Stores) -> None:
    async with stores.open_in_real_time() as store:
        first, before = (await store.statistics())["uptime"], time.monotonic()
        second, after = (await store.statistics())["uptime"], time.monotonic()
        assert 0 < second - first <= after - before + 0.1


async def test_capabilities(stores: Stores) -> None:
    async with stores.open() as (store, _):
        capabilities = store.capabilities
        assert capabilities.get("thread_safe")
        assert capabilities.get("async_safe")
        if not capabilities.get("otlp_traces"):
            with pytest.raises(NotImplementedError):
                store.otlp_traces_endpoint()


# --- Retention -------------------------------------------------------------------------------------


async def test_only_what_ended_long_ago_is_deleted_with_all_that_belongs_to_it(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        retried = await started(store, "worker")
        await store.add_many_spans([span_of(retried) for _ in range(5)])
        await finish(store, retried, "failed")
        await finish(store, await claimed(store))
        clock.advance(10)
        [cancelled, waiting] = await enqueued(store, 1, 2)
        await store.cancel_rollout(cancelled)
        running = await started(store)
        await store.add_span(span_of(running))
        clock.advance(5)
        assert await store.delete_finished_rollouts(older_than_seconds=15) == 0
        assert await store.delete_finished_rollouts(older_than_seconds=14.75) == 1
        assert await store.get_rollout_by_id(retried.rollout_id) is None
        assert await attempts_of(store, retried.rollout_id) == []
        assert list(await store.query_spans(retried.rollout_id)) == []
        assert [each.rollout_id for each in await store.query_rollouts()] == [cancelled, waiting, running.rollout_id]
        assert await _counts(store) | {"total_span_bytes": 0, "rollouts_by_status": {}} == {
            "total_rollouts": 3,
            "total_attempts": 1,
            "total_spans": 1,
            "total_resources": 0,
            "total_workers": 1,
            "total_span_bytes": 0,
            "rollouts_by_status": {},
        }


async def test_much_is_deleted_in_one_call(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        large = await started(store)
        await store.add_many_spans([span_of(large) for _ in range(4500)])
        await finish(store, large)
        for rollout_id in await enqueued(store, *range(120)):
            await store.cancel_rollout(rollout_id)
        [kept] = await enqueued(store, "kept")
        clock.advance(1)
        assert await store.delete_finished_rollouts(older_than_seconds=0.5) == 121
        assert [each.rollout_id for each in await store.query_rollouts()] == [kept]
        assert (await _counts(store))["total_spans"] == 0
        assert await store.delete_finished_rollouts(older_than_seconds=0) == 0


# --- The consistency check -------------------------------------------------------------------------


async def test_verify_looks_at_every_record(stores: Stores) -> None:
    async with stores.open() as (store, _):
        report = await store.verify()
        assert report.ok
        assert set(report.checked.values()) == {0}
        await store.add_resources({})
        claim = await started(store, "worker")
        await store.start_attempt(claim.rollout_id, "other")
        await store.add_many_spans([span_of(claim) for _ in range(3)])
        report = await store.verify()
        assert report.ok
        assert report.checked == {"rollouts": 1, "attempts": 2, "spans": 3, "resources": 1, "workers": 2}


async def test_verify_changes_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await rollout_in(store, "requeuing")
        async with unchanged(store):
            await store.verify()


# --- Copies ----------------------------------------------------------------------------------------


def _spoil(value: Any) -> None:
    """Change everything in a record that can be changed."""
    match value:
        case BaseModel():
            for name in type(value).model_fields:
                _spoil(getattr(value, name))
            for name in type(value).model_fields:
                if name != "endpoint":
                    setattr(value, name, "spoilt")
        case dict():
            for item in value.values():
                _spoil(item)
            value["spoilt"] = True
        case list():
            for item in value:
                _spoil(item)
            value.append("spoilt")


async def test_what_a_store_hands_out_is_a_copy(stores: Stores) -> None:
    async with stores.open() as (store, _):
        resources = await store.add_resources({"m": llm(stop=["a"])}, resources_id="rs-1")
        enqueued_rollout = await store.enqueue_rollout({"a": [1]}, metadata={"a": [1]}, config=config())
        claim = await claimed(store, "worker")
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        attempt = await store.update_attempt(*ids, metadata={"a": [1]})
        span = await store.add_span(span_of(claim, attributes={"a": [1, 2]}))
        worker = await store.update_worker("worker", {"a": [1]}, attempt_ids=[claim.attempt.attempt_id])
        ended = await store.update_rollout(claim.rollout_id, status="succeeded")
        async with unchanged(store):
            for record in (resources, enqueued_rollout, claim, attempt, span, worker, ended):
                _spoil(record)
            _spoil(await rollout_now(store, ids[0]))
            _spoil(await store.get_latest_attempt(ids[0]))
            _spoil(await store.get_worker_by_id("worker"))
            _spoil(await store.get_latest_resources())
            _spoil(await store.get_resources_by_id("rs-1", version=1))
            _spoil((await store.wait_for_rollouts(rollout_ids=[ids[0]]))[0])
            for page in (
                await store.query_rollouts(),
                await store.query_attempts(ids[0]),
                await store.query_spans(ids[0]),
                await store.query_resources(),
                await store.query_resource_versions("rs-1"),
                await store.query_workers(),
            ):
                for record in page:
                    _spoil(record)
            _spoil(dict(await store.statistics()))


async def test_what_a_store_is_given_is_copied(stores: Stores) -> None:
    async with stores.open() as (store, _):
        content, metadata, policy = {"a": [1]}, {"a": [1]}, config()
        resources: Any = {"m": llm(stop=["a"])}
        await store.add_resources(resources, resources_id="rs-1")
        await store.enqueue_rollout(content, metadata=metadata, config=policy)
        claim = await claimed(store)
        span = span_of(claim, attributes={"a": [1, 2]})
        await store.add_span(span)
        async with unchanged(store):
            for given in (content, metadata, policy, resources, span):
                _spoil(given)
