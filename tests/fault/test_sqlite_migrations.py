"""Migrations: each as a whole or not at all, whatever happens in the middle; never back."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

import store_programs
from agentlightning import SqliteLightningStore
from agentlightning.errors import NewerSchema
from agentlightning.store.sqlite.connections import MIGRATIONS, check_identity, migrate, open_writer
from clocks import ManualClock
from faulty_disk import FaultyDisk
from fresh_process import FreshProcess
from store_state import assert_sound

VERSION = len(MIGRATIONS)
GOOD = "CREATE TABLE news (seq INTEGER PRIMARY KEY); INSERT INTO news VALUES (1)"
BETTER = "ALTER TABLE news ADD COLUMN title TEXT NOT NULL DEFAULT ''; CREATE INDEX news_by_title ON news (title)"
BAD = "CREATE TABLE more (seq); DELETE FROM rollouts; INSERT INTO more VALUES (1); SELECT no_such_function()"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database of the present version, with something in it."""

    async def fill() -> None:
        async with SqliteLightningStore(tmp_path / "store.db") as store:
            await store.enqueue_rollout("input", rollout_id="ro-1")

    asyncio.run(fill())
    return tmp_path / "store.db"


def schema_and_content(database: Path) -> list[Any]:
    with closing(apsw.Connection(str(database))) as connection:
        return [
            connection.pragma("user_version"),
            connection.pragma("application_id"),
            connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall(),
            connection.execute("SELECT * FROM rollouts").fetchall(),
        ]


def bring_up(database: Path, *migrations: str) -> None:
    open_writer(str(database), "full", vfs=None, migrations=[*MIGRATIONS, *migrations]).close()


def test_a_migration_that_fails_changes_nothing(database: Path) -> None:
    before = schema_and_content(database)
    with pytest.raises(apsw.SQLError):
        bring_up(database, BAD)
    assert schema_and_content(database) == before


def test_migrations_before_the_one_that_fails_stay(database: Path) -> None:
    with pytest.raises(apsw.SQLError):
        bring_up(database, GOOD, BAD, BETTER)
    after = schema_and_content(database)
    assert after[0] == VERSION + 1
    assert [name for name, _ in after[2] if name in ("news", "more")] == ["news"]
    bring_up(database, GOOD, BETTER)  # mended, they go on from there
    assert schema_and_content(database)[0] == VERSION + 2


def test_the_first_migration_that_fails_leaves_an_empty_file(tmp_path: Path) -> None:
    database = tmp_path / "new.db"
    with pytest.raises(apsw.SQLError):
        open_writer(str(database), "full", vfs=None, migrations=["CREATE TABLE rollouts (a); SELECT nonsense()"])
    with closing(apsw.Connection(str(database))) as connection:
        assert check_identity(connection, VERSION) == 0
        assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchall() == [(0,)]
    asyncio.run(check(database, 0))


def test_there_is_no_way_back(database: Path) -> None:
    bring_up(database, GOOD)
    before = schema_and_content(database)
    with pytest.raises(NewerSchema):
        bring_up(database)
    with pytest.raises(NewerSchema):
        asyncio.run(check(database, 1))
    assert schema_and_content(database) == before


def test_a_file_of_the_newest_version_is_left_alone(database: Path) -> None:
    before = database.read_bytes()
    bring_up(database)
    assert database.read_bytes() == before
    with closing(apsw.Connection(str(database))) as connection:
        changes = connection.total_changes()
        migrate(connection)
        assert connection.total_changes() == changes


def test_a_file_of_the_first_version_keeps_its_workers(tmp_path: Path) -> None:
    """Version 2 adds to them what they say of themselves and what is asked of them: nothing, so far."""
    database = tmp_path / "old.db"
    open_writer(str(database), "full", vfs=None, migrations=MIGRATIONS[:1]).close()
    with closing(apsw.Connection(str(database))) as connection:
        assert check_identity(connection, VERSION) == 1
        connection.execute(
            "INSERT INTO workers (version, worker_id, status, heartbeat_stats, lease_seconds, beaten_lease) "
            "VALUES (3, 'worker', 'idle', '{\"load\":1}', 20.0, 5.0); "
            "INSERT INTO counters VALUES ('workers', 1)"
        )

    async def check_workers() -> None:
        async with SqliteLightningStore(database) as store:
            [worker] = await store.query_workers()
            assert (worker.worker_id, worker.heartbeat_stats, worker.lease_seconds) == ("worker", {"load": 1}, 20.0)
            assert (worker.registration, worker.directive) == (None, None)
            await store.update_worker("worker", registration={"pid": 1})
            await store.direct_workers("drain")
            await assert_sound(store)
        async with SqliteLightningStore(database) as store:
            [worker] = await store.query_workers()
            assert (worker.registration, worker.directive) == ({"pid": 1}, "drain")

    asyncio.run(check_workers())


