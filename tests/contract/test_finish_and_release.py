"""``finish_attempt``: spans, report and next claim in one call. ``release_attempt``: a claim that is given back."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from agentlightning.errors import IdReused, IllegalMove, InvalidId, InvalidValue, NotFound, StaleAttempt
from agentlightning.store.base import LightningStore
from agentlightning.types import Attempt, AttemptedRollout, AttemptEnd, FinishedAttempt, Span
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
from store_state import dump, unchanged
from stores import Stores


async def ended_at_once(
    store: LightningStore, claim: AttemptedRollout, status: AttemptEnd = "succeeded", *spans: Span, **arguments: Any
) -> FinishedAttempt:
    return await store.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, status, spans, **arguments)


async def given_back(store: LightningStore, claim: AttemptedRollout) -> Attempt:
    return await store.release_attempt(claim.rollout_id, claim.attempt.attempt_id)


def ids_of(claims: list[AttemptedRollout]) -> list[str]:
    return [claim.attempt.attempt_id for claim in claims]


# --- Finish ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["finish", "update"])
@pytest.mark.parametrize(
    ("conditions", "retry", "then"),
    [
        ([], None, ["failed"]),
        ([], True, ["requeuing", "failed"]),
        (["failed"], None, ["requeuing", "failed"]),
        (["failed"], False, ["failed"]),
    ],
)
async def test_a_wish_goes_before_the_retry_condition_within_max_attempts(
    stores: Stores, by: str, conditions: Any, retry: bool | None, then: list[str]
) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, config=config(max_attempts=2, retry_condition=conditions))
        for expected in then:
            claim = await claimed(store, "worker")
            ids = claim.rollout_id, claim.attempt.attempt_id
            told: dict[str, Any] = {"reason_code": "flaky_site", "retry": retry}
            for _ in range(2):  # a repeat changes nothing
                if by == "finish":
                    await store.finish_attempt(*ids, "failed", **told)
                else:
                    await store.update_attempt(*ids, "failed", **told)
            assert (await rollout_now(store, claim.rollout_id)).status == expected
        assert (await rollout_now(store, claim.rollout_id)).reason_code == "flaky_site"
        assert (await store.verify()).ok


@pytest.mark.parametrize(("status", "retry"), [("succeeded", True), ("failed", 1), ("failed", "no")])
async def test_a_wish_that_cannot_be_meant_is_refused(stores: Stores, status: Any, retry: Any) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1)
        claim = await claimed(store, "worker")
        async with unchanged(store):
            with pytest.raises(InvalidValue):
                await ended_at_once(store, claim, status, retry=retry)


async def test_one_call_stores_ends_and_claims(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2, 3)
        claim = await claimed(store, "worker", request_id="rq-1")
        spans = [span_of(claim), span_of(claim, sequence_id=7), span_of(claim)]
        done = await ended_at_once(
            store, claim, "succeeded", *spans, metadata={"k": 1}, claim_limit=1, worker_id="worker", request_id="rq-2"
        )
        assert done.sequence_ids == [1, 7, 8]
        assert done.attempt == await store.get_latest_attempt(claim.rollout_id)
        assert (done.attempt.status, done.attempt.reason_code, done.attempt.metadata) == (
            "succeeded",
            "completed",
            {"k": 1},
        )
        assert (await rollout_now(store, claim.rollout_id)).status == "succeeded"
        stored = await store.query_spans(claim.rollout_id)
        assert [span.span_id for span in stored] == [span.span_id for span in spans]
        [following] = done.claimed
        assert (following.input, following.status, following.attempt.worker_id) == (2, "preparing", "worker")
        assert await rollout_now(store, following.rollout_id) == following
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert (worker.status, worker.current_attempt_id) == ("busy", following.attempt.attempt_id)


@pytest.mark.parametrize("status", get_args(AttemptEnd))
async def test_it_ends_as_update_attempt_would(stores: Stores, status: AttemptEnd) -> None:
    async with stores.open() as (store, _):
        one, other = await started(store, "worker"), await started(store, "worker")
        done = await ended_at_once(store, one, status, reason_code="broken", reason_message="it broke")
        same = await store.update_attempt(
            other.rollout_id, other.attempt.attempt_id, status, reason_code="broken", reason_message="it broke"
        )
        ids = {"rollout_id", "attempt_id", "last_heartbeat_time", "start_time"}
        assert done.attempt.model_dump(exclude=ids) == same.model_dump(exclude=ids)
        assert await statuses(store, one.rollout_id) == await statuses(store, other.rollout_id)
        assert (done.sequence_ids, done.claimed) == ([], [])


async def test_a_repeat_has_the_effect_of_one_call(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, *range(5))
        claim = await claimed(store, "worker", request_id="rq-1")
        spans = [span_of(claim), span_of(claim)]
        arguments: dict[str, Any] = {"claim_limit": 2, "worker_id": "worker", "request_id": "rq-2"}
        first = await ended_at_once(store, claim, "failed", *spans, reason_message="it broke", **arguments)
        assert first.sequence_ids == [1, 2]
        async with unchanged(store):
            again = await ended_at_once(store, claim, "failed", *spans, reason_message="it broke", **arguments)
        assert again == first.model_copy(update={"sequence_ids": [0, 0]})


async def test_a_repeat_is_told_so_after_the_retry_was_claimed_too(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, "input", config=config())
        claim = await claimed(store, "worker")
        arguments: dict[str, Any] = {"claim_limit": 1, "worker_id": "worker", "request_id": "rq-2"}
        first = await ended_at_once(store, claim, "failed", **arguments)
        assert await statuses(store, rollout_id) == ("preparing", ["failed", "preparing"])
        assert await ended_at_once(store, claim, "failed", **arguments) == first
        assert await statuses(store, rollout_id) == ("preparing", ["failed", "preparing"])


@pytest.mark.parametrize("request_id", ["rq-2", None])
async def test_a_late_repeat_claims_nothing_new(stores: Stores, request_id: str | None) -> None:
    async with stores.open() as (store, _):
        claim = await started(store, "worker")
        arguments: dict[str, Any] = {"claim_limit": 1, "worker_id": "worker", "request_id": request_id}
        assert (await ended_at_once(store, claim, **arguments)).claimed == []
        [rollout_id] = await enqueued(store, "later")
        assert (await ended_at_once(store, claim, **arguments)).claimed == []
        assert await statuses(store, rollout_id) == ("queuing", [])


async def test_a_dequeue_with_the_same_request_gets_the_same_attempts(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2, 3)
        claim = await claimed(store, "worker", request_id="rq-1")
        done = await ended_at_once(store, claim, claim_limit=1, worker_id="worker", request_id="rq-2")
        same = await claimed(store, "worker", request_id="rq-2")
        assert [same.attempt.attempt_id] == ids_of(done.claimed)
        with pytest.raises(IdReused, match="rq-2"):
            await ended_at_once(store, claim, claim_limit=2, worker_id="worker", request_id="rq-2")


async def test_it_claims_only_what_is_asked_for(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2)
        claim = await claimed(store, "worker", request_id="rq-1")
        done = await ended_at_once(store, claim, worker_id="worker", request_id="rq-2")
        assert done.claimed == []
        assert (await claimed(store)).input == 2


async def test_it_does_not_wait_for_a_rollout(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store, "worker")
        done = await ended_at_once(store, claim, claim_limit=1, worker_id="worker", request_id="rq-2")
        assert done.claimed == []
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert worker.status == "idle"


@pytest.mark.parametrize("directive", ["drain", "stop"])
async def test_a_worker_that_is_to_leave_claims_nothing(stores: Stores, directive: Any) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2)
        claim = await claimed(store, "worker", request_id="rq-1")
        await store.direct_workers(directive)
        done = await ended_at_once(store, claim, claim_limit=1, worker_id="worker", request_id="rq-2")
        assert (done.attempt.status, done.claimed) == ("succeeded", [])
        assert (await claimed(store, "other")).input == 2


async def test_a_stale_attempt_keeps_its_spans_and_does_nothing_else(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "first")
        lost = await claimed(store, "worker", request_id="rq-1")
        await store.add_span(span_of(lost))
        successor = await store.start_attempt(rollout_id, "other")
        await enqueued(store, "second")
        before = await dump(store)
        span = span_of(lost)
        for _ in range(2):
            with pytest.raises(StaleAttempt, match="stop working on it"):
                await ended_at_once(
                    store, lost, "succeeded", span, metadata={"k": 1}, claim_limit=1, worker_id="worker",
                    request_id="rq-2",
                )  # fmt: skip
        after = await dump(store)
        late = [each for each in after[f"spans of {rollout_id}"] if each["span_id"] == span.span_id]
        assert [(each["attempt_id"], each["sequence_id"]) for each in late] == [(lost.attempt.attempt_id, 2)]
        for state in (before, after):
            del state[f"spans of {rollout_id}"]
            del state["statistics"]["total_spans"], state["statistics"]["total_span_bytes"]
        assert after == before
        assert await store.get_latest_attempt(rollout_id) == successor.attempt
        assert (await store.add_span(span_of(lost))).sequence_id == 3  # pyright: ignore[reportOptionalMemberAccess]
        clock.advance(1)


async def test_one_that_fell_silent_still_says_how_it_ended(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        silent = await requeued_silent(store, clock)
        done = await ended_at_once(store, silent, "succeeded", span_of(silent))
        assert (done.sequence_ids, done.attempt.status) == ([2], "succeeded")
        assert await statuses(store, silent.rollout_id) == ("succeeded", ["succeeded"])


async def test_it_is_the_first_sign_of_life_of_a_claim(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await enqueued(store, "input")
        claim = await claimed(store, "worker", request_id="rq-1")
        clock.advance(1)
        done = await ended_at_once(store, claim, "succeeded", span_of(claim))
        assert done.attempt.last_heartbeat_time == clock.wall()
        clock.advance(ANY_LEASE)
        assert await statuses(store, claim.rollout_id) == ("succeeded", ["succeeded"])


async def test_what_it_claims_has_to_be_confirmed(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [_, second] = await enqueued(store, 1, 2, config=config(max_attempts=1))
        claim = await claimed(store, "worker", request_id="rq-1")
        await ended_at_once(store, claim, claim_limit=1, worker_id="worker", request_id="rq-2")
        clock.advance(ANY_LEASE)
        assert await statuses(store, second) == ("requeuing", ["unresponsive"])
        again = await claimed(store, "other")
        await finish(store, again, "failed")
        assert await statuses(store, second) == ("failed", ["unresponsive", "failed"])


async def test_what_it_claims_without_a_request_needs_no_confirmation(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [_, second] = await enqueued(store, 1, 2)
        claim = await claimed(store, "worker")
        await ended_at_once(store, claim, claim_limit=1, worker_id="worker")
        clock.advance(1_000_000)
        assert await statuses(store, second) == ("preparing", ["preparing"])


async def test_a_refused_call_changes_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1, 2, 3)
        claim = await claimed(store, "worker", request_id="rq-1")
        other = await claimed(store, "worker", request_id="rq-2")
        own = span_of(claim)
        async with unchanged(store):
            for wrong in ("preparing", "running", "cancelled", 7):
                with pytest.raises(InvalidValue, match="status"):
                    await ended_at_once(store, claim, wrong, own)  # type: ignore[arg-type]
            with pytest.raises(InvalidValue, match="is of attempt"):
                await ended_at_once(store, claim, "succeeded", own, span_of(other))
            for limit in (-1, 1001, True, "1"):
                with pytest.raises(InvalidValue, match="claim_limit"):
                    await ended_at_once(store, claim, "succeeded", own, claim_limit=limit)
            with pytest.raises(IdReused, match="rq-1"):
                await ended_at_once(store, claim, "succeeded", own, claim_limit=2, worker_id="w", request_id="rq-1")
            with pytest.raises(InvalidId):
                await store.finish_attempt(claim.rollout_id, "latest", "succeeded")
            with pytest.raises(InvalidId):
                await ended_at_once(store, claim, "succeeded", own, claim_limit=1, request_id="no id")
            for code in ("unconfirmed", "released"):
                with pytest.raises(InvalidValue, match=code):
                    await ended_at_once(store, claim, "unresponsive", reason_code=code)
            with pytest.raises(NotFound):
                await store.finish_attempt(claim.rollout_id, "at-unknown", "succeeded")
            with pytest.raises(NotFound):
                await store.finish_attempt("ro-unknown", claim.attempt.attempt_id, "succeeded")


# --- Release ---------------------------------------------------------------------------------------


async def test_what_is_released_can_be_claimed_at_once_at_its_old_place(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first, *_ = await enqueued(store, 1, 2, 3)
        claim = await claimed(store, "worker", request_id="rq-1")
        released = await given_back(store, claim)
        assert released == await store.get_latest_attempt(first)
        assert (released.status, released.reason_code) == ("unresponsive", "released")
        assert await statuses(store, first) == ("requeuing", ["unresponsive"])
        again = await claimed(store, "other", request_id="rq-2")
        assert (again.rollout_id, again.attempt.sequence_id) == (first, 2)
        assert [(await claimed(store)).input for _ in range(2)] == [2, 3]
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert (worker.status, worker.current_attempt_id) == ("idle", None)


async def test_releasing_uses_up_neither_attempts_nor_redeliveries(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        [rollout_id] = await enqueued(store, "input", config=config(max_attempts=2, retry_condition=["failed"]))
        for number in range(6):
            await given_back(store, await claimed(store, request_id=f"rq-{number}"))
        for number in range(3):
            await claimed(store, request_id=f"lost-{number}")
            clock.advance(ANY_LEASE)
        for _ in range(2):
            await finish(store, await claimed(store), "failed")
        rollout = await rollout_now(store, rollout_id)
        assert (rollout.status, rollout.reason_code) == ("failed", "reported")
        codes = [attempt.reason_code for attempt in await attempts_of(store, rollout_id)]
        assert codes == ["released"] * 6 + ["unconfirmed"] * 3 + ["reported"] * 2


@pytest.mark.parametrize("again", [False, True])
async def test_a_release_can_be_repeated(stores: Stores, again: bool) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1)
        claim = await claimed(store, "worker", request_id="rq-1")
        released = await given_back(store, claim)
        if again:
            await claimed(store, "other")
        async with unchanged(store):
            assert await given_back(store, claim) == released


async def test_one_that_was_released_never_comes_back(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [rollout_id] = await enqueued(store, 1)
        claim = await claimed(store, "worker", request_id="rq-1")
        await given_back(store, claim)
        attempt_id = claim.attempt.attempt_id
        worker = await store.update_worker("worker", attempt_ids=[attempt_id])
        assert worker.stale_attempt_ids == [attempt_id]
        with pytest.raises(StaleAttempt):
            await finish(store, claim, "running")
        with pytest.raises(StaleAttempt):
            await ended_at_once(store, claim, "succeeded", span_of(claim))
        await store.add_span(span_of(claim))
        assert await store.dequeue_many_rollouts(worker_id="worker", request_id="rq-1") == []
        assert await statuses(store, rollout_id) == ("requeuing", ["unresponsive"])


async def test_work_that_has_begun_cannot_be_released(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await enqueued(store, 1)
        claim = await claimed(store, "worker", request_id="rq-1")
        await finish(store, claim, "running")
        async with unchanged(store):
            with pytest.raises(IllegalMove, match="begun"):
                await given_back(store, claim)


async def test_what_was_lost_or_never_was_cannot_be_released(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await enqueued(store, 1)
        claim = await claimed(store, "worker", request_id="rq-1")
        clock.advance(ANY_LEASE)
        done = await started(store)
        await finish(store, done)
        with pytest.raises(StaleAttempt):
            await given_back(store, claim)
        with pytest.raises(StaleAttempt):
            await given_back(store, done)
        with pytest.raises(NotFound):
            await store.release_attempt(claim.rollout_id, "at-unknown")
        with pytest.raises(NotFound):
            await store.release_attempt("ro-unknown", claim.attempt.attempt_id)
        with pytest.raises(InvalidId):
            await store.release_attempt(claim.rollout_id, "latest")


# --- A runner that claims ahead, and dies -----------------------------------------------------------


async def _working_and_ahead(store: LightningStore, rollouts: int = 2) -> list[AttemptedRollout]:
    """A worker that works on one rollout, and has claimed another that it has not begun."""
    await enqueued(store, *range(rollouts), config=config(max_attempts=1, retry_condition=[]))
    working = await claimed(store, "worker", request_id="rq-1")
    await store.add_span(span_of(working))
    return [working, await claimed(store, "worker", request_id="rq-2")]


async def test_what_a_dead_runner_had_claimed_ahead_is_handed_on_at_once(stores: Stores) -> None:
    async with stores.open() as (store, _):
        working, ahead = await _working_and_ahead(store)
        await store.report_worker_lost("worker", message="killed")
        assert await statuses(store, working.rollout_id) == ("failed", ["unresponsive"])
        again = await claimed(store, "other")
        assert (again.rollout_id, again.attempt.sequence_id) == (ahead.rollout_id, 2)
        assert await store.dequeue_rollout("third") is None
        await finish(store, again)
        assert await statuses(store, ahead.rollout_id) == ("succeeded", ["unresponsive", "succeeded"])


async def test_what_a_dead_runner_was_not_at_work_on_is_given_back(stores: Stores) -> None:
    """However often that happens; what it had begun, and not confirmed, is lost."""
    async with stores.open() as (store, _):
        [fatal] = await enqueued(store, "fatal", config=config(max_attempts=1, retry_condition=[]))
        [ahead] = await enqueued(store, "ahead")
        begun = await claimed(store, "worker", request_id="rq-0")
        held = await claimed(store, "worker", request_id="rq-1")
        lost = await store.report_worker_lost("worker", message="killed", attempt_ids=[begun.attempt.attempt_id])
        assert [(each.attempt_id, each.status, each.reason_code) for each in lost] == [
            (begun.attempt.attempt_id, "unresponsive", "worker_lost"),
            (held.attempt.attempt_id, "unresponsive", "released"),
        ]
        assert lost[0].reason_message == "killed"
        for number in range(2, 9):  # more often than a claim may stay unconfirmed
            held = await claimed(store, "worker", request_id=f"rq-{number}")
            await store.report_worker_lost("worker", message="killed", attempt_ids=[])
        assert (await rollout_now(store, fatal)).status == "failed"
        assert (await rollout_now(store, ahead)).status == "requeuing"
        assert {each.reason_code for each in await store.query_attempts(ahead)} == {"released"}


async def test_what_a_dead_runner_had_claimed_ahead_is_handed_on_after_its_short_lease(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        working, ahead = await _working_and_ahead(store)
        clock.advance(ANY_LEASE)
        assert await statuses(store, working.rollout_id) == ("running", ["running"])  # no lease was asked for
        again = await claimed(store, "other")
        assert (again.rollout_id, again.attempt.sequence_id) == (ahead.rollout_id, 2)
        await store.report_worker_lost("worker", message="killed")  # the same death, learnt of later
        assert await store.dequeue_rollout("third") is None
        assert await statuses(store, ahead.rollout_id) == ("preparing", ["unresponsive", "preparing"])


async def test_what_a_runner_gave_back_before_it_died_is_handed_on_once(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        _, ahead = await _working_and_ahead(store)
        await given_back(store, ahead)
        again = await claimed(store, "other")
        assert again.rollout_id == ahead.rollout_id
        await store.report_worker_lost("worker", message="killed")
        clock.advance(ANY_LEASE)
        assert await store.dequeue_rollout("third") is None
        assert await statuses(store, ahead.rollout_id) == ("preparing", ["unresponsive", "preparing"])
        await finish(store, again, "failed")
        assert await statuses(store, ahead.rollout_id) == ("failed", ["unresponsive", "failed"])
