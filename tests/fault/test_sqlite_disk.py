"""Disks that fill up or fail: a clear error, no further acknowledgement, and nothing acknowledged lost."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import tempfile
from collections.abc import Awaitable, Iterator
from pathlib import Path

import apsw
import pytest

import store_programs
from agentlightning import SqliteLightningStore
from agentlightning.errors import AgentLightningError, DiskFull, StoreOwned, StoreStopped, StoreUnavailable
from agentlightning.store.engine import EngineStore
from agentlightning.store.sources import SystemClock, TimeOrderedIds
from agentlightning.store.sqlite.backend import FileBackend
from agentlightning.types import Rollout
from every_method import READS, WRITES
from faulty_disk import FaultyDisk, Operation
from fresh_process import run_fresh
from power_loss import ram_disk
from scenes import settled
from store_state import assert_sound

MEGABYTE = 2**20


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    with FaultyDisk() as disk:
        yield disk


def store_on(disk: FaultyDisk, database: Path, checkpoint_pages: int = 4000) -> EngineStore:
    clock = SystemClock()
    backend = FileBackend(database, "full", clock, disk.name, checkpoint_pages=checkpoint_pages)
    return EngineStore(backend, TimeOrderedIds(clock.wall))


# --- A full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounting.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"no small disk can be mounted here: {mounting.stderr}")
        pytest.skip(f"no small disk can be mounted here: {mounting.stderr}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def check_refusals(said: list[str], database: Path, code: str) -> None:
    """What `store_programs.fill` reported is what it should be, and all that was acknowledged is in the file."""
    acknowledged = ["ro-1", *(line.split()[1] for line in said if line.startswith("acknowledged"))]
    refused = [line for line in said if line.startswith("refused")]
    assert len(acknowledged) > 20
    assert [line.split()[1] for line in refused] == [code]
    assert str(database) in refused[0]
    assert [line for line in said if line.startswith("write")] == [f"write {name} {code}" for name in WRITES]
    assert [line for line in said if line.startswith("read")] == [f"read {name} done" for name in READS]
    async with SqliteLightningStore(database) as again:
        stored = {each.rollout_id for each in (await again.query_rollouts()).items}
        assert set(acknowledged) <= stored
        assert len(stored) <= len(acknowledged) + 1  # the write that was refused may have come through
        await assert_sound(again)
        await again.enqueue_rollout("there is space again")


@pytest.mark.root
async def test_a_full_disk_stops_the_store(small_disk: Path) -> None:
    database = small_disk / "store.db"
    reserve = small_disk / "reserve"
    reserve.write_bytes(bytes(MEGABYTE))
    said: list[str] = []
    async with SqliteLightningStore(database) as store:
        await store.enqueue_rollout("input", rollout_id="ro-1")
        await store_programs.fill(store, lambda line: said.append(str(line)))
        with pytest.raises(DiskFull, match="Free space"):
            await store.backup(small_disk / "backup.db")
    assert sorted(each.name for each in small_disk.iterdir() if "backup" in each.name) == []
    reserve.unlink()
    await check_refusals(said, database, "disk_full")


@pytest.mark.root
async def test_a_disk_that_fills_up_while_the_log_is_copied_stops_the_store(small_disk: Path) -> None:
    """The log is on the disk already, and the database grows when the log is copied into it."""
    reserve = small_disk / "reserve"
    reserve.write_bytes(bytes(MEGABYTE))
    clock = SystemClock()
    backend = FileBackend(small_disk / "store.db", "full", clock, checkpoint_pages=220)
    said: list[str] = []
    store = EngineStore(backend, TimeOrderedIds(clock.wall))
    async with store:
        await store.enqueue_rollout("input", rollout_id="ro-1")
        await store_programs.fill(store, lambda line: said.append(str(line)))  # pyright: ignore[reportArgumentType]
    reserve.unlink()
    await check_refusals(said, small_disk / "store.db", "disk_full")


@pytest.mark.root
async def test_a_store_cannot_be_made_on_a_full_disk_and_can_be_as_soon_as_there_is_space(small_disk: Path) -> None:
    reserve = small_disk / "reserve"
    fill_up(reserve)
    store = SqliteLightningStore(small_disk / "store.db")
    with pytest.raises(StoreUnavailable, match=r"store\.db"):
        await store.statistics()
    reserve.unlink()
    await store.enqueue_rollout("input")
    await assert_sound(store)
    await store.close()


def fill_up(reserve: Path) -> None:
    """Write a file until nothing more fits on its disk."""
    file = os.open(reserve, os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(file, bytes(4096)) == 4096:
            pass
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        os.close(file)


async def test_a_file_that_may_not_grow_stops_the_store(tmp_path: Path) -> None:
    """The same without root: a limit on the size of files, which SQLite takes for an I/O error."""
    database = tmp_path / "store.db"
    said = run_fresh(store_programs.write_until_refused, database, 2)
    await check_refusals(said, database, "store_stopped")


# --- A disk that fails -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError])
@pytest.mark.parametrize("operation", ["write", "sync"])
async def test_a_failed_write_or_sync_of_the_log_fails_all_who_share_it(
    disk: FaultyDisk, tmp_path: Path, operation: Operation, error: type[apsw.Error]
) -> None:
    expected = DiskFull if error is apsw.FullError else StoreStopped
    database = tmp_path / "store.db"
    store = SqliteLightningStore(database, vfs=disk.name)
    await store.start_rollout("input", rollout_id="ro-1", attempt_id="at-1", worker_id="worker-1")
    waiting = [
        asyncio.create_task(store.wait_for_rollouts(rollout_ids=["ro-1"])),
        asyncio.create_task(store.dequeue_rollout(wait_seconds=3600.0)),
    ]
    await settled()
    await store.update_worker("worker-1")  # everything before has been carried out
    disk.break_down(operation, "-wal", error)
    sharing = [store.start_rollout("input", rollout_id=f"ro-lost-{number}") for number in range(20)]
    for outcome in await asyncio.gather(*sharing, return_exceptions=True):
        assert type(outcome) is expected
        assert str(database) in str(outcome)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert type(outcome) is expected
    disk.mend()
    failures = disk.failures
    for name, call in WRITES.items():
        with pytest.raises(expected):
            assert await call(store) is name  # never true: says which method was not refused
    with pytest.raises(expected):
        await store.wait_for_rollouts(rollout_ids=["ro-1"])
    for call in READS.values():
        await call(store)
    assert disk.failures == failures  # it did not even try
    await store.close()
    async with SqliteLightningStore(database) as again:
        rollout = await again.get_rollout_by_id("ro-1")
        assert rollout is not None
        assert rollout.status == "preparing"
        await assert_sound(again)


@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError])
@pytest.mark.parametrize("operation", ["write", "sync"])
async def test_a_failure_while_the_log_is_copied_stops_the_store_after_the_acknowledgement(
    disk: FaultyDisk, tmp_path: Path, operation: Operation, error: type[apsw.Error]
) -> None:
    database = tmp_path / "store.db"
    store = store_on(disk, database, checkpoint_pages=90)
    await store.enqueue_rollout("input")
    disk.break_down(operation, "store.db", error)
    outcomes = [await outcome_of(store.enqueue_rollout("input", rollout_id=f"ro-{number}")) for number in range(100)]
    acknowledged = outcomes.index(DiskFull if error is apsw.FullError else StoreStopped)
    assert acknowledged > 0
    assert set(outcomes[:acknowledged]) == {Rollout}
    assert len(set(outcomes[acknowledged:])) == 1
    assert (await store.query_rollouts()).total == acknowledged + 1
    disk.mend()
    await store.close()
    async with SqliteLightningStore(database) as again:
        assert (await again.query_rollouts()).total == acknowledged + 1
        await assert_sound(again)


async def outcome_of(call: Awaitable[object]) -> type[object]:
    """The class of what the call returns or raises."""
    try:
        return type(await call)
    except AgentLightningError as error:
        return type(error)


async def test_a_failed_read_stops_the_store(disk: FaultyDisk, tmp_path: Path) -> None:
    """What cannot be read cannot be trusted either: no acknowledgement on top of it."""
    database = tmp_path / "store.db"
    async with SqliteLightningStore(database) as before:
        await before.enqueue_rollout("x" * 100_000, rollout_id="ro-1")
    store = SqliteLightningStore(database, vfs=disk.name)
    await store.statistics()
    disk.break_down("read", "store.db")
    with pytest.raises(StoreStopped, match=r"store\.db"):
        await store.get_rollout_by_id("ro-1")
    disk.mend()
    with pytest.raises(StoreStopped):
        await store.enqueue_rollout("input")
    assert await store.get_rollout_by_id("ro-1") is not None
    await store.close()


@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError])
async def test_whichever_write_or_sync_fails_nothing_acknowledged_is_lost(
    disk: FaultyDisk, error: type[apsw.Error]
) -> None:
    """The disk fails for good at its first operation, its second, and so on to the end of a small piece of work."""
    number = 0
    survived = False
    while not survived:
        number += 1
        with tempfile.TemporaryDirectory(dir=ram_disk()) as folder:
            database = Path(folder) / "store.db"
            disk.operations = 0
            disk.break_down_at(number, error)
            acknowledged, failure = await work(store_on(disk, database, checkpoint_pages=20), disk)
            survived = failure is None
            assert survived or isinstance(failure, StoreStopped), (number, failure)
            async with SqliteLightningStore(database) as again:
                stored = {each.rollout_id for each in (await again.query_rollouts()).items}
                assert set(acknowledged) <= stored, number
                assert len(stored) <= len(acknowledged) + 2, number
                await assert_sound(again)
    print(f"{number} places")
    assert number > 100


async def work(store: EngineStore, disk: FaultyDisk) -> tuple[list[str], AgentLightningError | None]:
    """Enqueue in pairs; returns what was acknowledged, and the error that ended it."""
    acknowledged: list[str] = []
    try:
        for number in range(6):
            pair = [f"ro-{number}-a", f"ro-{number}-b"]
            outcomes = await asyncio.gather(
                *(store.enqueue_rollout("input", rollout_id=each) for each in pair), return_exceptions=True
            )
            for name, outcome in zip(pair, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                acknowledged.append(name)
    except AgentLightningError as error:
        return acknowledged, error
    finally:
        disk.mend()  # a Python error in a VFS comes out of a close, where SQLite itself would pass over it
        await store.close()
    return acknowledged, None


async def test_a_failure_to_open_leaves_the_file_free(disk: FaultyDisk, tmp_path: Path) -> None:
    database = tmp_path / "store.db"
    store = SqliteLightningStore(database, vfs=disk.name)
    disk.break_down("write", "store.db")
    for _ in range(2):
        with pytest.raises(StoreStopped):
            await store.enqueue_rollout("input")
    disk.mend()
    async with SqliteLightningStore(database) as another:
        await another.enqueue_rollout("input")
        with pytest.raises(StoreOwned):
            await store.statistics()
    assert (await store.statistics())["total_rollouts"] == 1
    await store.close()
