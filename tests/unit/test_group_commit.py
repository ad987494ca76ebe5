"""Operations that share a commit: each keeps or loses its own effects, whatever the others do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agentlightning import InMemoryLightningStore, SqliteLightningStore
from agentlightning.errors import NotFound, StoreClosed, StoreStopped
from agentlightning.store.backend import Transaction
from agentlightning.store.engine import EngineStore
from agentlightning.store.operations.attempts import ClaimRequest
from agentlightning.store.sqlite.backend import SqliteBackend
from agentlightning.store.sqlite.guarded import GuardedTransaction
from agentlightning.store.sqlite.transaction import SqliteTransaction
from agentlightning.store.waits import ClaimWaiters
from agentlightning.types import Span


def span(rollout_id: str, attempt_id: str, number: int) -> Span:
    return Span.from_attributes(
        rollout_id=rollout_id, attempt_id=attempt_id, span_id=f"{number:016x}", attributes={"number": number}
    )


async def test_an_operation_that_fails_after_it_has_written_is_undone_alone(tmp_path: Path) -> None:
    async with SqliteLightningStore(tmp_path / "store.db") as store:
        started = await asyncio.gather(*(store.start_rollout(n) for n in range(8)))
        owners = [(each.rollout_id, each.attempt.attempt_id) for each in started]
        calls: list[Awaitable[object]] = []
        for n, owner in enumerate(owners):
            calls.append(store.add_many_spans([span(*owner, 1)]))
            # Writes a span of a known attempt first, then comes to one that is not there.
            calls.append(store.add_many_spans([span(*owner, 2), span(owner[0], "at-unknown", 3)]))
            calls.append(store.enqueue_rollout({"n": n}, rollout_id=f"ro-{n}"))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results[1::3]] == [NotFound] * 8
        assert not any(isinstance(result, BaseException) for result in (*results[0::3], *results[2::3]))
        for rollout_id, _ in owners:
            assert [each.span_id for each in await store.query_spans(rollout_id)] == [f"{1:016x}"]
        # What was read while the failed one ran must not be remembered: the next id follows the last one stored.
        again = await asyncio.gather(*(store.add_span(span(*owner, 4)) for owner in owners))
        assert [each and each.sequence_id for each in again] == [2] * 8
        assert (await store.verify()).ok


async def test_the_others_see_their_own_writes_when_a_batch_is_run_again() -> None:
    """Both kinds of transaction are used, and the second only where it has to be."""
    seen: list[type[SqliteTransaction]] = []

    def operation(fails: bool) -> Callable[[Transaction], Awaitable[int]]:
        async def run(tx: Transaction) -> int:
            assert isinstance(tx, SqliteTransaction)
            seen.append(type(tx))
            tx.count({"tests": 1})
            await tx.insert_spans([])
            if fails:
                raise LookupError
            return (await tx.counters()).get("tests", 0)

        return run

    async with InMemoryLightningStore() as store:
        await store.statistics()
        write = store._core.backend.write
        seen.clear()
        assert await write(operation(fails=False)) == 0
        assert seen == [SqliteTransaction]
        seen.clear()
        results = await asyncio.gather(
            write(operation(fails=False)), write(operation(fails=True)), return_exceptions=True
        )
        assert results[0] == 1
        assert isinstance(results[1], LookupError)
        assert seen == [SqliteTransaction, SqliteTransaction, GuardedTransaction, GuardedTransaction]

        async def counters(tx: Transaction) -> dict[str, int]:
            return await tx.counters()

        assert (await write(counters))["tests"] == 2


async def test_an_operation_that_awaits_something_else_is_a_bug_that_is_told() -> None:
    async def suspends(tx: Transaction) -> None:
        await asyncio.sleep(0)

    async with InMemoryLightningStore() as store:
        await store.statistics()
        with pytest.raises(RuntimeError, match="awaited something other than its transaction"):
            await store._core.backend.write(suspends)
        await store.enqueue_rollout("goes on")


async def test_a_backup_that_comes_after_the_close_is_told_and_does_not_wait_for_ever() -> None:
    store = InMemoryLightningStore()
    await store.enqueue_rollout("input")
    assert isinstance(store._backend, SqliteBackend)
    writer = store._backend._use()
    await store.close()
    with pytest.raises(StoreClosed):
        await asyncio.wait_for(asyncio.to_thread(writer.exclusively, lambda _: None), timeout=10)


async def test_listeners_that_fail_leave_nobody_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A commit that nobody could be told of stands, and is acknowledged; after it the store stops."""

    def fail(_events: object) -> None:
        raise LookupError("a bug")

    async with SqliteLightningStore(tmp_path / "store.db") as store:
        await store.statistics()
        assert isinstance(store._backend, SqliteBackend)
        writer = store._backend._use()
        writer._publish = fail
        rollout = await asyncio.wait_for(store.enqueue_rollout("input"), timeout=10)
        with pytest.raises(StoreStopped, match="a bug"):
            await asyncio.wait_for(store.enqueue_rollout("another"), timeout=10)
        assert "could not be taken in" in caplog.text
    async with SqliteLightningStore(tmp_path / "store.db") as store:
        assert [each.rollout_id for each in await store.query_rollouts()] == [rollout.rollout_id]


