"""What callers change about a rollout directly, and that its end is the end (G5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import pytest

from agentlightning.errors import IllegalMove, NotFound
from agentlightning.store.base import is_finished, is_queuing, is_running
from agentlightning.types import AttemptedRollout, Rollout, RolloutConfig, RolloutStatus
from scenes import attempts_of, claimed, config, enqueued, finish, prompt, rollout_in, rollout_now, started, statuses
from store_state import unchanged
from stores import Stores

ROLLOUT_STATUSES: tuple[RolloutStatus, ...] = get_args(RolloutStatus)
FINAL: tuple[RolloutStatus, ...] = ("succeeded", "failed", "cancelled")
CALLER_MOVES: Mapping[RolloutStatus, tuple[RolloutStatus, ...]] = {
    "queuing": FINAL,
    "preparing": ("running", "requeuing", *FINAL),
    "running": ("requeuing", *FINAL),
    "requeuing": FINAL,
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}
"""From each status to those that a caller may set. The one it has already is a repeat."""


@pytest.mark.parametrize("to", ROLLOUT_STATUSES)
@pytest.mark.parametrize("before", ROLLOUT_STATUSES)
async def test_every_move_that_a_caller_may_ask_for(stores: Stores, before: RolloutStatus, to: RolloutStatus) -> None:
    async with stores.open() as (store, clock):
        rollout = await rollout_in(store, before)
        clock.advance(1)
        if to == before:
            async with unchanged(store):
                assert await store.update_rollout(rollout.rollout_id, status=to) == rollout
        elif to not in CALLER_MOVES[before]:
            async with unchanged(store):
                with pytest.raises(IllegalMove, match=before):
                    await store.update_rollout(rollout.rollout_id, status=to)
        else:
            moved = await store.update_rollout(rollout.rollout_id, status=to)
            assert await rollout_now(store, rollout.rollout_id) == moved
            _assert_moved(rollout, moved, to, clock.wall())


def _assert_moved(before: Rollout, after: Rollout, to: RolloutStatus, now: float) -> None:
    assert after.status == to
    assert (after.end_time, after.reason_code is None) == ((now, False) if to in FINAL else (None, True))
    if isinstance(before, AttemptedRollout):
        assert isinstance(after, AttemptedRollout)
        if before.status in ("preparing", "running") and to != "running":
            assert after.attempt.status == ("succeeded" if to == "succeeded" else "failed")
            assert after.attempt.end_time == now
            assert after.attempt.reason_code is not None
        elif to == "running":
            assert after.attempt.status == "running"
        else:
            assert after.attempt == before.attempt


async def test_a_rollout_put_back_is_claimed_again(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store, "worker", max_attempts=1)
        await store.update_rollout(first.rollout_id, status="requeuing")
        [old] = await attempts_of(store, first.rollout_id)
        assert (old.status, old.reason_code) == ("failed", "requeued")
        again = await claimed(store)
        assert (again.rollout_id, again.attempt.sequence_id) == (first.rollout_id, 2)


async def test_a_reason_may_be_given(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        rollout = await store.update_rollout(
            claim.rollout_id, status="failed", reason_code="bad_data", reason_message="row 7 is empty"
        )
        assert (rollout.reason_code, rollout.reason_message) == ("bad_data", "row 7 is empty")
        [attempt] = await attempts_of(store, claim.rollout_id)
        assert (attempt.reason_code, attempt.reason_message) == ("bad_data", "row 7 is empty")


@pytest.mark.parametrize(
    ("status", "code"), [("succeeded", "completed"), ("failed", "reported"), ("cancelled", "cancelled")]
)
async def test_a_code_goes_with_each_end(stores: Stores, status: RolloutStatus, code: str) -> None:
    async with stores.open() as (store, _):
        silent, told = await enqueued(store, 1, 2)
        assert (await store.update_rollout(silent, status=status)).reason_code == code
        rollout = await store.update_rollout(told, status=status, reason_message="because")
        assert (rollout.reason_code, rollout.reason_message) == (code, "because")


# --- Fields ----------------------------------------------------------------------------------------

NEW_FIELDS: Mapping[str, Any] = {
    "input": {"other": [1, 2]},
    "mode": "test",
    "resources_id": "rs-new",
    "config": RolloutConfig(max_attempts=7, retry_condition=["failed"], timeout_seconds=3),
    "metadata": {"a": 1},
}


@pytest.mark.parametrize("status", ["queuing", "preparing", "running", "requeuing"])
@pytest.mark.parametrize("field", NEW_FIELDS)
async def test_only_what_is_given_changes(stores: Stores, field: str, status: RolloutStatus) -> None:
    async with stores.open() as (store, _):
        before = await rollout_in(store, status)
        await store.add_resources({"p": prompt("new")}, resources_id="rs-new")
        after = await store.update_rollout(before.rollout_id, **{field: NEW_FIELDS[field]})
        changes = {field: NEW_FIELDS[field]} | ({"resources_version": 1} if field == "resources_id" else {})
        assert after == before.model_copy(update=changes)
        assert await rollout_now(store, before.rollout_id) == after


async def test_nothing_given_changes_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        rollout = await rollout_in(store, "running")
        async with unchanged(store):
            assert await store.update_rollout(rollout.rollout_id) == rollout


async def test_none_is_a_value(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.add_resources({}, resources_id="rs-1")
        rollout = await store.enqueue_rollout("input", "train", "rs-1", metadata={"a": 1})
        after = await store.update_rollout(rollout.rollout_id, input=None, mode=None, resources_id=None, metadata=None)
        assert (after.input, after.mode, after.metadata) == (None, None, None)
        assert (after.resources_id, after.resources_version) == (None, None)


async def test_a_claim_gets_the_changed_rollout(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, "old")
        await store.update_rollout(rollout_id, input="new", config=config(max_attempts=2))
        claim = await claimed(store)
        assert (claim.input, claim.config.max_attempts) == ("new", 2)


async def test_fields_and_status_change_together_or_not_at_all(stores: Stores) -> None:
    async with stores.open() as (store, _):
        rollout = await rollout_in(store, "running")
        async with unchanged(store):
            with pytest.raises(IllegalMove):
                await store.update_rollout(rollout.rollout_id, input="new", metadata={}, status="preparing")
            with pytest.raises(NotFound):
                await store.update_rollout(rollout.rollout_id, input="new", resources_id="rs-unknown", status="failed")
        after = await store.update_rollout(rollout.rollout_id, input="new", status="failed")
        assert (after.input, after.status) == ("new", "failed")


@pytest.mark.parametrize("status", FINAL)
async def test_after_the_end_only_metadata_may_change(stores: Stores, status: RolloutStatus) -> None:
    async with stores.open() as (store, clock):
        before = await rollout_in(store, status)
        await store.add_resources({}, resources_id="rs-new")
        clock.advance(1)
        async with unchanged(store):
            for field, value in NEW_FIELDS.items():
                if field != "metadata":
                    with pytest.raises(IllegalMove, match=field):
                        await store.update_rollout(before.rollout_id, **{field: value, "metadata": {"x": 1}})
            same = {field: getattr(before, field) for field in NEW_FIELDS}
            assert await store.update_rollout(before.rollout_id, status=status, **same) == before
        after = await store.update_rollout(before.rollout_id, metadata={"note": "late"})
        assert after == before.model_copy(update={"metadata": {"note": "late"}})


# --- Cancel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["queuing", "preparing", "running", "requeuing"])
async def test_a_rollout_can_be_cancelled_before_its_end(stores: Stores, status: RolloutStatus) -> None:
    async with stores.open() as (store, clock):
        before = await rollout_in(store, status)
        clock.advance(1)
        rollout = await store.cancel_rollout(before.rollout_id, message="not needed any more")
        assert (rollout.status, rollout.end_time) == ("cancelled", clock.wall())
        assert (rollout.reason_code, rollout.reason_message) == ("cancelled", "not needed any more")
        assert await store.dequeue_rollout() is None
        if status in ("preparing", "running"):
            attempt = (await attempts_of(store, before.rollout_id))[-1]
            assert (attempt.status, attempt.reason_code, attempt.end_time) == ("failed", "cancelled", clock.wall())
        async with unchanged(store):
            assert await store.cancel_rollout(before.rollout_id, message="again") == rollout


async def test_cancelling_says_something_without_a_message(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, 1)
        assert (await store.cancel_rollout(rollout_id)).reason_message


@pytest.mark.parametrize("status", ["succeeded", "failed"])
async def test_what_has_ended_otherwise_cannot_be_cancelled(stores: Stores, status: RolloutStatus) -> None:
    async with stores.open() as (store, _):
        rollout = await rollout_in(store, status)
        async with unchanged(store):
            with pytest.raises(IllegalMove, match=status):
                await store.cancel_rollout(rollout.rollout_id)
            with pytest.raises(NotFound):
                await store.cancel_rollout("ro-unknown")
            with pytest.raises(NotFound):
                await store.update_rollout("ro-unknown", metadata={})


async def test_a_cancelled_rollout_frees_its_worker(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store, "worker")
        await store.cancel_rollout(claim.rollout_id)
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert (worker.status, worker.current_attempt_id) == ("idle", None)


# --- Finality --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", FINAL)
async def test_time_changes_nothing_after_the_end(stores: Stores, status: RolloutStatus) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker", timeout_seconds=10, unresponsive_seconds=5)
        await store.update_worker("worker", lease_seconds=20)
        await store.update_rollout(claim.rollout_id, status=status)
        before = await statuses(store, claim.rollout_id)
        clock.advance(1000)
        assert await statuses(store, claim.rollout_id) == before
        assert await store.dequeue_rollout() is None


async def test_the_end_of_an_attempt_does_not_reopen_its_rollout(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store)
        await finish(store, first, "failed")
        await store.cancel_rollout(first.rollout_id)
        await finish(store, first, "failed")
        assert await statuses(store, first.rollout_id) == ("cancelled", ["failed"])


@pytest.mark.parametrize("status", ROLLOUT_STATUSES)
async def test_each_status_is_one_of_waiting_running_or_finished(stores: Stores, status: RolloutStatus) -> None:
    async with stores.open() as (store, _):
        rollout = await rollout_in(store, status)
        assert is_queuing(rollout) == (status in ("queuing", "requeuing"))
        assert is_running(rollout) == (status in ("preparing", "running"))
        assert is_finished(rollout) == (status in FINAL)
