"""What a worker reports of its attempt, what follows for the rollout, and who is heard no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest

from agentlightning.errors import IdReused, IllegalMove, NotFound, StaleAttempt
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, AttemptStatus
from scenes import attempts_of, claimed, config, enqueued, finish, rollout_now, span_of, started, statuses
from store_state import unchanged
from stores import Stores

ATTEMPT_STATUSES: tuple[AttemptStatus, ...] = get_args(AttemptStatus)
ENDED = ("succeeded", "failed", "timeout", "unresponsive")


# --- Reports ---------------------------------------------------------------------------------------


async def test_from_preparing_over_running_to_the_end(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store)
        clock.advance(1)
        running = await finish(store, claim, "running")
        assert (running.status, running.end_time, running.last_heartbeat_time) == ("running", None, clock.wall())
        rollout = await rollout_now(store, claim.rollout_id)
        assert (rollout.status, rollout.end_time) == ("running", None)
        clock.advance(1)
        ended = await finish(store, claim)
        assert (ended.status, ended.end_time, ended.reason_code) == ("succeeded", clock.wall(), "completed")
        rollout = await rollout_now(store, claim.rollout_id)
        assert (rollout.status, rollout.end_time, rollout.reason_code) == ("succeeded", clock.wall(), "completed")
        assert rollout.reason_message
        assert isinstance(rollout, AttemptedRollout)
        assert rollout.attempt == ended


@pytest.mark.parametrize("before", ["preparing", "running"])
@pytest.mark.parametrize("to", ATTEMPT_STATUSES)
async def test_every_move_of_a_live_attempt(stores: Stores, before: AttemptStatus, to: AttemptStatus) -> None:
    async with stores.open() as (store, _):
        claim = await store.start_rollout("input")
        await finish(store, claim, before)
        if (before, to) == ("running", "preparing"):
            async with unchanged(store):
                with pytest.raises(IllegalMove):
                    await finish(store, claim, to)
            return
        attempt = await finish(store, claim, to)
        rollout_status = to if to in ("preparing", "running", "succeeded") else "failed"
        assert await statuses(store, claim.rollout_id) == (rollout_status, [to])
        assert (attempt.end_time is not None) == (attempt.reason_code is not None) == (to in ENDED)


@pytest.mark.parametrize("first", ENDED)
@pytest.mark.parametrize("then", ATTEMPT_STATUSES)
async def test_no_move_out_of_an_ended_attempt(stores: Stores, first: AttemptStatus, then: AttemptStatus) -> None:
    async with stores.open() as (store, clock):
        claim = await store.start_rollout("input")
        ended = await finish(store, claim, first)
        clock.advance(1)
        async with unchanged(store):
            if then == first:
                assert await finish(store, claim, then) == ended
            else:
                with pytest.raises(StaleAttempt):
                    await finish(store, claim, then)


@pytest.mark.parametrize("status", ["succeeded", "failed", "timeout", "unresponsive"])
async def test_a_reason_is_kept_with_attempt_and_rollout(stores: Stores, status: AttemptStatus) -> None:
    async with stores.open() as (store, _):
        claim = await store.start_rollout("input")
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        attempt = await store.update_attempt(*ids, status, reason_code="out_of_memory", reason_message="é: 17 GB")
        assert (attempt.reason_code, attempt.reason_message) == ("out_of_memory", "é: 17 GB")
        rollout = await rollout_now(store, claim.rollout_id)
        assert rollout.reason_code == "out_of_memory"
        assert rollout.reason_message
        assert "é: 17 GB" in rollout.reason_message


async def test_a_failure_without_a_reason_gets_one(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await store.start_rollout("input")
        attempt = await finish(store, claim, "failed")
        assert attempt.reason_code == "reported"
        assert attempt.reason_message


async def test_latest_stands_for_the_newest_attempt(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store)
        second = await store.start_attempt(first.rollout_id)
        attempt = await store.update_attempt(first.rollout_id, "latest", "running")
        assert attempt.attempt_id == second.attempt.attempt_id
        assert await statuses(store, first.rollout_id) == ("running", ["failed", "running"])


async def test_metadata_and_heartbeat_time_are_data(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        attempt = await store.update_attempt(*ids, metadata={"a": [1]}, last_heartbeat_time=12.5)
        assert (attempt.status, attempt.metadata, attempt.last_heartbeat_time) == ("preparing", {"a": [1]}, 12.5)
        assert (await store.update_attempt(*ids, metadata={"b": 2})).metadata == {"b": 2}
        assert (await store.update_attempt(*ids)).metadata == {"b": 2}
        assert (await store.update_attempt(*ids, metadata=None)).metadata is None


@pytest.mark.parametrize("status", ENDED)
async def test_metadata_may_be_edited_after_the_end(stores: Stores, status: AttemptStatus) -> None:
    async with stores.open() as (store, clock):
        claim = await store.start_rollout("input")
        ended = await finish(store, claim, status)
        clock.advance(1)
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        edited = await store.update_attempt(*ids, metadata={"note": 1})
        assert edited == ended.model_copy(update={"metadata": {"note": 1}})
        assert (await store.update_attempt(*ids, status, metadata={"note": 2})).metadata == {"note": 2}
        rollout = await rollout_now(store, claim.rollout_id)
        assert rollout.end_time == ended.end_time


@pytest.mark.parametrize(
    "change", [{"worker_id": "other"}, {"last_heartbeat_time": 1.0}, {"worker_id": "other", "metadata": {}}]
)
async def test_nothing_else_may_be_edited_after_the_end(stores: Stores, change: dict[str, Any]) -> None:
    async with stores.open() as (store, _):
        claim = await started(store, "worker")
        await finish(store, claim)
        async with unchanged(store):
            with pytest.raises(StaleAttempt):
                await store.update_attempt(claim.rollout_id, claim.attempt.attempt_id, **change)


async def test_unknown_attempts_are_not_found(stores: Stores) -> None:
    async with stores.open() as (store, _):
        mine, other = await started(store), await started(store)
        [waiting] = await enqueued(store, 1)
        for rollout_id, attempt_id in (
            ("ro-unknown", mine.attempt.attempt_id),
            ("ro-unknown", "latest"),
            (mine.rollout_id, "at-unknown"),
            (mine.rollout_id, other.attempt.attempt_id),
            (waiting, "latest"),
        ):
            async with unchanged(store):
                with pytest.raises(NotFound):
                    await store.update_attempt(rollout_id, attempt_id, "running")


# --- Retry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
@pytest.mark.parametrize(
    ("ends", "retry_condition", "retried"),
    [
        ("failed", ["failed"], True),
        ("timeout", ["timeout"], True),
        ("unresponsive", ["unresponsive"], True),
        ("failed", ["timeout", "unresponsive"], False),
        ("timeout", ["failed", "unresponsive"], False),
        ("unresponsive", ["failed", "timeout"], False),
        ("failed", [], False),
        ("succeeded", ["succeeded", "failed", "running", "preparing"], False),
    ],
)
async def test_retry_by_condition_and_number(
    stores: Stores, ends: AttemptStatus, retry_condition: list[AttemptStatus], retried: bool, max_attempts: int
) -> None:
    async with stores.open() as (store, _):
        policy = config(max_attempts=max_attempts, retry_condition=retry_condition)
        [rollout_id] = await enqueued(store, "input", config=policy)
        expected = max_attempts if retried else 1
        for number in range(1, expected + 1):
            claim = await claimed(store)
            assert (claim.rollout_id, claim.attempt.sequence_id) == (rollout_id, number)
            await finish(store, claim, ends)
            rollout = await rollout_now(store, rollout_id)
            if number < expected:
                assert (rollout.status, rollout.end_time, rollout.reason_code) == ("requeuing", None, None)
        assert await store.dequeue_rollout() is None
        final = "succeeded" if ends == "succeeded" else "failed"
        assert await statuses(store, rollout_id) == (final, [ends] * expected)


async def test_a_retry_may_succeed(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store)
        await finish(store, first, "failed")
        await finish(store, await claimed(store))
        assert await statuses(store, first.rollout_id) == ("succeeded", ["failed", "succeeded"])


# --- Attempts started by hand ----------------------------------------------------------------------


async def test_a_new_attempt_supersedes_a_live_one(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store, "old")
        await finish(store, first, "running")
        second = await store.start_attempt(first.rollout_id, "new", attempt_id="at-mine")
        assert isinstance(second, AttemptedRollout)
        assert (second.attempt.attempt_id, second.attempt.sequence_id, second.attempt.worker_id) == (
            "at-mine",
            2,
            "new",
        )
        assert await statuses(store, first.rollout_id) == ("preparing", ["failed", "preparing"])
        replaced = (await attempts_of(store, first.rollout_id))[0]
        assert replaced.reason_code == "superseded"
        assert replaced.end_time is not None


async def test_a_new_attempt_takes_a_waiting_rollout_out_of_the_queue(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [fresh] = await enqueued(store, "fresh")
        assert (await store.start_attempt(fresh)).attempt.sequence_id == 1
        retried = await started(store)
        await finish(store, retried, "failed")
        assert (await store.start_attempt(retried.rollout_id)).attempt.sequence_id == 2
        assert await store.dequeue_rollout() is None


async def test_a_new_attempt_may_exceed_the_number_that_is_allowed(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store, max_attempts=1)
        second = await store.start_attempt(first.rollout_id)
        third = await store.start_attempt(first.rollout_id)
        assert [second.attempt.sequence_id, third.attempt.sequence_id] == [2, 3]
        await finish(store, third, "failed")
        assert (await rollout_now(store, first.rollout_id)).status == "failed"


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
async def test_no_new_attempt_of_a_rollout_that_has_ended(stores: Stores, status: Any) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, 1)
        await store.update_rollout(rollout_id, status=status)
        async with unchanged(store):
            with pytest.raises(IllegalMove):
                await store.start_attempt(rollout_id, "worker")
            with pytest.raises(NotFound):
                await store.start_attempt("ro-unknown", "worker")


async def test_an_attempt_id_belongs_to_one_rollout_and_worker(stores: Stores) -> None:
    async with stores.open() as (store, _):
        one, other = await enqueued(store, 1, 2)
        await store.start_attempt(one, "worker", attempt_id="at-mine")
        async with unchanged(store):
            for rollout_id, worker_id in ((other, "worker"), (one, "other"), (one, None)):
                with pytest.raises(IdReused):
                    await store.start_attempt(rollout_id, worker_id, attempt_id="at-mine")
            with pytest.raises(IdReused):
                await store.start_rollout("input", attempt_id="at-mine")


# --- Zombies (G4) ----------------------------------------------------------------------------------


async def _supersede(store: LightningStore, zombie: AttemptedRollout) -> None:
    await store.start_attempt(zombie.rollout_id, "successor")


async def _fail_and_claim_again(store: LightningStore, zombie: AttemptedRollout) -> None:
    await finish(store, zombie, "unresponsive")
    await claimed(store, "successor")


async def _cancel(store: LightningStore, zombie: AttemptedRollout) -> None:
    await store.cancel_rollout(zombie.rollout_id)


async def _put_back(store: LightningStore, zombie: AttemptedRollout) -> None:
    await store.update_rollout(zombie.rollout_id, status="requeuing")


@pytest.mark.parametrize("bury", [_supersede, _fail_and_claim_again, _cancel, _put_back])
@pytest.mark.parametrize("status", ["running", "succeeded", "timeout"])
async def test_a_stale_attempt_changes_nothing_any_more(stores: Stores, bury: Any, status: AttemptStatus) -> None:
    async with stores.open() as (store, clock):
        zombie = await started(store, "zombie")
        await bury(store, zombie)
        clock.advance(1)
        async with unchanged(store):
            with pytest.raises(StaleAttempt, match=zombie.attempt.attempt_id):
                await finish(store, zombie, status)


@pytest.mark.parametrize("bury", [_supersede, _fail_and_claim_again, _cancel, _put_back])
async def test_its_late_spans_are_kept_under_it_and_change_nothing_else(stores: Stores, bury: Any) -> None:
    async with stores.open() as (store, clock):
        zombie = await started(store, "zombie")
        await bury(store, zombie)
        before = await _records(store, zombie.rollout_id)
        clock.advance(1)
        late = await store.add_span(span_of(zombie, name="agentlightning.reward", attributes={"reward": 1.0}))
        assert late is not None
        assert late.sequence_id == 1
        assert await _records(store, zombie.rollout_id) == before
        rollout = await rollout_now(store, zombie.rollout_id)
        assert isinstance(rollout, AttemptedRollout)
        of_latest = list(await store.query_spans(zombie.rollout_id, "latest"))
        assert of_latest == ([late] if rollout.attempt.attempt_id == zombie.attempt.attempt_id else [])
        assert list(await store.query_spans(zombie.rollout_id, zombie.attempt.attempt_id)) == [late]


async def _records(store: LightningStore, rollout_id: str) -> Sequence[Any]:
    return [await rollout_now(store, rollout_id), await attempts_of(store, rollout_id), *await store.query_workers()]
