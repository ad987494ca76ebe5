"""Repeats (G2): a write repeated with the same ids has the effect of one, and other content under an id is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from agentlightning.errors import IdReused
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, EnqueueRolloutRequest, RolloutConfig
from scenes import claimed, config, enqueued, finish, prompt, rollout_now, span_of, started
from store_state import unchanged
from stores import Stores

Write = Callable[[LightningStore], Awaitable[Any]]

REQUEST: dict[str, Any] = {
    "input": {"b": 1, "a": [1.0]},
    "mode": "train",
    "resources_id": "rs-1",
    "config": RolloutConfig(max_attempts=2, retry_condition=["failed"]),
    "metadata": {"m": 1},
    "priority": 2,
    "rollout_id": "ro-mine",
}
OTHER_CONTENT: dict[str, Any] = {
    "input": {"b": 1, "a": [1.5]},
    "mode": "val",
    "resources_id": "rs-2",
    "config": RolloutConfig(max_attempts=3, retry_condition=["failed"]),
    "metadata": {"m": 2},
    "priority": 1,
}


async def _two_resources(store: LightningStore) -> None:
    await store.add_resources({"p": prompt("1")}, resources_id="rs-1")
    await store.add_resources({"p": prompt("2")}, resources_id="rs-2")


# --- Every write, twice ----------------------------------------------------------------------------


async def _scene(store: LightningStore) -> tuple[AttemptedRollout, list[Any]]:
    """A running attempt that is known by fixed ids, resources, a queue; and a span of the attempt."""
    await _two_resources(store)
    await store.update_resources("rs-1", {"p": prompt("1.2")})
    claim = await store.start_rollout(
        "input", config=config(), worker_id="worker", rollout_id="ro-run", attempt_id="at-run"
    )
    await store.add_span(span_of(claim))
    await enqueued(store, "x", "y", "z")
    return claim, [span_of(claim, span_id=f"s{n}") for n in range(3)]


WRITES: Mapping[str, Callable[[AttemptedRollout, list[Any]], Write]] = {
    "enqueue": lambda c, s: lambda store: store.enqueue_rollout(**REQUEST),
    "enqueue many": lambda c, s: (
        lambda store: store.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input=n, rollout_id=f"ro-{n}") for n in range(3)]
        )
    ),
    "start rollout": lambda c, s: lambda store: store.start_rollout(**REQUEST, worker_id="w2", attempt_id="at-mine"),
    "start attempt": lambda c, s: lambda store: store.start_attempt("ro-run", "w2", attempt_id="at-mine"),
    "claim": lambda c, s: lambda store: store.dequeue_rollout("w2", request_id="rq-1"),
    "claim many": lambda c, s: lambda store: store.dequeue_many_rollouts(limit=2, request_id="rq-1"),
    **{
        f"set {status}": lambda c, s, to=status: lambda store: store.update_rollout("ro-run", status=to)
        for status in ("running", "requeuing", "succeeded", "failed", "cancelled")
    },
    "edit rollout": lambda c, s: (
        lambda store: store.update_rollout(
            "ro-run", 1, "val", "rs-2", "failed", config(max_attempts=5), {"x": 1}, reason_code="r", reason_message="m"
        )
    ),
    "cancel": lambda c, s: lambda store: store.cancel_rollout("ro-run", message="why"),
    **{
        f"report {status}": lambda c, s, to=status: lambda store: store.update_attempt("ro-run", "at-run", to)
        for status in ("running", "succeeded", "failed", "timeout", "unresponsive")
    },
    "edit attempt": lambda c, s: (
        lambda store: store.update_attempt(
            "ro-run", "at-run", "failed", "w2", 12.0, {"x": 1}, reason_code="r", reason_message="m"
        )
    ),
    "add resources": lambda c, s: lambda store: store.add_resources({"p": prompt("x")}, resources_id="rs-new"),
    "update resources": lambda c, s: (
        lambda store: store.update_resources("rs-1", {"p": prompt("x")}, request_id="rq-1")
    ),
    "roll back": lambda c, s: lambda store: store.rollback_resources("rs-1", 1, request_id="rq-1"),
    "heartbeat": lambda c, s: (
        lambda store: store.update_worker("worker", {"load": 1}, attempt_ids=["at-run", "at-unknown"], lease_seconds=10)
    ),
}


@pytest.mark.parametrize("name", WRITES)
async def test_a_repeat_changes_nothing_and_returns_the_same(stores: Stores, name: str) -> None:
    async with stores.open() as (store, _):
        write = WRITES[name](*await _scene(store))
        first = await write(store)
        async with unchanged(store):
            for _try in range(3):
                assert await write(store) == first


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("spans", []),
        ("one span", None),
        ("lost worker", []),
        ("retention", 0),
    ],
)
async def test_a_repeat_of_what_leaves_nothing_to_do(stores: Stores, name: str, again: Any) -> None:
    async with stores.open() as (store, clock):
        _claim, spans = await _scene(store)
        await store.update_rollout((await enqueued(store, "old"))[0], status="failed")
        clock.advance(1)
        writes: Mapping[str, Write] = {
            "spans": lambda store: store.add_many_spans(spans),
            "one span": lambda store: store.add_span(spans[0]),
            "lost worker": lambda store: store.report_worker_lost("worker", message="why"),
            "retention": lambda store: store.delete_finished_rollouts(older_than_seconds=0),
        }
        assert await writes[name](store) != again
        async with unchanged(store):
            assert await writes[name](store) == again


@pytest.mark.parametrize("name", ["enqueue", "enqueue many", "start rollout", "start attempt", "claim", "claim many"])
async def test_writes_without_ids_are_new_each_time(stores: Stores, name: str) -> None:
    async with stores.open() as (store, _):
        claim, _spans = await _scene(store)
        writes: Mapping[str, Write] = {
            "enqueue": lambda store: store.enqueue_rollout("same"),
            "enqueue many": lambda store: store.enqueue_many_rollouts([EnqueueRolloutRequest(input="same")]),
            "start rollout": lambda store: store.start_rollout("same"),
            "start attempt": lambda store: store.start_attempt(claim.rollout_id),
            "claim": lambda store: store.dequeue_rollout(),
            "claim many": lambda store: store.dequeue_many_rollouts(),
        }
        assert await writes[name](store) != await writes[name](store)


# --- A repeat that comes late ----------------------------------------------------------------------


async def test_a_late_repeat_gets_the_record_as_it_is_now(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await _two_resources(store)
        await store.enqueue_rollout(**REQUEST)
        await store.update_resources("rs-1", {})
        claim = await claimed(store)
        await finish(store, claim)
        await store.update_rollout("ro-mine", metadata={"edited": True})
        clock.advance(100)
        now = await rollout_now(store, "ro-mine")
        async with unchanged(store):
            assert await store.enqueue_rollout(**REQUEST) == now
            assert now.status == "succeeded"
            assert now.resources_version == 1


async def test_a_late_repeat_of_a_started_attempt(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store)
        await store.start_attempt(first.rollout_id, "worker", attempt_id="at-2")
        await store.start_attempt(first.rollout_id, "worker", attempt_id="at-3")
        async with unchanged(store):
            repeated = await store.start_attempt(first.rollout_id, "worker", attempt_id="at-2")
            assert (repeated.attempt.attempt_id, repeated.attempt.sequence_id) == ("at-2", 2)
            assert (repeated.attempt.status, repeated.status) == ("failed", "preparing")
        await store.cancel_rollout(first.rollout_id)
        async with unchanged(store):
            assert (await store.start_attempt(first.rollout_id, "worker", attempt_id="at-3")).status == "cancelled"


async def test_a_late_repeat_of_a_new_version(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await store.update_resources("rs-1", {"p": prompt("1")}, request_id="rq-1")
        back = await store.rollback_resources("rs-1", 1, request_id="rq-2")
        await store.update_resources("rs-1", {"p": prompt("3")})
        async with unchanged(store):
            assert await store.update_resources("rs-1", {"p": prompt("1")}, request_id="rq-1") == first
            assert await store.rollback_resources("rs-1", 1, request_id="rq-2") == back
            assert back.version == 2


async def test_part_of_a_batch_may_be_there_already(stores: Stores) -> None:
    async with stores.open() as (store, _):
        one, two = (EnqueueRolloutRequest(input=n, rollout_id=f"ro-{n}") for n in (1, 2))
        [first] = await store.enqueue_many_rollouts([one])
        both = await store.enqueue_many_rollouts([one, two, two])
        assert [rollout.rollout_id for rollout in both] == ["ro-1", "ro-2", "ro-2"]
        assert both[0] == first
        assert (await store.query_rollouts()).total == 2


# --- Other content under the same id ---------------------------------------------------------------


@pytest.mark.parametrize("field", OTHER_CONTENT)
async def test_another_rollout_under_the_same_id_is_refused(stores: Stores, field: str) -> None:
    async with stores.open() as (store, _):
        await _two_resources(store)
        await store.enqueue_rollout(**REQUEST)
        changed: list[dict[str, Any]] = [REQUEST | {field: OTHER_CONTENT[field]}]
        changed += [REQUEST | {field: None}] if field != "priority" else []
        for other in changed:
            async with unchanged(store):
                with pytest.raises(IdReused, match="ro-mine"):
                    await store.enqueue_rollout(**other)


async def test_equal_content_is_a_repeat_however_it_is_written(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await store.enqueue_rollout((1, {"a": None}), rollout_id="ro-1")
        async with unchanged(store):
            repeated = await store.enqueue_rollout(
                [1, {"a": None}], None, None, RolloutConfig(), None, priority=0, rollout_id="ro-1"
            )
            assert repeated == first


async def test_a_rollout_is_either_enqueued_or_started(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.enqueue_rollout(1, rollout_id="ro-enqueued")
        await store.start_rollout(1, rollout_id="ro-started")
        async with unchanged(store):
            with pytest.raises(IdReused):
                await store.start_rollout(1, rollout_id="ro-enqueued")
            with pytest.raises(IdReused):
                await store.enqueue_rollout(1, rollout_id="ro-started")


@pytest.mark.parametrize("field", OTHER_CONTENT)
async def test_another_started_rollout_under_the_same_id_is_refused(stores: Stores, field: str) -> None:
    async with stores.open() as (store, _):
        await _two_resources(store)
        await store.start_rollout(**REQUEST, attempt_id="at-1")
        async with unchanged(store):
            with pytest.raises(IdReused):
                await store.start_rollout(**(REQUEST | {field: OTHER_CONTENT[field]}), attempt_id="at-1")


async def test_other_resources_under_the_same_id_are_refused(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.add_resources({"p": prompt("1")}, resources_id="rs-1")
        await store.update_resources("rs-1", {"p": prompt("2")}, request_id="rq-1")
        async with unchanged(store):
            for resources in ({"p": prompt("2")}, {"q": prompt("1")}, {}):
                with pytest.raises(IdReused):
                    await store.add_resources(resources, resources_id="rs-1")


async def test_another_version_under_the_same_request_is_refused(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await _two_resources(store)
        await store.update_resources("rs-1", {"p": prompt("x")}, request_id="rq-1")
        async with unchanged(store):
            for write in (
                store.update_resources("rs-1", {"p": prompt("y")}, request_id="rq-1"),
                store.update_resources("rs-2", {"p": prompt("x")}, request_id="rq-1"),
                store.update_resources("rs-3", {"p": prompt("x")}, request_id="rq-1"),
                store.rollback_resources("rs-1", 1, request_id="rq-1"),
            ):
                with pytest.raises(IdReused, match="rq-1"):
                    await write


async def test_an_id_is_free_again_when_its_rollout_is_deleted(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.enqueue_rollout(1, rollout_id="ro-1")
        claim = await claimed(store, request_id="rq-1")
        await finish(store, claim)
        clock.advance(2)
        assert await store.delete_finished_rollouts(older_than_seconds=1) == 1
        await store.enqueue_rollout("other", rollout_id="ro-1")
        assert (await claimed(store, request_id="rq-1")).input == "other"


async def test_a_late_repeat_of_start_rollout_gets_its_own_attempt_and_no_other(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        policy = config(unresponsive_seconds=5, max_attempts=3, retry_condition=["unresponsive"])

        async def start(**changes: Any) -> AttemptedRollout:
            asked = {"worker_id": "worker", "rollout_id": "ro-1", "attempt_id": "at-1", **changes}
            return await store.start_rollout("input", config=policy, **asked)

        await start()
        clock.advance(6)
        successor = await store.dequeue_rollout("other")
        assert successor is not None
        again = await start()
        assert (again.attempt.attempt_id, again.attempt.status) == ("at-1", "unresponsive")
        for changes in ({"worker_id": "other"}, {"attempt_id": "at-2"}, {"attempt_id": None}, {"rollout_id": "ro-2"}):
            with pytest.raises(IdReused):
                await start(**changes)


async def test_start_rollout_repeats_by_its_attempt_id_alone(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await store.start_rollout("input", attempt_id="at-1")
        again = await store.start_rollout("input", attempt_id="at-1")
        assert again.rollout_id == first.rollout_id
        with pytest.raises(IdReused):
            await store.start_rollout("other input", attempt_id="at-1")


async def test_a_repeat_of_start_attempt_is_one_although_the_attempt_has_moved(stores: Stores) -> None:
    async with stores.open() as (store, _):
        rollout = await store.enqueue_rollout("input")
        await store.start_attempt(rollout.rollout_id, attempt_id="at-1")
        await store.update_attempt(rollout.rollout_id, "at-1", worker_id="worker")
        again = await store.start_attempt(rollout.rollout_id, attempt_id="at-1")
        assert (again.attempt.attempt_id, again.attempt.worker_id) == ("at-1", "worker")


async def test_the_order_of_keys_makes_no_other_content(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.enqueue_rollout({"a": 1, "b": {"c": 2, "d": 3}}, rollout_id="ro-1")
        again = await store.enqueue_rollout({"b": {"d": 3, "c": 2}, "a": 1}, rollout_id="ro-1")
        assert list(again.input) == ["a", "b"]
