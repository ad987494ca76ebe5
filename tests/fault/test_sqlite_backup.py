"""Copies of a database: taken while writers write, put back after a check, and never half of one."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from agentlightning import InMemoryLightningStore, SqliteLightningStore
from agentlightning.errors import (
    CorruptStore,
    ForeignFile,
    InvalidValue,
    NewerSchema,
    StoreOwned,
    StoreUnavailable,
)
from scenes import finish, span_of
from store_state import assert_sound, dump


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    return tmp_path / "backup.db"


async def work(store: SqliteLightningStore | InMemoryLightningStore, number: int) -> None:
    """One rollout from its beginning to its end."""
    attempted = await store.start_rollout(
        {"n": number}, rollout_id=f"ro-{number}", attempt_id=f"at-{number}", worker_id="worker-1"
    )
    await store.add_many_spans([span_of(attempted, span_id=f"{number}-{n}") for n in range(3)])
    await finish(store, attempted)


def files(folder: Path) -> set[str]:
    """What lies there, but for what an open database has beside it."""
    return {each.name for each in folder.iterdir() if not each.name.endswith(("-wal", "-shm", "-owner"))}


# --- Backup ----------------------------------------------------------------------------------------


async def test_a_backup_has_all_that_was_acknowledged_before_it_while_writers_go_on(
    database: Path, tmp_path: Path
) -> None:
    done: list[int] = []
    stop = False

    async def write(store: SqliteLightningStore, first: int) -> None:
        for number in range(first, first + 1_000_000):
            if stop:
                return
            await work(store, number)
            done.append(number)

    promised: list[list[int]] = []
    async with SqliteLightningStore(database) as store:
        writers = [asyncio.create_task(write(store, first * 1_000_000)) for first in range(8)]
        for number in range(5):
            so_far = len(done)
            while len(done) < so_far + 20:
                await asyncio.sleep(0)
            promised.append([*done])
            await store.backup(tmp_path / f"backup-{number}.db")
        stop = True
        await asyncio.gather(*writers)
        await assert_sound(store)
    assert files(tmp_path) == {"store.db", *(f"backup-{number}.db" for number in range(5))}
    for number, numbers in enumerate(promised):
        async with SqliteLightningStore(tmp_path / f"backup-{number}.db") as copy:
            found = {each.rollout_id: each.status for each in (await copy.query_rollouts()).items}
            assert {f"ro-{each}" for each in numbers} <= {each for each in found if found[each] == "succeeded"}
            await assert_sound(copy)


async def test_a_backup_of_a_store_in_memory_becomes_one_on_disk(backup: Path) -> None:
    store = InMemoryLightningStore()
    await asyncio.gather(*(work(store, number) for number in range(20)))
    await store.backup(backup)
    state = await dump(store)
    await store.close()
    async with SqliteLightningStore(backup) as copy:
        assert without_name(await dump(copy)) == without_name(state)
        await assert_sound(copy)


def without_name(state: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    return {**state, "statistics": {key: value for key, value in state["statistics"].items() if key != "name"}}


async def test_a_backup_replaces_nothing(database: Path, backup: Path, tmp_path: Path) -> None:
    async with SqliteLightningStore(database) as store:
        backup.write_text("precious")
        for target in (backup, database, tmp_path):
            with pytest.raises(InvalidValue, match="exists already"):
                await store.backup(target)
        with pytest.raises(InvalidValue, match="does not exist"):
            await store.backup(tmp_path / "missing" / "backup.db")
        assert backup.read_text() == "precious"
        assert files(tmp_path) == {"store.db", "backup.db"}


async def test_of_two_backups_to_one_file_one_is_refused(database: Path, backup: Path, tmp_path: Path) -> None:
    async with SqliteLightningStore(database) as store:
        await asyncio.gather(*(work(store, number) for number in range(50)))
        outcomes = await asyncio.gather(store.backup(backup), store.backup(backup), return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcomes) == ["InvalidValue", "NoneType"]
    assert files(tmp_path) == {"store.db", "backup.db"}
    async with SqliteLightningStore(backup) as copy:
        await assert_sound(copy)


async def test_a_backup_of_a_damaged_store_is_refused(database: Path, backup: Path, tmp_path: Path) -> None:
    async with SqliteLightningStore(database) as store:
        await asyncio.gather(*(work(store, number) for number in range(50)))
    with closing(apsw.Connection(str(database))) as connection:
        page = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'spans_by_id'").fetchall()[0][0]
    assert isinstance(page, int)
    with database.open("r+b") as file:
        file.seek((page - 1) * 8192)
        file.write(random.Random(9).randbytes(8192))
    store = SqliteLightningStore(database)
    with pytest.raises(CorruptStore):
        await store.backup(backup)
    await store.close()
    assert files(tmp_path) == {"store.db"}


async def test_of_two_restores_to_one_file_one_is_refused(database: Path, backup: Path, tmp_path: Path) -> None:
    state = await make_backup(database, backup)
    target = tmp_path / "restored.db"
    restores = (SqliteLightningStore.restore(backup, target) for _ in range(2))
    outcomes = await asyncio.gather(*restores, return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcomes) == ["InvalidValue", "NoneType"]
    assert files(tmp_path) == {"store.db", "backup.db", "restored.db"}
    async with SqliteLightningStore(target) as restored:
        assert await dump(restored) == state


# --- Restore ---------------------------------------------------------------------------------------


async def make_backup(database: Path, backup: Path) -> dict[str, dict[str, object]]:
    """A backup of a store with something in it; returns all that is in there."""
    async with SqliteLightningStore(database) as store:
        await asyncio.gather(*(work(store, number) for number in range(50)))
        await store.enqueue_rollout("input", rollout_id="ro-queue")
        await store.backup(backup)
        return await dump(store)


async def test_a_restored_store_has_everything(database: Path, backup: Path, tmp_path: Path) -> None:
    state = await make_backup(database, backup)
    before = backup.read_bytes()
    await SqliteLightningStore.restore(backup, tmp_path / "restored.db")
    assert backup.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"store.db", "store.db-owner", "backup.db", "restored.db"}
    async with SqliteLightningStore(tmp_path / "restored.db") as restored:
        assert await dump(restored) == state
        await restored.dequeue_rollout("worker-2")
        await assert_sound(restored)


async def test_a_restore_replaces_nothing(database: Path, backup: Path, tmp_path: Path) -> None:
    await make_backup(database, backup)
    with pytest.raises(InvalidValue, match="exists already"):
        await SqliteLightningStore.restore(backup, database)
    with pytest.raises(InvalidValue, match="does not exist"):
        await SqliteLightningStore.restore(backup, tmp_path / "missing" / "store.db")
    for missing in (tmp_path / "no-backup.db", tmp_path):
        with pytest.raises(InvalidValue, match="there is no backup"):
            await SqliteLightningStore.restore(missing, tmp_path / "restored.db")
    assert files(tmp_path) == {"store.db", "backup.db"}


def cut_short(backup: Path) -> None:
    os.truncate(backup, backup.stat().st_size // 2 // 8192 * 8192)


def scribbled(backup: Path) -> None:
    with backup.open("r+b") as file:
        file.seek(backup.stat().st_size // 2)
        file.write(random.Random(9).randbytes(20_000))


def without_header(backup: Path) -> None:
    with backup.open("r+b") as file:
        file.write(bytes(100))


def of_another_program(backup: Path) -> None:
    backup.unlink()
    with closing(apsw.Connection(str(backup))) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")


def of_the_future(backup: Path) -> None:
    with closing(apsw.Connection(str(backup))) as connection:
        connection.pragma("user_version", 1_000)


def with_a_broken_rule(backup: Path) -> None:
    with closing(apsw.Connection(str(backup))) as connection:
        connection.execute("UPDATE rollouts SET reason_code = NULL WHERE rollout_id = 'ro-7'")


def with_a_value_that_is_no_json(backup: Path) -> None:
    with closing(apsw.Connection(str(backup))) as connection:
        connection.execute("UPDATE rollouts SET input = x'7b' WHERE rollout_id = 'ro-7'")


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut_short, CorruptStore, "backup.db"),
        (scribbled, CorruptStore, "backup.db"),
        (without_header, ForeignFile, "backup.db"),
        (of_another_program, ForeignFile, "backup.db"),
        (of_the_future, NewerSchema, "1000"),
        (with_a_broken_rule, CorruptStore, "rollout ro-7: .*end_is_told"),
        (with_a_value_that_is_no_json, CorruptStore, "rollout ro-7: .*json_valid"),
    ],
)
async def test_a_backup_that_is_not_good_is_refused_and_nothing_left(
    database: Path, backup: Path, tmp_path: Path, damage: object, error: type[Exception], words: str
) -> None:
    await make_backup(database, backup)
    assert callable(damage)
    damage(backup)
    with pytest.raises(error, match=words):
        await SqliteLightningStore.restore(backup, tmp_path / "restored.db")
    left = {each.name for each in tmp_path.iterdir()} - {"store.db", "store.db-owner", "backup.db"}
    assert left == set()


async def test_a_restore_from_the_file_of_a_store_that_was_killed(database: Path, tmp_path: Path) -> None:
    """A copy of its files, log included, is as good as a backup, but for signs of life that need not be durable."""
    store = SqliteLightningStore(database)
    await asyncio.gather(*(work(store, number) for number in range(50)))
    state = await dump(store)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{database}{suffix}", crashed)
    await store.close()
    await SqliteLightningStore.restore(crashed / "store.db", tmp_path / "restored.db")
    async with SqliteLightningStore(tmp_path / "restored.db") as restored:
        assert without_worker_times(await dump(restored)) == without_worker_times(state)


def without_worker_times(state: dict[str, dict[str, object]]) -> dict[str, object]:
    workers: list[dict[str, object]] = state["workers"]  # type: ignore[assignment]
    return {**state, "workers": [without_times(each) for each in workers]}


def without_times(worker: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in worker.items() if not name.endswith("_time")}


async def test_a_restored_file_has_one_owner_from_the_beginning(database: Path, backup: Path, tmp_path: Path) -> None:
    await make_backup(database, backup)
    await SqliteLightningStore.restore(backup, tmp_path / "restored.db")
    async with SqliteLightningStore(tmp_path / "restored.db"):
        with pytest.raises(StoreOwned):
            await SqliteLightningStore(tmp_path / "restored.db").statistics()


# --- No room ---------------------------------------------------------------------------------------


@pytest.mark.root
async def test_copies_that_do_not_fit_leave_nothing_behind(database: Path, backup: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    await make_backup(database, backup)
    small = tmp_path / "small"
    small.mkdir()
    room = backup.stat().st_size // 4096 * 3 // 4
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_blocks={room}", "tmpfs", str(small)], check=False)
    if mounting.returncode:
        pytest.fail("no small disk can be mounted here") if os.environ.get("CI") else pytest.skip("no small disk")
    try:
        async with SqliteLightningStore(database) as store:
            with pytest.raises(StoreUnavailable, match="full"):
                await store.backup(small / "copy.db")
            await store.enqueue_rollout("that disk is not this one")
        with pytest.raises(StoreUnavailable, match="full"):
            await SqliteLightningStore.restore(backup, small / "restored.db")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
