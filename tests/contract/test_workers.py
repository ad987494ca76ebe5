"""Workers: what the store knows of each, and what becomes of the attempts of one that is gone."""

from __future__ import annotations

from typing import Any

import pytest

from agentlightning.errors import InvalidId, NotFound
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptStatus, Worker
from scenes import claimed, config, enqueued, finish, requeued_silent, rollout_now, span_of, started, statuses
from store_state import unchanged
from stores import Stores


async def _worker(store: LightningStore, worker_id: str = "worker") -> Worker:
    worker = await store.get_worker_by_id(worker_id)
    assert worker is not None
    return worker


async def _holds(store: LightningStore, worker_id: str = "worker") -> tuple[str, str | None]:
    worker = await _worker(store, worker_id)
    assert (worker.current_rollout_id is None) == (worker.current_attempt_id is None)
    return worker.status, worker.current_attempt_id


# --- What a worker does ----------------------------------------------------------------------------


async def test_a_worker_through_one_rollout(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        assert await store.get_worker_by_id("worker") is None
        assert await store.dequeue_rollout("worker") is None
        idle_since = clock.wall()
        worker = await _worker(store)
        assert (worker.status, worker.last_idle_time) == ("idle", idle_since)
        assert (worker.last_busy_time, worker.last_dequeue_time) == (None, None)
        await enqueued(store, "input")
        clock.advance(1)
        claim = await claimed(store, "worker")
        worker = await _worker(store)
        assert (worker.status, worker.current_rollout_id, worker.current_attempt_id) == (
            "busy",
            claim.rollout_id,
            claim.attempt.attempt_id,
        )
        assert worker.last_dequeue_time == worker.last_busy_time == clock.wall()
        assert worker.last_idle_time == idle_since
        clock.advance(1)
        await finish(store, claim)
        worker = await _worker(store)
        assert (worker.status, worker.current_rollout_id, worker.current_attempt_id) == ("idle", None, None)
        assert (worker.last_idle_time, worker.last_busy_time) == (clock.wall(), clock.wall() - 1)
        assert worker.last_heartbeat_time is None


@pytest.mark.parametrize(
    ("end", "status"),
    [("succeeded", "idle"), ("failed", "idle"), ("timeout", "unknown"), ("unresponsive", "unknown")],
)
async def test_how_an_attempt_ends_shows_on_its_worker(stores: Stores, end: AttemptStatus, status: str) -> None:
    async with stores.open() as (store, _):
        await finish(store, await started(store, "worker"), end)
        assert await _holds(store) == (status, None)


@pytest.mark.parametrize("limit", ["timeout_seconds", "unresponsive_seconds"])
async def test_a_worker_whose_attempt_expires_is_unknown_until_it_is_heard_again(stores: Stores, limit: str) -> None:
    async with stores.open() as (store, clock):
        await started(store, "worker", **{limit: 5}, max_attempts=1)
        clock.advance(5)
        assert await _holds(store) == ("unknown", None)
        assert (await store.update_worker("worker")).status == "idle"


async def test_a_worker_is_busy_with_what_it_starts_itself(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        first = await started(store, "worker")
        assert await _holds(store) == ("busy", first.attempt.attempt_id)
        assert (await _worker(store)).last_busy_time == clock.wall()
        second = await store.start_attempt(first.rollout_id, "other")
        assert await _holds(store, "worker") == ("idle", None)
        assert await _holds(store, "other") == ("busy", second.attempt.attempt_id)


async def test_a_worker_with_several_attempts_is_busy_until_the_last_one_ends(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2, 3)
        claims = await store.dequeue_many_rollouts(limit=3, worker_id="worker")
        held = {claim.attempt.attempt_id for claim in claims}
        for claim in claims:
            status, current = await _holds(store)
            assert status == "busy"
            assert current in held
            assert await store.dequeue_rollout("worker") is None
            assert await _holds(store) == (status, current)
            await finish(store, claim)
            held.discard(claim.attempt.attempt_id)
        assert await _holds(store) == ("idle", None)


async def test_an_attempt_can_be_handed_to_another_worker(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1)
        claim = await claimed(store)
        for worker_id in ("first", "second"):
            attempt = await store.update_attempt(claim.rollout_id, claim.attempt.attempt_id, worker_id=worker_id)
            assert attempt.worker_id == worker_id
        assert await _holds(store, "first") == ("idle", None)
        assert await _holds(store, "second") == ("busy", claim.attempt.attempt_id)
        await store.update_attempt(claim.rollout_id, claim.attempt.attempt_id, "succeeded", worker_id="third")
        assert await _holds(store, "second") == ("idle", None)


# --- Heartbeats ------------------------------------------------------------------------------------


async def test_a_heartbeat_registers_a_worker(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        worker = await store.update_worker("worker")
        assert worker.model_dump() == {
            "worker_id": "worker",
            "status": "idle",
            "heartbeat_stats": None,
            "last_heartbeat_time": clock.wall(),
            "last_dequeue_time": None,
            "last_busy_time": None,
            "last_idle_time": clock.wall(),
            "current_rollout_id": None,
            "current_attempt_id": None,
            "stale_attempt_ids": None,
            "lease_seconds": None,
            "registration": None,
            "directive": None,
            "reason_code": None,
            "reason_message": None,
        }
        assert await store.get_worker_by_id("worker") == worker


async def test_statistics_are_replaced_only_when_given(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        assert (await store.update_worker("worker", {"load": 0.5, "gpus": []})).heartbeat_stats == {
            "load": 0.5,
            "gpus": [],
        }
        clock.advance(1)
        worker = await store.update_worker("worker")
        assert (worker.heartbeat_stats, worker.last_heartbeat_time) == ({"load": 0.5, "gpus": []}, clock.wall())
        assert (await store.update_worker("worker", {})).heartbeat_stats == {}


async def test_a_heartbeat_names_the_attempts_that_are_lost(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        lost = await requeued_silent(store, clock, "worker")
        await claimed(store, "successor")
        ended = await started(store, "worker")
        await finish(store, ended)
        replaced = await started(store, "worker")
        await store.start_attempt(replaced.rollout_id)
        foreign = await started(store, "other")
        mine = await started(store, "worker")
        stale = [each.attempt.attempt_id for each in (lost, ended, replaced, foreign)]
        worker = await store.update_worker("worker", attempt_ids=[mine.attempt.attempt_id, *stale, "at-unknown"])
        assert worker.stale_attempt_ids == [*stale, "at-unknown"]
        assert (await store.update_worker("worker", attempt_ids=[])).stale_attempt_ids == []
        assert (await _worker(store)).stale_attempt_ids is None


async def test_a_heartbeat_is_a_sign_of_life_of_the_attempts_it_lists(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        one, two = await started(store, "worker", unresponsive_seconds=10), await started(store, "worker")
        clock.advance(6)
        await store.update_worker("worker", attempt_ids=[one.attempt.attempt_id, two.attempt.attempt_id])
        for claim in (one, two):
            attempt = await store.get_latest_attempt(claim.rollout_id)
            assert attempt is not None
            assert (attempt.status, attempt.last_heartbeat_time) == ("preparing", clock.wall())
        clock.advance(6)
        assert (await rollout_now(store, one.rollout_id)).status == "preparing"


# --- Lost workers ----------------------------------------------------------------------------------


async def test_a_worker_without_a_lease_may_be_silent_for_ever(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker")
        await store.update_worker("worker")
        clock.advance(1e9)
        assert await statuses(store, claim.rollout_id) == ("preparing", ["preparing"])
        assert await _holds(store) == ("busy", claim.attempt.attempt_id)


@pytest.mark.parametrize(
    ("policy", "rollout_status"),
    [
        ({}, "requeuing"),
        ({"retry_condition": ["unresponsive"], "max_attempts": 2}, "requeuing"),
        ({"retry_condition": ["failed", "timeout"]}, "failed"),
        ({"max_attempts": 1}, "failed"),
    ],
)
@pytest.mark.parametrize("how", ["lease", "report"])
async def test_the_attempts_of_a_lost_worker_follow_their_policy(
    stores: Stores, how: str, policy: dict[str, Any], rollout_status: str
) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker", **policy)
        await store.add_span(span_of(claim))
        other = await started(store, "other")
        if how == "lease":
            assert (await store.update_worker("worker", lease_seconds=10)).lease_seconds == 10
            clock.advance(9.75)
            assert (await rollout_now(store, claim.rollout_id)).status == "running"
            clock.advance(0.25)
        else:
            lost = await store.report_worker_lost("worker", message="exit code 137")
            assert [(each.attempt_id, each.status, each.reason_code) for each in lost] == [
                (claim.attempt.attempt_id, "unresponsive", "worker_lost")
            ]
            assert lost[0].reason_message
            assert "exit code 137" in lost[0].reason_message
        assert await statuses(store, claim.rollout_id) == (rollout_status, ["unresponsive"])
        attempt = await store.get_latest_attempt(claim.rollout_id)
        assert attempt is not None
        assert (attempt.reason_code, attempt.end_time) == ("worker_lost", clock.wall())
        assert await _holds(store) == ("unknown", None)
        assert await _holds(store, "other") == ("busy", other.attempt.attempt_id)


async def test_only_heartbeats_renew_the_lease(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker")
        await store.update_worker("worker", lease_seconds=10)
        for _ in range(3):
            clock.advance(9)
            await store.update_worker("worker")
        clock.advance(9)
        await store.add_span(span_of(claim))
        clock.advance(1)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])


async def test_a_lease_can_be_changed_with_any_heartbeat(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await started(store, "worker")
        await store.update_worker("worker", lease_seconds=1000)
        await store.update_worker("worker", lease_seconds=1)
        clock.advance(1)
        assert (await _worker(store)).status == "unknown"


async def test_a_lost_worker_that_beats_again_is_idle_and_has_a_lease_again(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.update_worker("worker", lease_seconds=10)
        clock.advance(10)
        assert await _holds(store) == ("unknown", None)
        worker = await store.update_worker("worker")
        assert (worker.status, worker.lease_seconds) == ("idle", 10)
        claim = await started(store, "worker")
        clock.advance(10)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])


async def test_all_attempts_of_a_lost_worker_are_ended(stores: Stores) -> None:
    async with stores.open() as (store, _):
        ids = await enqueued(store, *range(5), config=config())
        claims = await store.dequeue_many_rollouts(limit=5, worker_id="worker")
        await finish(store, claims[0])
        lost = await store.report_worker_lost("worker", message="gone")
        assert [attempt.attempt_id for attempt in lost] == [claim.attempt.attempt_id for claim in claims[1:]]
        assert [(await rollout_now(store, each)).status for each in ids] == ["succeeded", *["requeuing"] * 4]
        async with unchanged(store):
            assert await store.report_worker_lost("worker", message="gone, still") == []


async def test_why_a_worker_is_gone_is_told_until_it_is_back(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker")
        lost = await store.report_worker_lost("worker", message="its runner has ended", reason_code="worker_left")
        assert [(each.reason_code, each.reason_message) for each in lost] == [("worker_lost", "its runner has ended")]
        await store.report_worker_lost("worker", message="gone")  # who misses it knows less
        left = await _worker(store)
        assert (left.reason_code, left.reason_message) == ("worker_left", "its runner has ended")
        assert (await rollout_now(store, claim.rollout_id)).status != "succeeded"
        back = await store.update_worker("worker", lease_seconds=5)
        assert (back.status, back.reason_code, back.reason_message) == ("idle", None, None)
        clock.advance(6)
        silent = await _worker(store)
        assert silent.reason_code == "worker_lost"
        assert "no heartbeat for 5 s" in (silent.reason_message or "")


async def test_workers_that_are_gone_can_be_deleted(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await started(store, "at-work")
        await store.update_worker("lost", lease_seconds=5)
        await store.update_worker("without-lease")
        await store.update_worker("alive", lease_seconds=100)
        clock.advance(6)
        names = ["lost", "without-lease", "alive", "at-work", "nobody", "lost"]
        assert await store.delete_workers(names) == ["lost", "without-lease"]
        assert {each.worker_id for each in await store.query_workers()} == {"alive", "at-work"}
        assert (await store.statistics()).get("total_workers") == 2
        assert (await store.verify()).ok
        async with unchanged(store):
            assert await store.delete_workers(names) == []
        anew = await store.update_worker("lost", {"load": 1})
        assert (anew.status, anew.lease_seconds) == ("idle", None)


async def test_what_a_deleted_worker_did_is_kept(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store, "worker")
        await finish(store, claim)
        assert await store.delete_workers(["worker"]) == ["worker"]
        attempt = await store.get_latest_attempt(claim.rollout_id)
        assert attempt is not None
        assert attempt.worker_id == "worker"


async def test_what_is_no_id_deletes_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.update_worker("worker")
        async with unchanged(store):
            with pytest.raises(InvalidId):
                await store.delete_workers(["worker", "a b"])


async def test_an_unknown_worker_cannot_be_lost(stores: Stores) -> None:
    async with stores.open() as (store, _), unchanged(store):
        with pytest.raises(NotFound):
            await store.report_worker_lost("unknown", message="gone")


async def test_a_claim_renews_the_lease_of_its_worker(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await enqueued(store, "first", "second")
        await store.update_worker("worker", lease_seconds=5)
        clock.advance(4)
        first = await claimed(store, "worker")
        clock.advance(4)
        assert (await rollout_now(store, first.rollout_id)).status == "preparing"
        clock.advance(2)
        assert (await rollout_now(store, first.rollout_id)).reason_code == "worker_lost"
        second = await claimed(store, "worker")  # it is back, and has a lease again
        clock.advance(6)
        assert (await rollout_now(store, second.rollout_id)).reason_code == "worker_lost"


async def test_what_a_process_held_is_lost_when_another_registers_under_its_name(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.update_worker("worker", lease_seconds=10, registration={"pid": 1})
        old, kept = await started(store, "worker"), await started(store, "worker")
        for each in (old, kept):
            await finish(store, each, "running")
        clock.advance(9)
        await store.update_worker(
            "worker", lease_seconds=10, attempt_ids=[kept.attempt.attempt_id], registration={"pid": 2}
        )
        assert await statuses(store, old.rollout_id) == ("requeuing", ["unresponsive"])
        [lost] = await store.query_attempts(old.rollout_id)
        assert lost.reason_code == "worker_lost"
        assert await statuses(store, kept.rollout_id) == ("running", ["running"])
        assert (await claimed(store, "worker")).rollout_id == old.rollout_id


async def test_a_registration_that_was_long_on_its_way_ends_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = {"process_space": "machine", "start_time": 1.0}
        second = first | {"start_time": 2.0}
        await store.update_worker("worker", registration=second)
        await store.direct_workers("drain")
        held = await started(store, "worker")
        late = await store.update_worker("worker", registration=first)
        assert (late.registration, late.directive) == (second, "drain")
        assert await statuses(store, held.rollout_id) == ("preparing", ["preparing"])
        # That of another machine cannot be compared: its clock may be wrong.
        await store.update_worker("worker", registration=first | {"process_space": "another"})
        assert await statuses(store, held.rollout_id) == ("requeuing", ["unresponsive"])


async def test_a_lost_worker_whose_attempt_speaks_again_has_a_lease_again(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.update_worker("worker", lease_seconds=10)
        claim = await started(store, "worker")
        await finish(store, claim, "running")
        await store.report_worker_lost("worker", message="its process has ended")
        await store.add_span(span_of(claim))  # it was on its way when the process ended
        assert await statuses(store, claim.rollout_id) == ("running", ["running"])
        clock.advance(10)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])


async def test_an_attempt_that_names_no_worker_is_kept_alive_by_the_one_that_lists_it(stores: Stores) -> None:
    async with stores.open() as (store, _):
        started = await store.start_rollout("input")
        worker = await store.update_worker("worker", attempt_ids=[started.attempt.attempt_id])
        assert worker.stale_attempt_ids == []
