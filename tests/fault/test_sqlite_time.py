"""Time that passes while nobody looks: a store that was closed, a clock that was set, a store that cannot write."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from agentlightning import InMemoryLightningStore, LightningStoreClient, SqliteLightningStore
from agentlightning.errors import NotFound, StoreStopped
from agentlightning.store.engine import EngineStore
from clocks import ManualClock
from execution_programs import until
from faulty_disk import FaultyDisk
from scenes import claimed, config, span_of, started, statuses
from store_server_process import StoreServerProcess
from store_state import assert_sound

TERM = 60.0
FAR = 1_000_000.0
Meanwhile = Callable[[ManualClock], None]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    with FaultyDisk() as disk:
        yield disk


def much_later(clock: ManualClock) -> None:
    clock.advance(FAR)


def clock_set_back(clock: ManualClock) -> None:
    clock.advance(1.0)
    clock.jump_wall(-FAR)


def clock_set_forward(clock: ManualClock) -> None:
    clock.advance(1.0)
    clock.jump_wall(FAR)


def machine_restarted(clock: ManualClock) -> None:
    """The monotonic clock begins anew, too."""
    clock.__init__(wall=clock.wall() + FAR, monotonic=3.0)


MEANWHILE = [much_later, clock_set_back, clock_set_forward, machine_restarted]


async def close(store: SqliteLightningStore, database: Path) -> Path:
    await store.close()
    return database


async def crash(store: SqliteLightningStore, database: Path) -> Path:
    """What a killed process leaves: its files, without a farewell."""
    left = database.with_name("crashed")
    left.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{database}{suffix}", left)
    await store.close()
    return left / database.name


# --- Reopened --------------------------------------------------------------------------------------


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("end", [close, crash])
async def test_every_lease_gets_a_full_new_term_when_the_store_is_opened_again(
    clock: ManualClock, database: Path, end: Any, meanwhile: Meanwhile
) -> None:
    store = SqliteLightningStore(database, clock=clock)
    silent = await started(store, unresponsive_seconds=TERM, max_attempts=1)
    running = await started(store, unresponsive_seconds=TERM, max_attempts=1)
    await store.add_span(span_of(running))
    of_worker = await started(store, "worker-1", max_attempts=1)
    await store.update_worker("worker-1", lease_seconds=TERM)
    await store.enqueue_rollout("input", config=config())
    unconfirmed = await claimed(store, request_id="rq-1")
    clock.advance(5.0)
    database = await end(store, database)
    meanwhile(clock)

    async with SqliteLightningStore(database, clock=clock) as again:
        assert await statuses(again, silent.rollout_id) == ("preparing", ["preparing"])
        assert await statuses(again, running.rollout_id) == ("running", ["running"])
        assert await statuses(again, of_worker.rollout_id) == ("preparing", ["preparing"])
        assert await statuses(again, unconfirmed.rollout_id) == ("preparing", ["preparing"])
        await assert_sound(again)
        clock.advance(9.9)
        assert await statuses(again, unconfirmed.rollout_id) == ("preparing", ["preparing"])
        clock.advance(0.2)  # its ten seconds are over
        assert await statuses(again, unconfirmed.rollout_id) == ("requeuing", ["unresponsive"])
        clock.advance(TERM - 10.2)
        for each in (silent, running, of_worker):
            assert (await statuses(again, each.rollout_id))[0] in ("preparing", "running")
        clock.advance(0.2)
        for each in (silent, running, of_worker):
            assert await statuses(again, each.rollout_id) == ("failed", ["unresponsive"])
        await assert_sound(again)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
async def test_a_time_out_goes_on_from_where_it_stood(clock: ManualClock, database: Path, meanwhile: Meanwhile) -> None:
    store = SqliteLightningStore(database, clock=clock)
    attempted = await started(store, timeout_seconds=100.0, max_attempts=1)
    clock.advance(40.0)
    await store.add_span(span_of(attempted))
    await store.close()
    meanwhile(clock)
    async with SqliteLightningStore(database, clock=clock) as again:
        clock.advance(59.0)
        assert await statuses(again, attempted.rollout_id) == ("running", ["running"])
        clock.advance(2.0)
        assert await statuses(again, attempted.rollout_id) == ("failed", ["timeout"])


async def test_many_restarts_in_a_row_expire_nothing(clock: ManualClock, database: Path) -> None:
    async with SqliteLightningStore(database, clock=clock) as store:
        attempted = await started(store, unresponsive_seconds=TERM, timeout_seconds=10 * TERM)
        await store.add_span(span_of(attempted))
    for _ in range(20):
        clock.advance(FAR)
        async with SqliteLightningStore(database, clock=clock) as store:
            clock.advance(TERM - 1)
            assert await statuses(store, attempted.rollout_id) == ("running", ["running"])
            await assert_sound(store)


# --- A clock that is set ---------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [FAR, -FAR])
async def test_setting_the_wall_clock_expires_nothing_and_delays_nothing(
    clock: ManualClock, database: Path, jump: float
) -> None:
    async with SqliteLightningStore(database, clock=clock) as store:
        attempted = await started(store, unresponsive_seconds=TERM, max_attempts=1)
        await store.add_span(span_of(attempted))
        clock.jump_wall(jump)
        assert await statuses(store, attempted.rollout_id) == ("running", ["running"])
        await store.enqueue_rollout("input")  # a write sweeps, too
        clock.advance(TERM - 1)
        assert await statuses(store, attempted.rollout_id) == ("running", ["running"])
        clock.advance(2.0)
        assert await statuses(store, attempted.rollout_id) == ("failed", ["unresponsive"])
        ended = await store.get_rollout_by_id(attempted.rollout_id)
        assert ended is not None
        assert ended.end_time == clock.wall()
        await assert_sound(store)


# --- A process that stood still --------------------------------------------------------------------


@pytest.fixture(params=["memory", "sqlite"])
def open_store(request: pytest.FixtureRequest, database: Path, clock: ManualClock) -> Callable[[], EngineStore]:
    if request.param == "memory":
        return lambda: InMemoryLightningStore(clock=clock)
    return lambda: SqliteLightningStore(database, clock=clock)


async def stop_after_a_while(store: EngineStore, clock: ManualClock, stop: Meanwhile) -> list[str]:
    """Rollouts whose workers were heard of in several ways, 5 s before ``stop``."""
    silent = await started(store, unresponsive_seconds=TERM, max_attempts=1)
    running = await started(store, unresponsive_seconds=TERM, max_attempts=1)
    of_worker = await started(store, "worker-1", max_attempts=1)
    clock.advance(1.0)
    await store.add_span(span_of(running))  # a sign of life that is not stored
    await store.update_worker("worker-1", lease_seconds=TERM)
    clock.advance(5.0)
    stop(clock)
    return [each.rollout_id for each in (silent, running, of_worker)]


async def states(store: EngineStore, rollout_ids: list[str]) -> set[str]:
    return {(await statuses(store, each))[0] for each in rollout_ids}


@pytest.mark.parametrize("seconds", [TERM - 4.0, TERM + 5.0, FAR])
async def test_every_lease_gets_a_full_new_term_when_the_process_stood_still(
    open_store: Callable[[], EngineStore], clock: ManualClock, seconds: float
) -> None:
    async with open_store() as store:
        known = await stop_after_a_while(store, clock, lambda clock: clock.stand_still(seconds))
        assert await states(store, known) == {"preparing", "running"}
        await store.enqueue_rollout("input")
        clock.advance(TERM - 0.1)
        assert await states(store, known) == {"preparing", "running"}
        clock.advance(0.2)
        assert await states(store, known) == {"failed"}  # those who are silent after it are noticed in time
        await assert_sound(store)


async def test_a_process_that_goes_on_all_the_time_expires_them(
    open_store: Callable[[], EngineStore], clock: ManualClock
) -> None:
    async with open_store() as store:
        known = await stop_after_a_while(store, clock, lambda clock: clock.advance(TERM + 5.0))
        assert await states(store, known) == {"failed"}
        await assert_sound(store)


async def test_a_write_comes_after_the_renewal_and_a_claim_is_not_taken_back(
    open_store: Callable[[], EngineStore], clock: ManualClock
) -> None:
    async with open_store() as store:
        await store.enqueue_rollout("input", config=config())
        unconfirmed = await claimed(store, request_id="rq-1")
        clock.stand_still(FAR)
        await store.add_span(span_of(unconfirmed))  # waited in a socket
        assert await statuses(store, unconfirmed.rollout_id) == ("running", ["running"])
        await assert_sound(store)


async def test_the_alarm_sees_a_stop_that_ends_before_any_lease(
    open_store: Callable[[], EngineStore], clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store() as store:
        known = await stop_after_a_while(store, clock, lambda clock: clock.stand_still(TERM - 10.0))
        await until(lambda: "stood still for 50.0 s" in caplog.text)
        await store.enqueue_rollout("input")
        clock.advance(TERM - 1.0)
        assert await states(store, known) == {"preparing", "running"}


@pytest.mark.timeout(60)
async def test_a_server_that_was_stopped_expires_none_of_the_living(database: Path) -> None:
    term = 4.0
    async with AsyncExitStack() as scope:
        server = scope.enter_context(StoreServerProcess(database))
        store = await scope.enter_async_context(LightningStoreClient(server.url, spool_dir=None))
        attempted = await started(store, unresponsive_seconds=term, max_attempts=1)
        server.signal(signal.SIGSTOP)
        time.sleep(term + 2.0)
        server.signal(signal.SIGCONT)
        assert await statuses(store, attempted.rollout_id) == ("preparing", ["preparing"])
        await store.add_span(span_of(attempted))
        assert await statuses(store, attempted.rollout_id) == ("running", ["running"])


async def test_a_time_out_does_not_count_what_the_process_stood_still(
    open_store: Callable[[], EngineStore], clock: ManualClock
) -> None:
    async with open_store() as store:
        attempted = await started(store, timeout_seconds=100.0, max_attempts=1)
        clock.advance(40.0)
        clock.stand_still(70.0)
        many = [store.cancel_rollout("ro-unknown"), *(store.enqueue_rollout(number) for number in range(5))]
        refused, *done = await asyncio.gather(*many, return_exceptions=True)  # each sweeps, in one transaction
        assert isinstance(refused, NotFound)
        assert not any(isinstance(each, BaseException) for each in done)
        clock.advance(59.0)
        assert await statuses(store, attempted.rollout_id) == ("preparing", ["preparing"])
        clock.advance(2.0)
        assert await statuses(store, attempted.rollout_id) == ("failed", ["timeout"])
        await assert_sound(store)


# --- A store that cannot write ---------------------------------------------------------------------


async def test_a_stopped_store_shows_what_has_expired_without_writing_it(
    clock: ManualClock, database: Path, disk: FaultyDisk
) -> None:
    store = SqliteLightningStore(database, clock=clock, vfs=disk.name)
    failing = await started(store, unresponsive_seconds=TERM, max_attempts=1)
    retried = await started(store, timeout_seconds=TERM, max_attempts=3)
    lasting = await started(store, unresponsive_seconds=10 * TERM)
    for each in (failing, retried, lasting):
        await store.add_span(span_of(each))
    disk.break_down("sync", "-wal")
    with pytest.raises(StoreStopped):
        await store.enqueue_rollout("input")
    before = [database.read_bytes(), Path(f"{database}-wal").read_bytes()]
    operations = disk.operations
    clock.advance(TERM - 1)
    assert await statuses(store, failing.rollout_id) == ("running", ["running"])
    clock.advance(2.0)
    assert await statuses(store, failing.rollout_id) == ("failed", ["unresponsive"])
    assert await statuses(store, retried.rollout_id) == ("requeuing", ["timeout"])
    assert await statuses(store, lasting.rollout_id) == ("running", ["running"])
    latest = await store.get_latest_attempt(failing.rollout_id)
    assert latest is not None
    assert (latest.status, latest.reason_code) == ("unresponsive", "unresponsive")
    shown = {each.rollout_id: each.status for each in (await store.query_rollouts()).items}
    assert shown == {
        failing.rollout_id: "failed",
        retried.rollout_id: "requeuing",
        lasting.rollout_id: "running",
    }
    assert disk.operations == operations
    assert [database.read_bytes(), Path(f"{database}-wal").read_bytes()] == before
    disk.mend()
    await store.close()
    async with SqliteLightningStore(database, clock=clock) as again:  # nobody wrote that they have expired
        assert await statuses(again, failing.rollout_id) == ("running", ["running"])
        await assert_sound(again)
