"""Signs of life that are not written at once: they count all the same, and nothing that was acknowledged is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from agentlightning import InMemoryLightningStore, SqliteLightningStore
from agentlightning.lifecycle import deadlines
from agentlightning.store.sqlite.row_cache import RowCache
from agentlightning.store.sqlite.transaction import SqliteTransaction
from clocks import ManualClock
from scenes import started, statuses
from store_state import assert_sound

TERM = 60.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def span(attempted: Any, number: int) -> Any:
    from agentlightning.types import Span

    return Span.from_attributes(
        rollout_id=attempted.rollout_id,
        attempt_id=attempted.attempt.attempt_id,
        span_id=f"{number:016x}",
        attributes={"number": number},
    )


def stored(database: Path, sql: str) -> Any:
    """What the file says, without what the store has in memory."""
    with closing(apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
        return connection.execute(sql).fetchall()


def crashed(database: Path) -> Path:
    """A copy of the files as a killed process leaves them."""
    left = database.with_name("crashed")
    left.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{database}{suffix}", left)
    return left / database.name


async def beat_attempt(store: Any, attempted: Any) -> None:
    await store.update_attempt(attempted.rollout_id, attempted.attempt.attempt_id, last_heartbeat_time=1.0)


async def beat_worker(store: Any, attempted: Any) -> None:
    await store.update_worker("worker-1", attempt_ids=[attempted.attempt.attempt_id])


async def send_span(store: Any, attempted: Any) -> None:
    number = len(await store.query_spans(attempted.rollout_id)) + 1
    await store.add_span(span(attempted, number))


WAYS = [beat_attempt, beat_worker, send_span]


@pytest.mark.parametrize("hear", WAYS)
async def test_a_live_attempt_is_never_declared_dead_however_seldom_it_is_written(
    clock: ManualClock, database: Path, hear: Callable[..., Any]
) -> None:
    """It speaks just within its lease, between two writes, through several of its deadlines."""
    for store in (SqliteLightningStore(database, clock=clock), InMemoryLightningStore(clock=clock)):
        async with store:
            attempted = await started(store, "worker-1", unresponsive_seconds=TERM, max_attempts=1)
            await hear(store, attempted)
            for step in [0.05 * TERM, 0.94 * TERM, 0.09 * TERM, 0.99 * TERM, 0.01 * TERM, 0.99 * TERM] * 3:
                clock.advance(step)
                assert (await statuses(store, attempted.rollout_id))[0] in ("preparing", "running")
                await hear(store, attempted)
            clock.advance(TERM - 0.1)
            assert (await statuses(store, attempted.rollout_id))[0] in ("preparing", "running")
            clock.advance(0.2)
            assert await statuses(store, attempted.rollout_id) == ("failed", ["unresponsive"])
            await assert_sound(store)


@pytest.mark.parametrize("hear", WAYS)
async def test_the_row_is_written_once_per_tenth_of_the_shortest_deadline(
    clock: ManualClock, database: Path, hear: Callable[..., Any]
) -> None:
    versions = "SELECT version FROM attempts"
    async with SqliteLightningStore(database, clock=clock) as store:
        attempted = await started(store, "worker-1", unresponsive_seconds=TERM, timeout_seconds=100 * TERM)
        await hear(store, attempted)
        [(before,)] = stored(database, versions)
        for _ in range(60):
            clock.advance(TERM / 60)
            await hear(store, attempted)
        [(after,)] = stored(database, versions)
        assert 9 <= after - before <= 11  # and not 60; one may be the sweep's, which sets the next deadline


async def test_reads_show_the_newest_sign_of_life(clock: ManualClock, database: Path) -> None:
    for store in (SqliteLightningStore(database, clock=clock), InMemoryLightningStore(clock=clock)):
        async with store:
            first = await started(store, "worker-1", unresponsive_seconds=TERM)
            second = await started(store, "worker-2", unresponsive_seconds=TERM)
            for each, worker in ((first, "worker-1"), (second, "worker-2")):
                await store.update_worker(worker, lease_seconds=TERM, attempt_ids=[each.attempt.attempt_id])
            clock.advance(1.0)
            await store.update_worker("worker-1", attempt_ids=[first.attempt.attempt_id])
            latest = await store.get_latest_attempt(first.rollout_id)
            shown = await store.get_rollout_by_id(first.rollout_id)
            [listed] = await store.query_attempts(first.rollout_id)
            now = clock.wall()
            assert latest is not None
            assert (latest.last_heartbeat_time, listed.last_heartbeat_time) == (now, now)
            assert shown is not None
            assert shown.attempt.last_heartbeat_time == now  # pyright: ignore[reportAttributeAccessIssue]
            worker = await store.get_worker_by_id("worker-1")
            assert worker is not None
            assert worker.last_heartbeat_time == now
            by_time = await store.query_workers(sort_by="last_heartbeat_time", sort_order="desc")
            assert [each.worker_id for each in by_time] == ["worker-1", "worker-2"]


async def test_after_a_crash_every_lease_gets_a_full_new_term_and_no_span_is_lost(
    clock: ManualClock, database: Path
) -> None:
    async with SqliteLightningStore(database, clock=clock) as store:
        attempted = await started(store, "worker-1", unresponsive_seconds=TERM, timeout_seconds=10 * TERM)
        await store.update_worker("worker-1", lease_seconds=TERM)
        for number in range(1, 6):
            await store.add_span(span(attempted, number))
            clock.advance(0.5)
        reserved = await store.get_next_span_sequence_id(attempted.rollout_id, attempted.attempt.attempt_id)
        assert reserved == 6
        await store.add_span(span(attempted, 7))
        left = crashed(database)
    clock.advance(1_000_000.0)
    async with SqliteLightningStore(left, clock=clock) as again:
        worker = await again.get_worker_by_id("worker-1")
        assert worker is not None
        assert (worker.status, worker.current_attempt_id) == ("busy", attempted.attempt.attempt_id)
        assert [each.sequence_id for each in await again.query_spans(attempted.rollout_id)] == [1, 2, 3, 4, 5, 7]
        clock.advance(TERM - 0.1)
        assert await statuses(again, attempted.rollout_id) == ("running", ["running"])
        await assert_sound(again)
        stored_span = await again.add_span(span(attempted, 8))
        assert stored_span is not None
        assert stored_span.sequence_id == 8  # after those in the file and those that were only given away
        assert await again.get_next_span_sequence_id(attempted.rollout_id, attempted.attempt.attempt_id) == 9


async def test_ids_that_were_given_away_are_not_issued_again_after_a_crash(clock: ManualClock, database: Path) -> None:
    async with SqliteLightningStore(database, clock=clock) as store:
        attempted = await started(store)
        ids = (attempted.rollout_id, attempted.attempt.attempt_id)
        assert [await store.get_next_span_sequence_id(*ids) for _ in range(3)] == [1, 2, 3]
        left = crashed(database)
    async with SqliteLightningStore(left, clock=clock) as again:
        assert await again.get_next_span_sequence_id(*ids) == 4


async def test_a_crash_forgets_at_most_a_tenth_of_a_time_out(clock: ManualClock, database: Path) -> None:
    async with SqliteLightningStore(database, clock=clock) as store:
        attempted = await started(store, timeout_seconds=100.0, max_attempts=1)
        for number in range(1, 56):
            clock.advance(1.0)
            await store.add_span(span(attempted, number))
        left = crashed(database)
    async with SqliteLightningStore(left, clock=clock) as again:
        clock.advance(44.0)
        assert await statuses(again, attempted.rollout_id) == ("running", ["running"])
        clock.advance(11.1)
        assert await statuses(again, attempted.rollout_id) == ("failed", ["timeout"])


async def test_a_store_that_is_closed_forgets_nothing(clock: ManualClock, database: Path) -> None:
    async with SqliteLightningStore(database, clock=clock) as store:
        attempted = await started(store, unresponsive_seconds=TERM)
        await store.add_span(span(attempted, 1))
        clock.advance(0.02 * TERM)
        await store.add_span(span(attempted, 2))
    assert stored(database, "SELECT last_heartbeat_time, span_sequence FROM attempts") == [(clock.wall(), 2)]


async def test_rows_that_make_way_in_memory_are_written(
    clock: ManualClock, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentlightning.store.sqlite.transaction._ROWS_OF_A_KIND", 3)
    async with SqliteLightningStore(database, clock=clock) as store:
        many = [await started(store, unresponsive_seconds=TERM, max_attempts=1) for _ in range(8)]
        for round_ in range(1, 30):
            for each in many:
                await store.add_span(span(each, round_))
            clock.advance(0.31 * TERM)
        for each in many:
            assert await statuses(store, each.rollout_id) == ("running", ["running"])
            spans = await store.query_spans(each.rollout_id)
            assert [one.sequence_id for one in spans] == list(range(1, 30))
        await assert_sound(store)


# --- Negative controls: a throttle that is wrong must be seen to kill a live attempt -----------------


def memory_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """The sweep judges by what is stored."""
    patch.setattr(SqliteTransaction, "_found", lambda _, row: row)
    patch.setattr(RowCache, "attempt_now", lambda _, row: row)


def throttled_beats_are_dropped(patch: pytest.MonkeyPatch) -> None:
    async def drop(_self: Any, old: Any, _new: Any, _write_after: float) -> Any:
        return old

    patch.setattr(SqliteTransaction, "touch", drop)


@pytest.mark.parametrize("break_it", [memory_is_not_looked_at, throttled_beats_are_dropped])
async def test_a_wrong_throttle_is_found_out(
    clock: ManualClock, database: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(deadlines, "_THROTTLES_PER_TERM", 0.01)
    break_it(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - a broken store may also refuse to go on
        await test_a_live_attempt_is_never_declared_dead_however_seldom_it_is_written(clock, database, send_span)