def test_a_file_of_the_third_version_keeps_what_its_workers_do(tmp_path: Path) -> None:
    """Version 4 computes what a worker holds from its live attempts, and drops an index of the spans."""
    database = tmp_path / "old.db"
    open_writer(str(database), "full", vfs=None, migrations=MIGRATIONS[:3]).close()
    with closing(apsw.Connection(str(database))) as connection:
        connection.execute(
            "INSERT INTO rollouts (version, rollout_id, status, priority, input, policy, start_time, attempts, "
            "redeliveries, latest_attempt_id, digest, claimable) "
            "VALUES (1, 'ro-1', 'running', 0, x'31', '{}', 1.0, 1, 0, 'at-1', x'', 0); "
            "INSERT INTO attempts (version, rollout_id, attempt_id, sequence_id, status, start_time, worker_id, "
            "started_lease, beaten_lease, span_sequence, digest, live) "
            "VALUES (1, 'ro-1', 'at-1', 1, 'running', 1.0, 'busy', 1.0, 1.0, 1, x'', 1); "
            "INSERT INTO workers (version, worker_id, status, current_rollout_id, current_attempt_id, beaten_lease) "
            "VALUES (1, 'busy', 'busy', 'ro-1', 'at-1', 1.0), (1, 'idle', 'idle', NULL, NULL, 1.0), "
            "(1, 'lost', 'unknown', NULL, NULL, 1.0); "
            "INSERT INTO counters VALUES ('workers', 3), ('attempts', 1), ('rollouts.running', 1)"
        )

    async def check_workers() -> None:
        async with SqliteLightningStore(database) as store:
            shown = {each.worker_id: (each.status, each.current_attempt_id) for each in await store.query_workers()}
            assert shown == {"busy": ("busy", "at-1"), "idle": ("idle", None), "lost": ("unknown", None)}
            assert [each.worker_id for each in await store.query_workers(status_in=["busy"])] == ["busy"]
            await store.update_attempt("ro-1", "at-1", "succeeded")
            assert (await store.query_workers(status_in=["busy"])).total == 0
            await assert_sound(store)

    asyncio.run(check_workers())


def test_a_file_of_the_fourth_version_goes_on_counting(tmp_path: Path) -> None:
    """Version 5 adds which workers were there and never confirmed a rollout: none, so far."""
    database, clock = tmp_path / "old.db", ManualClock()
    open_writer(str(database), "full", vfs=None, migrations=MIGRATIONS[:4]).close()
    with closing(apsw.Connection(str(database))) as connection:
        connection.execute(
            "INSERT INTO rollouts (version, rollout_id, status, priority, input, policy, start_time, attempts, "
            "redeliveries, latest_attempt_id, digest, claimable) "
            "VALUES (1, 'ro-1', 'requeuing', 0, x'31', '{}', 1.0, 1, 1, 'at-1', x'', 1); "
            "INSERT INTO attempts (version, rollout_id, attempt_id, sequence_id, status, start_time, end_time, "
            "worker_id, reason_code, started_lease, beaten_lease, span_sequence, digest, live) "
            "VALUES (1, 'ro-1', 'at-1', 1, 'unresponsive', 1.0, 2.0, 'old', 'unconfirmed', 1.0, 1.0, 0, x'', 0); "
            "INSERT INTO workers (version, worker_id, status, beaten_lease) VALUES (1, 'old', 'unknown', 1.0); "
            "INSERT INTO counters VALUES ('workers', 1), ('attempts', 1), ('rollouts.requeuing', 1)"
        )

    async def lose_it(store: SqliteLightningStore, worker_id: str) -> None:
        assert await store.dequeue_rollout(worker_id, request_id=f"of-{worker_id}") is not None
        clock.advance(1)
        await store.update_worker(worker_id)
        clock.advance(60)

    async def check_poison() -> None:
        async with SqliteLightningStore(database, clock=clock) as store:
            for worker_id in ("old", "new"):
                await lose_it(store, worker_id)
            await assert_sound(store)
        async with SqliteLightningStore(database, clock=clock) as store:
            for worker_id in ("newer", "newest"):
                assert (await store.query_rollouts()).items[0].status == "requeuing"
                await lose_it(store, worker_id)
            [rollout] = await store.query_rollouts()
            assert rollout.reason_code == "poison"
            assert (rollout.reason_message or "").endswith("had it: old, new, newer, newest")
            await assert_sound(store)

    asyncio.run(check_poison())


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_disk_that_fails_during_a_migration_leaves_the_old_version_or_the_new(tmp_path: Path, operation: Any) -> None:
    """At its first operation, its second, and so on."""
    survived = False
    passing = 0
    while not survived:
        database = tmp_path / f"{passing}.db"
        with FaultyDisk() as disk:
            disk.break_down(operation, "", passing=passing)
            try:
                open_writer(str(database), "full", vfs=disk.name).close()
            except apsw.IOError:
                disk.mend()
            survived = disk.failures == 0
        with closing(apsw.Connection(str(database))) as connection:
            assert check_identity(connection, VERSION) in range(VERSION + 1)  # each migration is a step of its own
        asyncio.run(check(database, 0))
        passing += 1
    assert passing > 2


def test_a_kill_in_the_middle_leaves_the_old_version_or_the_new(database: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of a migration that takes a while."""
    old = schema_and_content(database)
    rng = random.Random(9)
    seconds = 0.2
    seen: list[int] = []
    for number in range(8):
        copy = Path(shutil.copy(database, tmp_path / f"copy-{number}.db"))
        with FreshProcess(store_programs.migrate_slowly, copy) as process:
            assert process.hear() == "migrating"
            began = time.monotonic()
            if number == 0:  # how long it takes when nobody disturbs it
                assert process.finish() == ["migrated"]
                seconds = time.monotonic() - began
            else:
                time.sleep(rng.uniform(0, seconds))
                process.kill()
        now = schema_and_content(copy)
        seen.append(now[0])
        if now[0] == VERSION:
            assert now == old
            asyncio.run(check(copy, 1))
        else:
            assert now[0] == VERSION + 1
            with closing(apsw.Connection(str(copy))) as connection:
                assert connection.execute("SELECT count(*) FROM news").fetchall() == [(20_000,)]
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert VERSION in seen
    assert VERSION + 1 in seen


async def check(database: Path, rollouts: int) -> None:
    """A store opens the file, and is sound."""
    async with SqliteLightningStore(database) as store:
        assert (await store.statistics())["total_rollouts"] == rollouts
        await assert_sound(store)