async def test_an_enqueue_claims_for_those_who_wait_in_its_own_commit(tmp_path: Path) -> None:
    async with SqliteLightningStore(tmp_path / "store.db") as store:
        waiting = [
            asyncio.create_task(store.dequeue_rollout(f"w{n}", request_id=f"rq-{n}", wait_seconds=60)) for n in range(3)
        ]
        await _in_line(store, 3)
        backend, written = store._core.backend, 0
        assert isinstance(backend, SqliteBackend)
        writer = backend._use()
        hand_over = writer._hand_over

        def count(commit: Callable[[], None]) -> None:
            nonlocal written
            written += 1
            hand_over(commit)

        writer._hand_over = count
        enqueued = await store.enqueue_rollout("first")
        claim = await waiting[0]
        assert claim is not None
        assert (claim.rollout_id, claim.attempt.worker_id) == (enqueued.rollout_id, "w0")
        assert written == 1
        assert not waiting[1].done()
        repeated = await store.dequeue_rollout("w0", request_id="rq-0")
        assert repeated is not None
        assert repeated.attempt == claim.attempt
        # Two enqueues under one commit, and one claim that cannot be repeated among those that wait.
        waiting.append(asyncio.create_task(store.dequeue_rollout("w3", wait_seconds=60)))
        await _in_line(store, 3)
        await asyncio.gather(store.enqueue_rollout("second"), store.enqueue_rollout("third"))
        await store.enqueue_rollout("fourth")
        claims = [await each for each in waiting[1:]]
        assert sorted((each.input, each.attempt.worker_id) for each in claims if each) == [
            ("fourth", "w3"),
            ("second", "w1"),
            ("third", "w2"),
        ]
        assert (await store.verify()).ok


async def test_a_batch_that_is_run_again_claims_again_for_those_who_wait() -> None:
    async with InMemoryLightningStore() as store:
        waiting = asyncio.create_task(store.dequeue_rollout("w", request_id="rq", wait_seconds=60))
        await _in_line(store, 1)

        async def fail_after_writing(tx: Transaction) -> None:
            await tx.insert_spans([])
            raise LookupError

        enqueued, failed = await asyncio.gather(
            store.enqueue_rollout("work"), store._core.backend.write(fail_after_writing), return_exceptions=True
        )
        assert isinstance(failed, LookupError)
        claim = await waiting
        assert claim is not None
        assert not isinstance(enqueued, BaseException)
        assert (claim.rollout_id, claim.attempt.sequence_id) == (enqueued.rollout_id, 1)
        assert (await store.verify()).ok


async def test_a_claim_that_was_made_for_a_caller_as_its_time_ended_is_found() -> None:
    waiters, looks = ClaimWaiters(), 0
    wanted, transaction = ClaimRequest(1, "w", "rq", b"", 10.0), object()

    async def claim(waited: bool) -> list[str]:
        nonlocal looks
        looks += 1
        assert waited == (looks > 1)
        if looks == 1:
            asyncio.get_running_loop().call_soon(waiters.offer, transaction, 1)
            return []
        return ["claimed"]

    assert await waiters.claim_or_wait(claim, wanted, 0.01, abandon=lambda: None) == ["claimed"]
    assert waiters.offer(object(), 1) == []


async def _in_line(store: EngineStore, number: int) -> None:
    """Return when so many claims have found the queue empty, and wait."""
    while len(store._core.claims._waiting) < number:
        await asyncio.sleep(0)
