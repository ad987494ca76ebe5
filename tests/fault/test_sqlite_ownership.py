"""Who may use a database file: one process, one store object, and no child that inherited it by fork."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

import pytest

import store_programs
from agentlightning import InMemoryLightningStore, SqliteLightningStore
from agentlightning.errors import InvalidValue, StoreClosed, StoreOwned
from every_method import READS, SQLITE_ONLY, WRITES, without_a_call
from fresh_process import FreshProcess, run_fresh
from scenes import settled, started
from store_state import assert_sound


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def test_there_is_a_call_of_every_method() -> None:
    assert without_a_call() == set()


@pytest.mark.parametrize("durability", ["Full", "", None, 1, ["full"]])
def test_an_unknown_durability_is_refused(database: Path, durability: object) -> None:
    with pytest.raises(InvalidValue, match="full, process, none"):
        SqliteLightningStore(database, durability=durability)  # pyright: ignore[reportArgumentType]
    assert not database.exists()


# --- One owner -------------------------------------------------------------------------------------


async def test_another_process_is_refused_with_the_pid_of_the_owner(database: Path) -> None:
    with FreshProcess(store_programs.own, database) as owner:
        assert owner.hear() == "ready"
        store = SqliteLightningStore(database)
        with pytest.raises(StoreOwned, match=rf"\b{owner.pid}\b"):
            await store.statistics()
        owner.finish()
        assert (await store.statistics())["total_rollouts"] == 1  # the same object may try again
        await store.close()


async def test_another_store_of_the_same_process_is_refused(database: Path) -> None:
    async with SqliteLightningStore(database) as first:
        with pytest.raises(StoreOwned, match=f"this process .*{os.getpid()}"):
            await SqliteLightningStore(database).statistics()
        with pytest.raises(StoreOwned):
            await SqliteLightningStore(f"{database.parent}/./{database.name}").statistics()
        await first.enqueue_rollout("input")
    async with SqliteLightningStore(database) as second:
        assert (await second.statistics())["total_rollouts"] == 1


async def test_a_link_is_the_same_file(database: Path) -> None:
    other_name = database.with_name("link.db")
    async with SqliteLightningStore(database) as first:
        await first.enqueue_rollout("input")
        other_name.symlink_to(database)
        with pytest.raises(StoreOwned):
            await SqliteLightningStore(other_name).statistics()


async def test_a_killed_owner_leaves_the_file_free_at_once(database: Path) -> None:
    with FreshProcess(store_programs.own, database) as owner:
        assert owner.hear() == "ready"
        owner.kill()
        async with SqliteLightningStore(database) as store:
            assert await store.get_rollout_by_id("ro-1") is not None
            await assert_sound(store)


async def test_a_child_of_a_killed_owner_does_not_hold_the_file(database: Path) -> None:
    with FreshProcess(store_programs.own_and_fork, database) as owner:
        assert owner.hear() == "child"
        owner.kill()
        async with SqliteLightningStore(database) as store:
            assert await store.get_rollout_by_id("ro-1") is not None
            await store.enqueue_rollout("input")
            await assert_sound(store)


# --- Fork ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["calls", "closes", "exits", "opens"])
async def test_a_child_cannot_harm_the_store_that_it_inherited(database: Path, what: str) -> None:
    child, *closes = run_fresh(store_programs.fork_and, what, database)
    assert f"closed by {child.removeprefix('child ')}" not in closes
    assert closes != []  # the parent's
    async with SqliteLightningStore(database) as store:
        assert (await store.statistics())["rollouts_by_status"]["queuing"] == 20
        assert (await store.statistics())["rollouts_by_status"]["succeeded"] == 1
        await assert_sound(store)


async def test_a_fork_in_a_coroutine_leaves_waiting_callers_of_the_parent_alone(database: Path) -> None:
    run_fresh(store_programs.fork_in_a_coroutine, database)
    async with SqliteLightningStore(database) as store:
        await assert_sound(store)


async def test_locks_that_were_held_at_the_fork_do_not_hang_the_child(database: Path) -> None:
    run_fresh(store_programs.fork_while_locked, database)
    async with SqliteLightningStore(database) as store:
        assert (await store.statistics())["rollouts_by_status"]["cancelled"] == 1


# --- Closing ---------------------------------------------------------------------------------------


async def test_close_may_be_called_again_and_without_opening(database: Path) -> None:
    never_opened = SqliteLightningStore(database)
    await never_opened.close()
    await never_opened.close()
    assert not database.exists()
    store = SqliteLightningStore(database)
    await store.enqueue_rollout("input")
    await asyncio.gather(*(store.close() for _ in range(8)))
    await store.close()
    assert sorted(each.name for each in database.parent.iterdir()) == ["store.db", "store.db-owner"]


@pytest.mark.parametrize("opened", [True, False])
async def test_every_method_of_a_closed_store_is_refused(database: Path, opened: bool) -> None:
    store = SqliteLightningStore(database)
    if opened:
        await store.statistics()
    await store.close()
    for name, call in {**WRITES, **READS, **SQLITE_ONLY}.items():
        with pytest.raises(StoreClosed):
            assert await call(store) is name  # never true: says which method was not refused
    with pytest.raises(StoreClosed):
        async with store:
            pytest.fail("it opened again")


async def test_operations_in_flight_are_finished_before_it_closes(database: Path) -> None:
    store = SqliteLightningStore(database)
    await store.enqueue_rollout("input", rollout_id="ro-1")
    writing = [asyncio.create_task(store.enqueue_rollout("input", rollout_id=f"ro-w{n}")) for n in range(500)]
    checking = [asyncio.create_task(store.verify()) for _ in range(4)]
    await asyncio.sleep(0)
    await store.close()
    assert len(await asyncio.gather(*writing)) == 500
    assert all(report.ok for report in await asyncio.gather(*checking))
    async with SqliteLightningStore(database) as again:
        assert (await again.statistics())["total_rollouts"] == 501
        await assert_sound(again)


async def test_a_write_races_a_close_and_is_either_stored_or_refused(database: Path) -> None:
    store = SqliteLightningStore(database)
    await store.statistics()
    outcomes: dict[str, object] = {}
    ready = threading.Barrier(5)

    def write(writer: int) -> None:
        async def run() -> None:
            ready.wait()
            for number in range(10_000):
                name = f"ro-{writer}-{number}"
                try:
                    await store.enqueue_rollout("input", rollout_id=name)
                except StoreClosed:
                    outcomes[name] = None
                    return
                outcomes[name] = True

        asyncio.run(run())

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for each in writers:
        each.start()
    ready.wait()
    await asyncio.sleep(0.02)
    await store.close()
    for each in writers:
        await asyncio.to_thread(each.join)
    async with SqliteLightningStore(database) as again:
        stored = {each.rollout_id for each in (await again.query_rollouts()).items}
    assert stored == {name for name, done in outcomes.items() if done}
    assert list(outcomes.values()).count(None) == 4


async def test_waiting_callers_hear_of_the_close(database: Path) -> None:
    store = SqliteLightningStore(database)
    await store.enqueue_rollout("input", rollout_id="ro-1")
    await store.dequeue_rollout()
    waiting = [
        asyncio.create_task(store.wait_for_rollouts(rollout_ids=["ro-1"])),
        asyncio.create_task(store.dequeue_rollout(wait_seconds=3600.0)),
        asyncio.create_task(store.dequeue_rollout(request_id="rq-1", wait_seconds=3600.0)),
    ]
    await settled()
    assert not any(each.done() for each in waiting)
    await store.close()
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, StoreClosed)


# --- Without a close -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_store_that_is_thrown_away_leaves_no_thread_and_no_lock(database: Path, kind: str) -> None:
    before = set(threading.enumerate())

    async def use() -> None:
        store = SqliteLightningStore(database) if kind == "file" else InMemoryLightningStore()
        await started(store, unresponsive_seconds=3600.0)  # starts the alarm
        await store.verify()

    asyncio.run(use())
    for _ in range(100):  # a thread may still hold the store for the rest of what it did last
        gc.collect()
        left = set(threading.enumerate()) - before
        if not left:
            break
        for thread in left:
            thread.join(timeout=0.1)
    assert set(threading.enumerate()) <= before

    async def use_again() -> None:
        async with SqliteLightningStore(database) as store:
            await assert_sound(store)

    asyncio.run(use_again())
